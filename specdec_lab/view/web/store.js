// What has been received: rows in typed columns, and the words around them. A missing packet is noticed by its sequence
// number; the next keyframe replaces everything, so nothing has to be asked for.

const ROW_COLUMNS = [
  "step", "count", "segment", "draft_ms", "linear_ms", "attention_ms", "commit_ms", "accept_ms", "host_ms",
  "kv_floor_ms", "context_tokens", "tokens_per_row", "flags",
];
const FLAG_FLOOR_ABOVE = 1;
const FLAG_BUSY = 2;
const CAPACITY = 4096;

class Store {
  constructor() {
    this.rows = Object.fromEntries(ROW_COLUMNS.map((name) => [name, new Float32Array(CAPACITY)]));
    this.size = 0;
    this.seq = 0;
    this.gaps = 0;
    this.isStale = false;
    this.segments = new Map();
    this.table = new Map();
    this.meta = {};
  }

  // A keyframe as bytes: length of the head, head, rows.
  takeSnapshot(view) {
    if (!view || view.byteLength < 4) return;
    const bytes = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    const end = 4 + new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, end)));
    if (head.seq <= this.seq) return;
    if (head.columns.join() !== ROW_COLUMNS.join()) throw new Error(`specdec: kernel and page disagree on columns: ${head.columns}`);
    this.size = 0;
    this.segments.clear();
    this.table.clear();
    this.take(head, bytes.slice(end), false);
  }

  takeDelta(head, view) {
    if (head.seq <= this.seq) return;
    const isMissing = head.seq !== this.seq + 1;
    this.gaps += isMissing;
    this.take(head, new Uint8Array(view.buffer, view.byteOffset, view.byteLength).slice(), this.isStale || isMissing);
  }

  take(head, bytes, isStale) {
    this.seq = head.seq;
    this.isStale = isStale;
    for (const [number, cell, config, block, prefillMs] of head.segs) this.segments.set(number, { cell, config, block, prefillMs });
    for (const row of head.table ?? []) this.table.set(keyOf(row), row);
    if (head.meta) this.meta = { ...this.meta, ...head.meta };
    if (head.n) this.append(new Float32Array(bytes.buffer), head.n);
  }

  append(values, count) {
    if (this.size + count > CAPACITY) this.forget(this.size + count - CAPACITY + CAPACITY / 4);
    ROW_COLUMNS.forEach((name, c) => this.rows[name].set(values.subarray(c * count, (c + 1) * count), this.size));
    this.size += count;
  }

  forget(count) {
    for (const column of Object.values(this.rows)) column.copyWithin(0, count, this.size);
    this.size -= count;
  }

  total(i) {
    const r = this.rows;
    return r.draft_ms[i] + r.linear_ms[i] + r.attention_ms[i] + r.commit_ms[i] + r.accept_ms[i] + r.host_ms[i];
  }

  floor(i) {
    return Math.min(this.rows.kv_floor_ms[i], this.rows.attention_ms[i]);
  }

  kvShare(i) {
    const verify = this.rows.linear_ms[i] + this.rows.attention_ms[i];
    return verify ? this.floor(i) / verify : 0;
  }

  // One layer of the stack, in ms.
  part(key, i) {
    const r = this.rows;
    switch (key) {
      case "kv": return this.floor(i);
      case "compute": return r.linear_ms[i] + r.attention_ms[i] - this.floor(i);
      case "rest": return r.attention_ms[i] - this.floor(i);
      case "other": return r.commit_ms[i] + r.accept_ms[i] + r.host_ms[i];
      default: return r[`${key}_ms`][i];
    }
  }

  // The rows of the last `span` rounds (all when span is 0) and the range of rounds they are drawn over.
  visible(span) {
    const { step, count } = this.rows;
    if (!this.size) return null;
    const end = step[this.size - 1] + count[this.size - 1];
    const begin = span ? Math.max(step[0], end - span) : step[0];
    let first = this.size - 1;
    while (first > 0 && step[first - 1] + count[first - 1] > begin) first--;
    return { first, last: this.size - 1, begin, end: Math.max(end, begin + 40) };
  }

  // Share of the rows in view in which the machine was busy with something else.
  busyShare(span) {
    const range = this.visible(span);
    if (!range) return 0;
    const flags = this.rows.flags.subarray(range.first, range.last + 1);
    return flags.reduce((n, flag) => n + (flag & FLAG_BUSY ? 1 : 0), 0) / flags.length;
  }

  rowAt(round, range) {
    for (let i = range.first; i <= range.last; i++) {
      if (round >= this.rows.step[i] && round < this.rows.step[i] + this.rows.count[i]) return i;
    }
    return -1;
  }

  current() {
    return this.table.get(keyOf(this.meta));
  }

  plainOf(row) {
    return this.table.get(keyOf({ ...row, config: "off" }));
  }
}

function keyOf({ workload, cell, config }) {
  return `${workload}|${cell}|${config}`;
}
