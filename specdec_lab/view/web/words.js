// Small texts of the page, made from what the kernel sent.

const STATE_WORDS = {
  new: "not started", running: "running", paused: "paused", stopping: "stopping", finished: "finished",
  stopped: "stopped, all data kept", failed: "failed",
};

function alphaWords(row) {
  return row.alpha == null ? "" : `; line: every position at ${row.alpha.toFixed(2)} (fitted)`;
}

function speedupWords(row, { ratio, rest }) {
  return row.config === "off" ? rest : `${ratio} ${rest}`.trim();
}

function tile([value, name, meaning]) {
  const box = make("div", "sd-tile");
  box.title = meaning;
  make("b", "", box, value);
  make("span", "", box, name);
  return box;
}

function placeWords(meta) {
  const parts = [
    ["cell", meta.cell], ["config", meta.config], ["block", meta.block ?? undefined], ["back end", meta.backend],
    ["round", whole(meta.steps ?? 0)], ["context", `${whole(meta.context ?? 0)} tokens`], ["elapsed", duration(meta.elapsed ?? 0)],
    ["policy", meta.event || undefined],
  ];
  return parts.filter(([, value]) => value !== undefined).map(([name, value]) => {
    const item = make("span", "sd-fact", null, `${name} `);
    make("b", "", item, String(value));
    return item;
  });
}

function aboutWords(meta) {
  const bandwidth = meta.read_bytes_per_s ? `${quantity(meta.read_bytes_per_s / 1e9)} GB/s (measured at start)` : "not calibrated";
  const refused = Object.entries(meta.refused ?? {}).map(([name, why]) => `  passed over ${name}: ${why}`);
  const log = (meta.log ?? []).map(([at, words]) => `  ${duration(at)}  ${words}`);
  return [
    `device        ${meta.device ?? ""}`, `target        ${meta.target ?? ""}`, `workload      ${meta.workload ?? ""}`,
    `back end      ${meta.backend ?? ""}`, ...refused, `read ceiling  ${bandwidth}`,
    `instrumented  ${meta.instrumented ? "yes" : "no"}`, `runs ended    ${meta.runs ?? 0}`, ...log,
  ].join("\n");
}
