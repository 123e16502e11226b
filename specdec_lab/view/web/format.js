// Words, numbers, colours and axes of the live view. No piece of this front end imports another: they are joined
// into one script, in the order format, store, strips, bars, words, live.

const FAMILIES = [
  { key: "kv", label: "KV floor (modelled)", colour: "#CC3311", modelled: true, meaning: "KV bytes read by verify / measured read bandwidth" },
  { key: "compute", label: "compute", colour: "#0077BB", meaning: "verify: linear layers, and attention beyond the KV floor" },
  { key: "draft", label: "draft", colour: "#E69F00", meaning: "all of drafting" },
  { key: "other", label: "other", colour: "#8A8A8A", meaning: "commit (append + compact), sampling + accept, host gap" },
];
const AMBER_OUTLINE = "#8A5F00"; // amber alone has too little contrast on white

// The measured parts one by one; the four families are sums of these.
const PHASES = [
  FAMILIES[0],
  { key: "rest", label: "attention beyond the floor", colour: "#66AFD9", meaning: "measured attention of verify, less the KV floor" },
  { key: "linear", label: "linear", colour: "#0077BB", meaning: "linear layers, norms and head of verify" },
  FAMILIES[2],
  { key: "commit", label: "commit", colour: "#5F5F5F", meaning: "append and compact the KV cache" },
  { key: "accept", label: "sampling + accept", colour: "#A6A6A6", meaning: "sampling and acceptance" },
  { key: "host", label: "host", colour: "#D2D2D2", meaning: "time between the phases" },
];

// Three significant digits without an exponent: 4,178  312  41.2  0.0312.
function quantity(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en-US", { minimumFractionDigits: Math.min(digits, 6), maximumFractionDigits: Math.min(digits, 6) });
}

const whole = (value) => Math.round(value).toLocaleString("en-US");
const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%` : "–");

function duration(seconds) {
  const s = Math.floor(seconds);
  return s < 60 ? `${s} s` : `${Math.floor(s / 60)} min ${s % 60} s`;
}

// Round values from `low` up to `high`, roughly `about` of them.
function ticks(low, high, about, isWhole = false) {
  const raw = (high - low) / about;
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= 0.8 * raw);
  if (isWhole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step + 0);
  return found;
}

// One number of digits for a whole axis.
function tickWords(values) {
  const areWhole = (d) => values.every((value) => Math.abs(value * 10 ** d - Math.round(value * 10 ** d)) < 1e-6);
  const digits = [0, 1, 2, 3, 4, 5].find(areWhole) ?? 6;
  return values.map((value) => value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
}

function percentile(values, share) {
  const sorted = Float64Array.from(values).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
}

// 95% interval of a proportion (Wilson 1927).
function wilson(successes, trials) {
  if (!trials) return [0, 1];
  const z2 = 1.959964 ** 2 / trials;
  const rate = successes / trials;
  const half = 1.959964 * Math.sqrt((rate * (1 - rate)) / trials + z2 / (4 * trials));
  return [Math.max(0, (rate + z2 / 2 - half) / (1 + z2)), Math.min(1, (rate + z2 / 2 + half) / (1 + z2))];
}

// Ink and darkness of the page as it is now; the page decides, we follow.
function readTheme(element) {
  const ink = getComputedStyle(element).color;
  const [r, g, b] = (ink.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number);
  const isDark = 0.2126 * r + 0.7152 * g + 0.0722 * b > 140;
  const faded = (alpha) => `rgba(${r}, ${g}, ${b}, ${alpha})`;
  return { ink, isDark, soft: faded(0.72), grid: faded(0.16), band: faded(0.09), font: getComputedStyle(element).fontFamily };
}

// Hatching in exact colours: every device pixel is either the full colour or its tint.
function hatch(ctx, colour, isDark) {
  const size = 8;
  const tile = document.createElement("canvas");
  tile.width = tile.height = size;
  const pen = tile.getContext("2d");
  pen.globalAlpha = isDark ? 0.3 : 0.22;
  pen.fillStyle = colour;
  pen.fillRect(0, 0, size, size);
  pen.globalAlpha = 1;
  for (let x = 0; x < size; x++) for (let y = 0; y < size; y++) if ((x + y) % size < 4) pen.fillRect(x, y, 1, 1);
  return ctx.createPattern(tile, "repeat");
}

// A canvas as wide as its box, sharp on any screen; returns a context in CSS pixels.
function prepare(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(200, canvas.parentElement.clientWidth);
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`; // its own width until it is drawn anew: a stretched picture lies
    canvas.style.height = `${height}px`;
  }
  const ctx = canvas.getContext("2d", { willReadFrequently: true });
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  return { ctx, width, height };
}

function label(ctx, words, x, y, { align = "left", colour, font = 12, family, bold = false } = {}) {
  ctx.font = `${bold ? "600 " : ""}${font}px ${family || "sans-serif"}`;
  ctx.fillStyle = colour;
  ctx.textAlign = align;
  ctx.textBaseline = "middle";
  ctx.fillText(words, x, y);
}

// `words` cut to `room` pixels in the context's present font; empty when hardly anything would be left.
function fitted(ctx, words, room) {
  if (ctx.measureText(words).width <= room) return words;
  let cut = words;
  while (cut.length > 3 && ctx.measureText(`${cut}…`).width > room) cut = cut.slice(0, -1);
  return cut.length > 3 ? `${cut}…` : "";
}

function line(ctx, colour, width, dash, points) {
  ctx.save();
  ctx.strokeStyle = colour;
  ctx.lineWidth = width;
  ctx.setLineDash(dash);
  ctx.beginPath();
  points.forEach(([x, y], i) => (i ? ctx.lineTo(x, y) : ctx.moveTo(x, y)));
  ctx.stroke();
  ctx.restore();
}
