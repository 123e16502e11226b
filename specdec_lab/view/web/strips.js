// The strips over the same rounds: where the time of a round went, how much of verify is KV load, what a round yields.

const LEFT = 58;
const RIGHT = 10;
const BAND = 20; // names of the blocks, above the first strip
const TIME_HEIGHT = 236;
const LANES_HEIGHT = 176;
const LANES = { share: [8, 66], tokens: [80, 138] }; // top and bottom of the two lanes of the second strip

function axesOf(range, width, top, bottom) {
  const right = width - RIGHT;
  const scale = (right - LEFT) / (range.end - range.begin);
  return {
    left: LEFT, right, top, bottom,
    x: (round) => Math.min(right, Math.max(LEFT, LEFT + (round - range.begin) * scale)),
    round: (x) => range.begin + (x - LEFT) / scale,
  };
}

// Neighbouring rows without a hole between them; what was not received is not drawn over.
function stretches(store, range) {
  const { step, count } = store.rows;
  const found = [];
  let from = range.first;
  for (let i = range.first + 1; i <= range.last + 1; i++) {
    if (i > range.last || step[i] > step[i - 1] + count[i - 1] + 0.5) {
      found.push([from, i - 1]);
      from = i;
    }
  }
  return found;
}

// Blocks in view: [first round, round after the last, segment].
function blocks(store, range) {
  const { step, count, segment } = store.rows;
  const found = [];
  for (let i = range.first; i <= range.last; i++) {
    const last = found[found.length - 1];
    if (last && last.number === segment[i]) last.end = step[i] + count[i];
    else found.push({ number: segment[i], begin: step[i], end: step[i] + count[i], info: store.segments.get(segment[i]) });
  }
  return found;
}

function horizontal(ctx, axes, y, words, theme) {
  line(ctx, theme.grid, 1, [], [[axes.left, Math.round(y) + 0.5], [axes.right, Math.round(y) + 0.5]]);
  label(ctx, words, axes.left - 7, y, { align: "right", colour: theme.soft, family: theme.font });
}

function axisTitle(ctx, words, x, y, theme, isRight = false) {
  ctx.save();
  ctx.translate(x, y);
  ctx.rotate(isRight ? Math.PI / 2 : -Math.PI / 2);
  label(ctx, words, 0, 0, { align: "center", colour: theme.soft, family: theme.font });
  ctx.restore();
}

function emptyStrip({ ctx, width, height }, theme, words) {
  const [top, bottom] = [BAND + 6, height - 8];
  for (const y of [top, (top + bottom) / 2, bottom]) line(ctx, theme.grid, 1, [], [[LEFT, Math.round(y) + 0.5], [width - RIGHT, Math.round(y) + 0.5]]);
  label(ctx, words, (LEFT + width - RIGHT) / 2, top + 0.25 * (bottom - top), { align: "center", colour: theme.soft, font: 13, family: theme.font });
}

function drawTimeStrip(surface, store, view, theme) {
  const { ctx, width } = surface;
  const range = store.visible(view.span);
  if (!range) return emptyStrip(surface, theme, view.waiting);
  const axes = axesOf(range, width, BAND + 6, TIME_HEIGHT - 8);
  const top = heightOf(store, range);
  const isMicro = top < 1;
  const y = (ms) => axes.bottom - (Math.min(ms, top) / top) * (axes.bottom - axes.top);
  const marks = ticks(0, top, 4);
  const words = tickWords(isMicro ? marks.map((ms) => ms * 1e3) : marks);
  marks.forEach((value, i) => horizontal(ctx, axes, y(value), words[i], theme));
  axisTitle(ctx, isMicro ? "µs per round" : "ms per round", 9, (axes.top + axes.bottom) / 2, theme);
  for (const stretch of stretches(store, range)) drawStack(ctx, store, axes, y, stretch, view.layers, theme);
  drawMarks(ctx, store, range, axes, y, top, theme);
  drawBlocks(ctx, store, range, axes, theme);
  return { axes, range };
}

// High enough for what is usual in every block in view; what sticks out of that is a spike, clipped and marked.
function heightOf(store, range) {
  const { segment } = store.rows;
  const totals = new Map();
  for (let i = range.first; i <= range.last; i++) {
    if (!totals.has(segment[i])) totals.set(segment[i], []);
    totals.get(segment[i]).push(store.total(i));
  }
  const usual = [...totals.values()].map((block) => Math.min(1.2 * percentile(block, 0.9), 2.5 * percentile(block, 0.5)));
  return Math.max(...usual) || 1;
}

function drawStack(ctx, store, axes, y, [first, last], layers, theme) {
  const { step, count } = store.rows;
  let lower = new Float64Array(last - first + 1);
  for (const layer of layers) {
    const upper = lower.map((base, k) => base + Math.max(0, store.part(layer.key, first + k)));
    ctx.beginPath();
    for (let k = 0; k < upper.length; k++) {
      ctx.lineTo(axes.x(step[first + k]), y(upper[k]));
      ctx.lineTo(axes.x(step[first + k] + count[first + k]), y(upper[k]));
    }
    for (let k = lower.length - 1; k >= 0; k--) {
      ctx.lineTo(axes.x(step[first + k] + count[first + k]), y(lower[k]));
      ctx.lineTo(axes.x(step[first + k]), y(lower[k]));
    }
    ctx.closePath();
    ctx.fillStyle = layer.modelled ? hatch(ctx, layer.colour, theme.isDark) : layer.colour;
    ctx.fill();
    if (layer.key === "kv" || (layer.key === "draft" && !theme.isDark)) {
      drawEdge(ctx, step, count, first, axes, y, lower, upper, layer.key === "kv" ? layer.colour : AMBER_OUTLINE);
    }
    lower = upper;
  }
}

// The upper edge of a layer, where the layer has any height.
function drawEdge(ctx, step, count, first, axes, y, lower, upper, colour) {
  ctx.beginPath();
  let isDown = false;
  for (let k = 0; k < upper.length; k++) {
    const isFlat = y(lower[k]) - y(upper[k]) < 1;
    if (!isFlat) {
      const [a, b] = [axes.x(step[first + k]), axes.x(step[first + k] + count[first + k])];
      if (isDown) ctx.lineTo(a, y(upper[k]));
      else ctx.moveTo(a, y(upper[k]));
      ctx.lineTo(b, y(upper[k]));
    }
    isDown = !isFlat;
  }
  ctx.strokeStyle = colour;
  ctx.lineWidth = 1;
  ctx.stroke();
}

// A triangle where a round is higher than the strip; a cross under the axis where the KV floor exceeds the measured attention.
function drawMarks(ctx, store, range, axes, y, top, theme) {
  const { step, count, flags } = store.rows;
  for (let i = range.first; i <= range.last; i++) {
    const x = axes.x(step[i] + count[i] / 2);
    if (store.total(i) > top) {
      ctx.beginPath();
      ctx.moveTo(x, axes.top - 5);
      ctx.lineTo(x - 4, axes.top + 1);
      ctx.lineTo(x + 4, axes.top + 1);
      ctx.fillStyle = theme.ink;
      ctx.fill();
    }
    if (flags[i] & FLAG_FLOOR_ABOVE) {
      line(ctx, theme.ink, 1.2, [], [[x - 2, axes.bottom + 2], [x + 2, axes.bottom + 6]]);
      line(ctx, theme.ink, 1.2, [], [[x - 2, axes.bottom + 6], [x + 2, axes.bottom + 2]]);
    }
  }
}

function drawBlocks(ctx, store, range, axes, theme) {
  const found = blocks(store, range);
  const areManyCells = new Set(found.map((b) => b.info?.cell)).size > 1;
  found.forEach((block, i) => {
    const [a, b] = [axes.x(block.begin), axes.x(block.end)];
    ctx.fillStyle = theme.band;
    if (block.number % 2 === 0) ctx.fillRect(a, 0, b - a, BAND - 3);
    if (i) line(ctx, theme.soft, 1, [2, 3], [[Math.round(a) + 0.5, 0], [Math.round(a) + 0.5, axes.bottom]]);
    ctx.font = `12px ${theme.font}`;
    const words = blockWords(ctx, block.info, areManyCells, b - a - 8);
    label(ctx, words, (a + b) / 2, (BAND - 3) / 2, { align: "center", colour: theme.ink, family: theme.font });
  });
}

// Cell and configuration where they fit, else the configuration, cut if it must be.
function blockWords(ctx, info, isCellNews, room) {
  if (!info) return "";
  const both = `${info.cell} ${info.config}`;
  return isCellNews && ctx.measureText(both).width <= room ? both : fitted(ctx, info.config, room);
}

function drawLanes(surface, store, view, theme) {
  const { ctx, width } = surface;
  const range = store.visible(view.span);
  if (!range) return;
  const shareAxes = axesOf(range, width, ...LANES.share);
  const tokenAxes = axesOf(range, width, ...LANES.tokens);
  drawShareLane(ctx, store, range, shareAxes, theme);
  drawTokenLane(ctx, store, range, tokenAxes, theme);
  drawRounds(ctx, range, tokenAxes, theme);
  for (const block of blocks(store, range).slice(1)) {
    const x = Math.round(tokenAxes.x(block.begin)) + 0.5;
    line(ctx, theme.soft, 1, [2, 3], [[x, shareAxes.top], [x, tokenAxes.bottom]]);
  }
}

function drawShareLane(ctx, store, range, axes, theme) {
  const y = (value) => axes.bottom - Math.min(1, value) * (axes.bottom - axes.top);
  for (const value of [0, 0.5, 1]) horizontal(ctx, axes, y(value), percent(value), theme);
  for (const stretch of stretches(store, range)) drawShare(ctx, store, axes, y, stretch, theme);
  for (const [colour, width] of [[theme.isDark ? "#000000" : "#FFFFFF", 3], [theme.ink, 1]]) {
    line(ctx, colour, width, [6, 4], [[axes.left, y(0.5)], [axes.right, y(0.5)]]); // on a halo, to be seen on the hatching
  }
  axisTitle(ctx, "KV share", 9, (axes.top + axes.bottom) / 2, theme);
}

function drawShare(ctx, store, axes, y, [first, last], theme) {
  const { step, count } = store.rows;
  const edge = [];
  for (let i = first; i <= last; i++) {
    edge.push([axes.x(step[i]), y(store.kvShare(i))], [axes.x(step[i] + count[i]), y(store.kvShare(i))]);
  }
  ctx.beginPath();
  edge.forEach(([px, py]) => ctx.lineTo(px, py));
  ctx.lineTo(edge[edge.length - 1][0], axes.bottom);
  ctx.lineTo(edge[0][0], axes.bottom);
  ctx.closePath();
  ctx.fillStyle = hatch(ctx, FAMILIES[0].colour, theme.isDark);
  ctx.fill();
  line(ctx, FAMILIES[0].colour, 1.5, [], edge);
}

// Tokens per row: a dot per round, and the mean of the last 15 rounds as a line, which starts anew with every block.
function drawTokenLane(ctx, store, range, axes, theme) {
  const { step, count, tokens_per_row: tokens } = store.rows;
  let most = 2;
  for (let i = range.first; i <= range.last; i++) most = Math.max(most, Math.ceil(tokens[i] - 1e-3));
  const y = (value) => axes.bottom - (value / most) * (axes.bottom - axes.top);
  for (const value of ticks(0, most, Math.min(most, 3), true)) horizontal(ctx, axes, y(value), String(value), theme);
  axisTitle(ctx, "tokens", 9, (axes.top + axes.bottom) / 2, theme);
  const areDense = (axes.right - axes.left) / (range.end - range.begin) < 2;
  for (const block of meansOf(store, range)) line(ctx, theme.ink, 2, [], block.map(([round, mean]) => [axes.x(round), y(mean)]));
  ctx.fillStyle = theme.soft;
  for (let i = range.first; i <= range.last && !areDense; i++) {
    ctx.fillRect(axes.x(step[i] + count[i] / 2) - 1, y(tokens[i]) - 1, 2, 2);
  }
}

// Means of tokens per row over the last 15 rows of a block as [round, mean], a list per block.
function meansOf(store, range) {
  const { step, count, segment, tokens_per_row: tokens } = store.rows;
  const lists = [];
  let from = range.first;
  let [sum, rounds] = [0, 0];
  for (let i = range.first; i <= range.last; i++) {
    if (i === range.first || segment[i] !== segment[i - 1]) {
      lists.push([]);
      from = i;
      [sum, rounds] = [0, 0];
    }
    sum += tokens[i] * count[i];
    rounds += count[i];
    if (i - from >= 15) {
      sum -= tokens[from] * count[from];
      rounds -= count[from++];
    }
    lists[lists.length - 1].push([step[i] + count[i] / 2, sum / rounds]);
  }
  return lists;
}

function drawRounds(ctx, range, axes, theme) {
  for (const value of ticks(range.begin, range.end, 8, true)) {
    const x = axes.x(value);
    line(ctx, theme.soft, 1, [], [[x, axes.bottom], [x, axes.bottom + 4]]);
    label(ctx, whole(value), x, axes.bottom + 13, { align: "center", colour: theme.soft, family: theme.font });
  }
  label(ctx, "round", (axes.left + axes.right) / 2, axes.bottom + 28, { align: "center", colour: theme.soft, family: theme.font });
}

function drawCursor(ctx, x, top, bottom, theme) {
  line(ctx, theme.ink, 1, [], [[Math.round(x) + 0.5, top], [Math.round(x) + 0.5, bottom]]);
}

// What the round under the pointer was, as [name, value, colour] lines.
function describeRow(store, i, layers) {
  const r = store.rows;
  const place = store.segments.get(r.segment[i]);
  const rounds = r.count[i] > 1 ? `mean of rounds ${whole(r.step[i])} to ${whole(r.step[i] + r.count[i] - 1)}` : `round ${whole(r.step[i])}`;
  const block = place?.block == null ? "" : `, block ${place.block}`;
  const lines = [[rounds, ""], [place ? `${place.cell} ${place.config}${block}` : "", ""]];
  for (const layer of [...layers].reverse()) lines.push([layer.label, `${quantity(store.part(layer.key, i))} ms`, layer]);
  lines.push(["total (measured)", `${quantity(store.total(i))} ms`], ["KV share of verify", percent(store.kvShare(i))]);
  lines.push(["tokens per row", quantity(r.tokens_per_row[i])], ["context", `${whole(r.context_tokens[i])} tokens`]);
  if (r.flags[i] & FLAG_FLOOR_ABOVE) lines.push(["KV floor above measured attention: floor clipped here", ""]);
  if (r.flags[i] & FLAG_BUSY) lines.push(["machine busy", ""]);
  return lines;
}
