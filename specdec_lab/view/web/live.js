// The page around the pictures: header, buttons, table, log; and when to draw.

const choices = new WeakMap(); // model -> what the reader chose; survives a view that is drawn again
const LAYERS = { families: FAMILIES, phases: PHASES };
const SPANS = [["100", "last 100"], ["400", "last 400"], ["0", "whole run"]];

function make(tag, className, parent, words) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (words !== undefined) element.textContent = words;
  parent?.append(element);
  return element;
}

function makeChoice(parent, name, options, value, onChange) {
  const box = make("label", "sd-choice", parent, `${name} `);
  const select = make("select", "", box);
  for (const [key, words] of options) make("option", "", select, words).value = key;
  select.value = value;
  select.addEventListener("change", () => onChange(select.value));
}

function makeFigure(parent, title, height) {
  const figure = make("figure", "sd-figure", parent);
  const caption = make("figcaption", "sd-caption", figure);
  make("span", "sd-figure-title", caption, title);
  const box = make("div", "sd-canvas", figure);
  const canvas = make("canvas", "", box);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${title}: no data yet`);
  return { figure, caption, box, canvas, height };
}

function swatch(parent, layer) {
  const item = make("span", "sd-key", parent);
  const square = make("i", layer.modelled ? "sd-swatch sd-hatch" : "sd-swatch", item);
  square.style.setProperty("--sd-colour", layer.colour);
  item.append(layer.label);
  item.title = layer.meaning;
}

class LiveView {
  constructor(model, el) {
    this.model = model;
    this.store = new Store();
    this.choice = choices.get(model) ?? { span: 400, layers: "families", pinned: null };
    choices.set(model, this.choice);
    this.hover = null;
    this.isDirty = true;
    this.isVisible = true;
    this.drawnAt = 0;
    this.spokenAt = -Infinity;
    this.leaving = new AbortController();
    this.build(el);
    this.listen();
    this.receive(() => this.store.takeSnapshot(model.get("snapshot")));
  }

  build(el) {
    const root = (this.root = make("section", "specdec", el));
    root.setAttribute("aria-label", "speculative decoding, live");
    const head = make("header", "sd-head", root);
    this.title = make("strong", "sd-title", head);
    this.state = make("span", "sd-state", head);
    this.state.setAttribute("aria-live", "polite");
    this.chips = make("span", "sd-chips", head);
    const buttons = make("span", "sd-buttons", head);
    this.pause = make("button", "sd-button", buttons, "Pause");
    this.stop = make("button", "sd-button sd-stop", buttons, "Stop");
    for (const button of [this.pause, this.stop]) button.type = "button";
    this.place = make("p", "sd-place", root);
    this.tiles = make("div", "sd-tiles", root);
    this.hint = make("p", "sd-hint", root);
    this.buildStrips(root);
    const lower = make("div", "sd-lower", root);
    this.acceptance = makeFigure(lower, "Acceptance per draft position", ACCEPT_HEIGHT);
    this.acceptanceOf = make("span", "sd-of", this.acceptance.caption);
    this.buildTable(lower);
    this.about = make("details", "sd-about", root);
    make("summary", "", this.about, "Machine, back end, log");
    this.aboutText = make("pre", "", this.about);
  }

  buildStrips(root) {
    this.time = makeFigure(root, "Time per round, measured", TIME_HEIGHT);
    this.legend = make("span", "sd-legend", this.time.caption);
    const tools = make("span", "sd-tools", this.time.caption);
    makeChoice(tools, "Rounds", SPANS, String(this.choice.span), (value) => this.choose("span", Number(value)));
    makeChoice(tools, "Parts", [["families", "4 families"], ["phases", "all phases"]], this.choice.layers, (value) => this.choose("layers", value));
    this.share = makeFigure(root, "KV share of verify and tokens per row", LANES_HEIGHT);
    const keys = make("span", "sd-legend", this.share.caption);
    swatch(keys, { ...FAMILIES[0], label: "KV floor (modelled) / measured verify time" });
    make("span", "sd-key", keys, "━ tokens emitted per row, mean of 15 rounds; dots: single rounds");
    this.tip = make("div", "sd-tip", this.time.box);
    this.tip.hidden = true;
  }

  buildTable(parent) {
    const box = make("div", "sd-table-box", parent);
    const table = make("table", "sd-table", box);
    make("caption", "", table, "Against plain decoding, cell by cell");
    const row = make("tr", "", make("thead", "", table));
    for (const [words, meaning] of TABLE_HEAD) {
      const cell = make("th", "", row, words);
      cell.scope = "col";
      cell.title = meaning;
    }
    this.tableBody = make("tbody", "", table);
  }

  listen() {
    const { signal } = this.leaving;
    this.onMessage = (message, buffers) => {
      if (message.k === "d") this.receive(() => this.store.takeDelta(message, buffers[0]));
    };
    this.onSnapshot = () => this.receive(() => this.store.takeSnapshot(this.model.get("snapshot")));
    this.model.on("msg:custom", this.onMessage);
    this.model.on("change:snapshot", this.onSnapshot);
    this.stop.addEventListener("click", () => this.command("stop"), { signal });
    this.pause.addEventListener("click", () => this.command(this.store.meta.state === "paused" ? "resume" : "pause"), { signal });
    for (const { canvas } of [this.time, this.share]) {
      canvas.addEventListener("pointermove", (event) => this.point(event.offsetX), { signal });
      canvas.addEventListener("pointerleave", () => this.point(null), { signal });
    }
    this.watchPage(signal);
  }

  // Size, visibility and theme: JupyterLab marks its theme on the body, then loads the style sheet.
  watchPage(signal) {
    this.resizes = new ResizeObserver(() => this.touch());
    this.resizes.observe(this.root);
    this.visibility = new IntersectionObserver((changes) => {
      this.isVisible = changes[changes.length - 1].isIntersecting; // several may come at once: the last one holds
      this.touch(false);
    });
    this.visibility.observe(this.root);
    this.themes = new MutationObserver(() => this.touch());
    this.themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name", "class"] });
    document.addEventListener("load", (event) => event.target.tagName === "LINK" && this.touch(), { capture: true, signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.touch(), { signal });
    this.isCalm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  }

  close() {
    this.leaving.abort();
    for (const observer of [this.resizes, this.visibility, this.themes]) observer.disconnect();
    this.model.off("msg:custom", this.onMessage);
    this.model.off("change:snapshot", this.onSnapshot);
    cancelAnimationFrame(this.frame);
    clearTimeout(this.retryTimer);
    clearTimeout(this.hintTimer);
    this.root.remove();
  }

  receive(take) {
    take();
    const { seq, gaps, isStale, meta } = this.store;
    Object.assign(this.root.dataset, { seq, gaps, stale: isStale, state: meta.state ?? "", steps: meta.steps ?? 0 });
    this.touch();
  }

  command(word) {
    this.model.send({ do: word });
    clearTimeout(this.hintTimer);
    const before = this.store.meta.state;
    this.hintTimer = setTimeout(() => {
      if (this.store.meta.state !== before) return;
      this.hint.textContent = "The kernel has not answered yet: a busy cell can hold buttons up. %specdec stop, .stop() or an interrupt of that cell work too.";
    }, 1500);
  }

  choose(name, value) {
    this.choice[name] = value;
    this.touch();
  }

  point(x) {
    this.hover = x;
    this.touch();
  }

  touch(isChanged = true) {
    this.isDirty ||= isChanged;
    if (!this.isDirty || !this.isVisible || this.frame || this.leaving.signal.aborted) return;
    const wait = this.isCalm ? this.drawnAt + 500 - performance.now() : 0;
    if (wait > 0) return this.retry(wait);
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      if (!this.root.clientWidth) return this.retry(); // hidden for a moment, too short for an observer to tell
      this.isDirty = false;
      this.drawnAt = performance.now();
      this.draw();
    });
  }

  retry(wait = 200) {
    clearTimeout(this.retryTimer);
    this.retryTimer = setTimeout(() => this.touch(), wait);
  }

  draw() {
    const theme = readTheme(this.root);
    this.root.dataset.theme = theme.isDark ? "dark" : "light";
    this.drawWords();
    const view = { span: this.choice.span, layers: LAYERS[this.choice.layers], waiting: this.waitingWords() };
    this.legend.replaceChildren();
    view.layers.forEach((layer) => swatch(this.legend, layer));
    const time = prepare(this.time.canvas, TIME_HEIGHT);
    const drawn = drawTimeStrip(time, this.store, view, theme);
    const share = prepare(this.share.canvas, LANES_HEIGHT);
    this.share.figure.hidden = !drawn;
    if (drawn) drawLanes(share, this.store, view, theme);
    this.drawHover(drawn, time, share, view, theme);
    const row = this.focused();
    this.acceptanceOf.textContent = row?.pos.length ? `${row.cell} ${row.config}, ${whole(row.pos[0][1])} drafts, Wilson 95%` + alphaWords(row) : "";
    drawAcceptance(prepare(this.acceptance.canvas, ACCEPT_HEIGHT), row, theme);
    this.drawTable(row);
    this.speak(row);
  }

  waitingWords() {
    const { state, phase } = this.store.meta;
    if (["finished", "stopped", "failed"].includes(state)) return "no round was run";
    return phase === "prefill" ? "prompt is read; rounds follow" : "waiting for the first round";
  }

  // The configuration whose acceptance is shown: the pinned one, else the current, else the last one that drafted.
  focused() {
    const pinned = this.store.table.get(this.choice.pinned);
    const current = this.store.current();
    if (pinned) return pinned;
    if (current?.pos.length) this.lastDrafted = keyOf(current);
    return current?.pos.length ? current : (this.store.table.get(this.lastDrafted) ?? [...this.store.table.values()].find((row) => row.pos.length) ?? current);
  }

  drawWords() {
    const { meta } = this.store;
    this.title.textContent = meta.title ?? "";
    if (this.state.textContent !== STATE_WORDS[meta.state]) this.state.textContent = STATE_WORDS[meta.state] ?? "";
    this.state.dataset.state = meta.state;
    const chips = this.chipWords();
    if (this.chips.dataset.words !== chips.join()) {
      this.chips.dataset.words = chips.join();
      this.chips.replaceChildren(...chips.map((words) => make("span", "sd-chip", null, words)));
    }
    const isAlive = ["new", "running", "paused"].includes(meta.state);
    this.stop.disabled = this.pause.disabled = !isAlive;
    this.pause.textContent = meta.state === "paused" ? "Resume" : "Pause";
    this.place.replaceChildren(...placeWords(meta));
    this.place.hidden = !meta.cell;
    this.tiles.replaceChildren(...tilesOf(this.store).map(tile));
    if (meta.state !== this.hintState) this.hint.textContent = "";
    this.hintState = meta.state;
    if (meta.error) this.hint.textContent = meta.error;
    this.hint.hidden = !this.hint.textContent;
    this.hint.classList.toggle("sd-error", Boolean(meta.error));
    if (this.about.open || !this.aboutText.textContent) this.aboutText.textContent = aboutWords(meta);
  }

  // What must be known before a number is read: labels of the run, a lost message, a busy machine.
  chipWords() {
    const { meta, isStale } = this.store;
    const chips = [...(meta.labels ?? [])];
    const busy = this.store.busyShare(this.choice.span);
    if (busy > 0.1) chips.push(`machine busy in ${percent(busy)} of these rounds`);
    if (isStale) chips.push("message lost: waiting for the next keyframe");
    if (meta.dropped) chips.push(`${whole(meta.dropped)} rounds not drawn`);
    return chips;
  }

  drawHover(drawn, time, share, view, theme) {
    const isInside = drawn && this.hover !== null && this.hover >= drawn.axes.left && this.hover <= drawn.axes.right;
    const i = isInside ? this.store.rowAt(drawn.axes.round(this.hover), drawn.range) : -1;
    this.tip.hidden = i < 0;
    if (i < 0) return;
    drawCursor(time.ctx, this.hover, BAND, drawn.axes.bottom, theme);
    drawCursor(share.ctx, this.hover, LANES.share[0], LANES.tokens[1], theme);
    this.tip.replaceChildren();
    for (const [name, value, layer] of describeRow(this.store, i, view.layers)) {
      const item = make("div", "sd-tip-line", this.tip);
      if (layer) swatch(item, { ...layer, label: name });
      else make("span", "", item, name);
      make("b", "", item, value);
    }
    const isRight = this.hover > time.width / 2;
    this.tip.style.left = isRight ? "" : `${this.hover + 14}px`;
    this.tip.style.right = isRight ? `${time.width - this.hover + 14}px` : "";
  }

  drawTable(focused) {
    const { store } = this;
    const rows = [...store.table.values()];
    const content = JSON.stringify([rows, focused && keyOf(focused), keyOf(store.meta)]);
    if (content === this.tableContent) return;
    this.tableContent = content;
    const active = document.activeElement?.dataset?.key;
    this.tableBody.replaceChildren(...rows.map((row, i) => this.tableRow(row, rows[i - 1], rows, focused)));
    if (!rows.length) make("td", "sd-none", make("tr", "", this.tableBody), "nothing measured yet").colSpan = TABLE_HEAD.length;
    if (active) this.tableBody.querySelector(`[data-key="${CSS.escape(active)}"]`)?.focus();
  }

  tableRow(row, above, rows, focused) {
    const key = keyOf(row);
    const peers = rows.filter((other) => other.cell === row.cell && other.workload === row.workload);
    const isFirst = !above || above.cell !== row.cell || above.workload !== row.workload;
    const line = make("tr", isFirst && above ? "sd-new-cell" : "");
    if (key === keyOf(this.store.meta) && this.store.meta.state === "running") line.setAttribute("aria-current", "true");
    const speedup = speedupOf(this.store, row);
    make("td", isFirst ? "" : "sd-repeated", line, row.cell);
    this.fillConfig(make("td", "", line), row, key, focused, ownLabels(row, rows).join(", "));
    make("td", "sd-number", line, quantity(row.tps));
    make("td", speedup.verdict ? `sd-${speedup.verdict}` : "", line, speedupWords(row, speedup)).title = speedup.title;
    make("td", "sd-number", line, row.length.toFixed(2));
    fillBar(make("td", "sd-bar-cell", line), row, Math.max(...peers.map((other) => other.ms)));
    make("td", "sd-number", line, kvShareOfAttention(row));
    return line;
  }

  fillConfig(cell, row, key, focused, note) {
    const button = make("button", "sd-pin", cell, row.config);
    const drafts = row.pos.length > 0;
    button.type = "button";
    button.dataset.key = key;
    button.disabled = !drafts;
    button.title = drafts ? "show its acceptance" : "";
    button.setAttribute("aria-pressed", String(Boolean(drafts && focused && keyOf(focused) === key)));
    button.addEventListener("click", () => this.choose("pinned", this.choice.pinned === key ? null : key));
    if (note) make("small", "sd-note", cell, note);
  }

  // For screen readers, at most every five seconds: a sentence per picture.
  speak(row) {
    if (performance.now() - this.spokenAt < 5000) return;
    this.spokenAt = performance.now();
    const { store } = this;
    const last = store.size - 1;
    if (last < 0) return;
    const place = `${store.meta.cell} ${store.meta.config}`;
    const parts = FAMILIES.map((f) => `${f.label} ${quantity(store.part(f.key, last))} ms`).join(", ");
    this.time.canvas.setAttribute("aria-label", `Time per round, ${place}: last round ${quantity(store.total(last))} ms, of it ${parts}`);
    this.share.canvas.setAttribute("aria-label", `KV floor is ${percent(store.kvShare(last))} of the verify forward, ${quantity(store.rows.tokens_per_row[last])} tokens per row in the last round`);
    const rates = (row?.pos ?? []).map(([k, n]) => percent(k / n)).join(", ");
    this.acceptance.canvas.setAttribute("aria-label", rates ? `Acceptance per draft position, ${row.cell} ${row.config}: ${rates}` : "No draft yet");
  }
}

function fillBar(cell, row, longest) {
  const track = make("span", "sd-bar", cell);
  barParts(row).forEach((ms, i) => {
    const piece = make("i", FAMILIES[i].modelled ? "sd-hatch" : "", track);
    piece.style.setProperty("--sd-colour", FAMILIES[i].colour);
    piece.style.width = `${(100 * Math.max(0, ms)) / (longest || 1)}%`;
    piece.title = `${FAMILIES[i].label}: ${quantity(ms)} ms`;
  });
  make("span", "sd-bar-words", cell, `${quantity(row.ms)} ms`);
}

export default {
  render({ model, el }) {
    const view = new LiveView(model, el);
    return () => view.close();
  },
};
