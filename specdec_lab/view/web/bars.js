// Acceptance per draft position, and the table of configurations.

const ACCEPT_HEIGHT = 210;

function drawAcceptance(surface, row, theme) {
  const { ctx, width, height } = surface;
  const axes = { left: 46, right: width - 8, top: 12, bottom: height - 36 };
  const y = (share) => axes.bottom - share * (axes.bottom - axes.top);
  for (const share of [0, 0.25, 0.5, 0.75, 1]) horizontal(ctx, axes, y(share), percent(share), theme);
  const positions = row?.pos ?? [];
  const middle = (axes.left + axes.right) / 2;
  if (!positions.length) {
    const words = row ? "plain decoding drafts nothing" : "no draft yet";
    label(ctx, words, middle, y(0.625), { align: "center", colour: theme.soft, font: 13, family: theme.font });
    return;
  }
  const step = Math.min(90, (axes.right - axes.left) / positions.length);
  const start = middle - (step * positions.length) / 2;
  const every = Math.ceil(26 / step);
  positions.forEach(([accepted, drafted], i) => {
    const x = start + (i + 0.5) * step;
    drawAcceptanceBar(ctx, x, Math.min(30, 0.36 * step), y, accepted, drafted, theme);
    if (i % every === 0) label(ctx, String(i + 1), x, axes.bottom + 12, { align: "center", colour: theme.soft, family: theme.font });
  });
  drawAlpha(ctx, row.alpha, positions.length, start, step, y, theme);
  label(ctx, "draft position", middle, axes.bottom + 28, { align: "center", colour: theme.soft, family: theme.font });
}

function drawAcceptanceBar(ctx, x, half, y, accepted, drafted, theme) {
  const rate = drafted ? accepted / drafted : 0;
  ctx.fillStyle = FAMILIES[1].colour;
  ctx.fillRect(x - half, y(rate), 2 * half, y(0) - y(rate));
  const [low, high] = wilson(accepted, drafted);
  line(ctx, theme.ink, 1.5, [], [[x, y(low)], [x, y(high)]]);
  for (const end of [low, high]) line(ctx, theme.ink, 1.5, [], [[x - 4, y(end)], [x + 4, y(end)]]);
  const hasRoom = half >= 15 && y(0) - y(low) > 20; // in the foot of the bar, clear of the interval
  if (hasRoom) label(ctx, percent(rate), x, y(0) - 10, { align: "center", colour: "#FFFFFF", family: theme.font });
}

// What the bars would be if every position were accepted with the fitted chance.
function drawAlpha(ctx, alpha, count, start, step, y, theme) {
  if (alpha == null) return;
  const points = Array.from({ length: count }, (_, i) => [start + (i + 0.5) * step, y(alpha ** (i + 1))]);
  line(ctx, theme.isDark ? "#1A1A1A" : AMBER_OUTLINE, 4, [], points);
  line(ctx, FAMILIES[2].colour, 2, [], points);
  for (const [x, py] of points) {
    ctx.beginPath();
    ctx.arc(x, py, 3.5, 0, 2 * Math.PI);
    ctx.fillStyle = FAMILIES[2].colour;
    ctx.strokeStyle = AMBER_OUTLINE;
    ctx.fill();
    ctx.stroke();
  }
}

// Against plain decoding of the same cell: the ratio, how sure it is, and what that means.
function speedupOf(store, row) {
  if (row.config === "off") return { ratio: "1×", rest: "baseline", title: "plain decoding" };
  if (row.speedup) return pairedSpeedup(row.speedup);
  const plain = store.plainOf(row);
  if (!plain?.tps) return { ratio: "–", rest: "", title: "plain decoding of this cell has not run yet" };
  const title = "rates so far, not paired: no interval yet";
  return { ratio: `${(row.tps / plain.tps).toFixed(2)}×`, rest: "so far", title, verdict: "unsure" };
}

function pairedSpeedup([mean, low, high, blocks]) {
  const ratio = `${mean.toFixed(2)}×`;
  if (low == null) return { ratio, rest: "n=1", title: "one block gives no interval", verdict: "unsure" };
  const isSure = low > 1 || high < 1;
  const title = `95% interval over ${blocks} paired blocks${isSure ? "" : ": includes 1×"}`;
  const verdict = isSure ? (low > 1 ? "faster" : "slower") : "unsure";
  return { ratio, rest: `[${low.toFixed(2)}, ${high.toFixed(2)}] n=${blocks}`, title, verdict };
}

const TABLE_HEAD = [
  ["cell", "batch x tokens of context"], ["config", "press to see its acceptance"], ["tokens/s", "all rows together, prefill not counted"],
  ["vs plain decoding", "same cell; [95% interval], n = paired blocks"], ["accept. length", "tokens per row and round, bonus included"],
  ["time of a round", "mean, measured; hatched part modelled"], ["KV floor", "share of measured attention: KV bytes / measured read bandwidth (modelled)"],
];

// Labels that not every row has; those of all rows stand in the header of the view.
function ownLabels(row, rows) {
  return row.labels.filter((words) => !rows.every((other) => other.labels.includes(words)));
}

function kvShareOfAttention(row) {
  const attention = row.parts[2];
  return attention ? percent(row.kv_ms / attention) : "–";
}

// The numbers of the present configuration in large: [value, what it is, how it was had].
function tilesOf(store) {
  const row = store.current();
  if (!row) return [];
  const verify = row.parts[1] + row.parts[2];
  const speedup = speedupOf(store, row);
  return [
    [quantity(row.tps), "tokens/s", "all rows together, prefill not counted"],
    [speedup.ratio, row.config === "off" ? "plain decoding, the baseline" : `vs plain decoding ${speedup.rest}`, speedup.title],
    [row.length.toFixed(2), "tokens per row and round", "mean, bonus included"],
    [`${quantity(row.ms)} ms`, "time of a round", "mean, measured"],
    [verify ? percent(row.kv_ms / verify) : "–", "KV floor of verify", "KV bytes / measured read bandwidth (modelled), over measured verify time"],
  ];
}

// Draft, linear, attention, commit, accept, host, as sent; widths in the order of the strip.
function barParts(row) {
  const [draft, linear, attention, commit, accept, host] = row.parts;
  const floor = Math.min(row.kv_ms, attention);
  return [floor, linear + attention - floor, draft, commit + accept + host];
}
