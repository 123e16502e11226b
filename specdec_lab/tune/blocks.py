"""A block: plain decoding and a candidate, interleaved in time, from the same prompts; measured, checked, recorded.

The statistic of a run is tokens_per_s = tokens emitted over wall time, in the rounds in which every row is live and none
is cut; equal to batch x tokens per row and round / mean round time. A block pools two runs of each side, and only the
logarithm of their ratio is compared between configurations. Every run replays the same text, so the spread over blocks
knows nothing of other texts: `tokens_per_round.sd` and `.count` (of the longest run) carry that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import Cell, SpecConfig, StepRecord, UnsupportedConfig
from ..summary import acceptance
from .grid import Protocol

Measure = Callable[[Cell, SpecConfig], Iterator[StepRecord]]
Clock = Callable[[], float]
OFF = SpecConfig.off()
MIN_SCORED = 2  # rounds; a run with fewer says nothing
BUSY_SHARE = 0.5  # of the rounds of a block that may be flagged busy


@dataclass(frozen=True, slots=True)
class RunSample:
    """One run: its scored rounds, and all tokens it emitted per row, warm-up included."""

    config: str
    scored: tuple[StepRecord, ...]
    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """Two runs of plain decoding and two of a candidate, in `order` (A plain, B candidate)."""

    order: str
    plain: tuple[RunSample, RunSample]
    candidate: tuple[RunSample, RunSample]

    @classmethod
    def of(cls, order: str, runs: Sequence[RunSample]) -> Block:
        """From runs in this order."""
        a, b = (run for side, run in zip(order, runs, strict=True) if side == "A")
        c, d = (run for side, run in zip(order, runs, strict=True) if side == "B")
        return cls(order, (a, b), (c, d))

    @property
    def runs(self) -> tuple[RunSample, ...]:
        """All four."""
        return (*self.plain, *self.candidate)

    @property
    def is_busy(self) -> bool:
        """Whether another process disturbed most of it."""
        flags = ["busy" in step.flags for run in self.runs for step in run.scored]
        return sum(flags) > BUSY_SHARE * len(flags)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the engine says about these numbers."""
        return tuple(dict.fromkeys(label for run in self.runs for label in run.labels))


def order_of(index: int) -> str:
    """Even blocks start and end with plain decoding, odd ones with the candidate."""
    return "BAAB" if index % 2 else "ABBA"


def sides(order: str, config: SpecConfig) -> tuple[SpecConfig, ...]:
    """What runs in a block of this order."""
    return tuple(OFF if side == "A" else config for side in order)


def run_once(measure: Measure, cell: Cell, config: SpecConfig, seconds: float, protocol: Protocol, clock: Clock) -> RunSample:
    """Run `config` from the prompt for about `seconds` of scored rounds, at least `min_rounds`, and close the stream."""
    steps = measure(cell, config)
    try:
        scored, tokens = _collect(steps, cell.batch, seconds, protocol, clock)
    finally:
        close = getattr(steps, "close", None)
        if close is not None:
            close()
    if len(scored) < MIN_SCORED:
        raise UnsupportedConfig(
            f"{config} in {cell} ended after {len(scored)} rounds in which all rows were live; {MIN_SCORED} are needed beyond "
            f"the {protocol.warmup_rounds} of warm-up. Give the workload more new tokens, or do not stop at the end of text"
        )
    return RunSample(str(config), tuple(scored), tokens, tuple(getattr(getattr(steps, "header", None), "labels", ())))


def _collect(
    steps: Iterator[StepRecord], batch: int, seconds: float, protocol: Protocol, clock: Clock
) -> tuple[list[StepRecord], tuple[tuple[int, ...], ...]]:
    scored: list[StepRecord] = []
    tokens: list[list[int]] = [[] for _ in range(batch)]
    rounds, started = 0, clock()
    for step in steps:
        if step.kind != "round":
            started = clock()
            continue
        rounds += 1
        for row, emitted in zip(tokens, step.tokens, strict=True):
            row.extend(emitted)
        if rounds <= protocol.warmup_rounds:
            started = clock()
            continue
        if not all(step.live) or any(step.censored):
            break
        scored.append(step)
        if len(scored) >= protocol.min_rounds and clock() - started >= seconds:
            break
    return scored, tuple(map(tuple, tokens))


def first_difference(plain: Sequence[RunSample], candidate: Sequence[RunSample]) -> str | None:
    """Where greedy tokens of the candidate leave those of plain decoding, over the common prefix; None if nowhere."""
    for ours in candidate:
        for theirs in plain:
            for row, (mine, right) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
                for place, (got, expected) in enumerate(zip(mine, right, strict=False)):
                    if got != expected:
                        return f"row {row} emits token {got} at new token {place}, plain decoding {expected}"
    return None


def tokens_per_s(runs: Sequence[RunSample]) -> float:
    """The block statistic of one side."""
    rounds = [step for run in runs for step in run.scored]
    return sum(step.num_emitted for step in rounds) / sum(step.wall_s for step in rounds)


def log_speedup(block: Block) -> tuple[float, float]:
    """Log ratio of a block, and its standard error from the spread of the round times alone."""
    value = math.log(tokens_per_s(block.candidate) / tokens_per_s(block.plain))
    return value, math.sqrt(sum(_relative_variance(side) for side in (block.plain, block.candidate)))


def _relative_variance(runs: Sequence[RunSample]) -> float:
    walls = np.asarray([step.wall_s for run in runs for step in run.scored])
    return float(walls.var(ddof=1) / len(walls) / walls.mean() ** 2)


def summarize_runs(runs: Sequence[RunSample]) -> dict[str, Any]:
    """The `summary` of a record: round time, acceptance, tokens per round and second, parts."""
    rounds = [step for run in runs for step in run.scored]
    counts = acceptance(rounds)
    return {
        "step_s": _spread([step.wall_s for step in rounds]),
        "num_rounds": len(rounds),
        "num_spec_steps": counts.num_spec_steps,
        "acceptance_histogram": list(counts.histogram),
        "drafted_at": list(counts.drafted_at),
        "mean_acceptance_length": counts.mean_acceptance_length,
        "tokens_per_round": _yields(runs),
        "tokens_per_s": tokens_per_s(runs),
        "draft_s": _mean([step.draft_s for step in rounds]),
        "verify_s": _mean([step.verify_s for step in rounds]),
        "kv_read_bytes": _mean([step.kv_read_bytes + step.draft_kv_read_bytes for step in rounds]),
    }


def _yields(runs: Sequence[RunSample]) -> dict[str, float]:
    """Tokens per row and round: mean over all runs, spread and count of the longest one (the others repeat its text)."""
    longest = max(runs, key=lambda run: len(run.scored))
    lengths = np.asarray([len(row) for step in longest.scored for row in step.tokens])
    everything = [len(row) for run in runs for step in run.scored for row in step.tokens]
    sd = float(lengths.std(ddof=1)) if len(lengths) > 1 else 0.0
    return {"mean": _mean(everything), "sd": sd, "count": len(lengths)}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _spread(walls: Sequence[float]) -> dict[str, Any]:
    p05, p50, p95 = (float(value) for value in np.percentile(walls, (5, 50, 95)))
    sd = float(np.std(walls, ddof=1))
    return {"p05": p05, "p50": p50, "p95": p95, "mean": _mean(walls), "sd": sd, "clock": "wall_s"}
