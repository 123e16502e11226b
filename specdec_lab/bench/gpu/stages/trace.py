"""`trace`: a run of the shipped pair, recorded for replay where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ....engine.loop import Engine, OpenSession
from ....engine.models.loading import load
from ....records import SpecConfig
from ....stream import record
from ....summary import summarize
from ....trace import read_run, write_run
from ....workload import held_out
from ..attempts import one_by_one
from ..context import Context
from ..ledger import PASS, RED, Row

CONFIGS = ("off", "self:4+60/chain3", "model:4+124/chain3")
FOLDER = "traces"
NEW_TOKENS = 48


def stage(context: Context) -> Iterator[Row]:
    """A trace per configuration, read back and compared."""
    engine, cell = Engine(load("demo", device=context.device.type)), context.sizes.trace_cell
    assert engine.pair.tokenizer is not None  # the shipped pair has one
    text = held_out("prose", cell, engine.pair.tokenizer, max_new_tokens=NEW_TOKENS, temperature=0.8, verifier="coupled")
    session, folder = engine.open(text), context.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for config in map(SpecConfig.parse, CONFIGS):
        context.checkpoint(str(config))
        yield from one_by_one(context, f"trace {config}", _trace(session, config, folder, str(cell)))


def _trace(session: OpenSession, config: SpecConfig, folder: Path, cell: str) -> Iterator[Row]:
    run = record(session.steps(config))
    name = f"{cell}-{str(config).replace('/', '-').replace(':', '-')}.jsonl.gz"
    path = write_run(run, folder / name, overwrite=True)
    same = read_run(path).run.steps == run.steps
    found = summarize(run)
    yield Row("trace", f"{FOLDER}/{name}", {
        "rounds": len(run.rounds), "tokens_per_s": found.tokens_per_s, "step_s": found.step_s.median,
        "mean_acceptance_length": found.mean_acceptance_length, "file_bytes": path.stat().st_size,
    }, PASS if same else RED, "reads back unchanged", labels=run.header.labels)  # fmt: skip
