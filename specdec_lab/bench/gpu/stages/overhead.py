"""`overhead`: the same rounds with and without instrumentation, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ....engine.models.loading import ModelPair
from ....records import RANDOM_WEIGHTS, Cell, SpecConfig
from ....workload import Workload
from ...overhead import overhead
from ..attempts import one_by_one
from ..context import Context
from ..ledger import Row, bar_verdict
from ..models import engine_for, random_text, tokens_for

MOST = {True: 1.01, False: 1.03}  # times a bare round, on a GPU and on a CPU


def stage(context: Context) -> Iterator[Row]:
    """A row for plain decoding and one for speculation."""
    sizes, model = context.sizes, context.sizes.models[0]
    pair = engine_for(context, model).pair
    configs = (SpecConfig.off(), sizes.config)
    new_tokens = max(tokens_for(config, sizes.overhead_rounds) for config in configs)

    def text(cell: Cell) -> Workload:
        return random_text(cell, new_tokens, pair.target.shape.vocab)

    for config in configs:
        what = f"{model.name} {sizes.overhead_cell} {config}"
        context.checkpoint(what)
        yield from one_by_one(context, what, _measured(context, pair, config, text))


def _measured(context: Context, pair: ModelPair, config: SpecConfig, text: Callable[[Cell], Workload]) -> Iterator[Row]:
    sizes, most = context.sizes, MOST[context.is_gpu]
    report = overhead(
        pair, sizes.overhead_cell, (config,), rounds=sizes.overhead_rounds, blocks=sizes.overhead_blocks, workload=text
    )
    for found in report.results:
        values = {
            "median_ratio": found.median_ratio, "mean_ratio": found.ratio.mean, "low": found.ratio.low,
            "high": found.ratio.high, "bare_step_s": found.step_s, "rounds": found.rounds, "blocks": found.ratio.num_blocks,
        }  # fmt: skip
        verdict = bar_verdict(-found.median_ratio, -most)
        what, bar = f"{context.sizes.models[0].name} {found.cell} {found.config}", f"at most {most:.2f} of a bare round"
        yield Row("overhead", what, values, verdict, bar, labels=(RANDOM_WEIGHTS,))
