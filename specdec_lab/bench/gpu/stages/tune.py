"""`tune`: a short tuning run of the shipped pair, whose acceptance is real, into the same database."""

from __future__ import annotations

from collections.abc import Iterator

from ....engine.loop import Engine
from ....engine.models.loading import load
from ....workload import Sampling
from ...tuning import prepare
from ..context import Context
from ..ledger import Row

SHARE = 0.8  # of the stage's time; loading and the policy take the rest
MODEL = "demo"


def stage(context: Context) -> Iterator[Row]:
    """A row per cell of the policy."""
    engine = Engine(load(MODEL, device=context.device.type))
    sizes, database = context.sizes, context.folder.parent
    tuning = prepare(
        engine, sizes.tune_batches, sizes.tune_lengths, min(SHARE * context.left_s, sizes.tune_s), workload="prose",
        database=database, run_dir=context.folder / "runs" / f"tune-{context.ledger.run}",
        sampling=Sampling(temperature=0.8, verifier="coupled"),
    )  # fmt: skip
    policy = tuning.run(stop=lambda: context.left_s <= 0)
    for row in policy.table:
        yield Row("policy", f"{engine.pair.target.name} {row.cell}", {"speedup": row.speedup, "config": str(row.config)},
                  labels=tuple(policy.header["labels"]), reason="" if row.is_decided else "not decided")
    yield Row("database", str(tuning.database.folder.name), {"measurements": len(tuning.database)},
              reason=f"attention by {engine.backend.name}")
