"""How much faster, and how sure: the interval of a log speed-up over blocks, and which of several near-equals to take.

Two sources of error are added in quadrature: the spread over blocks (Student's t) and the text: a run sees few rounds,
and another text would have been accepted differently (standard deviation of tokens per round / sqrt(rounds)).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from ..records import SpecConfig
from ..summary import student_quantile
from .db import Measurement

CONFIDENCE = 0.95
Z = 1.96


@dataclass(frozen=True, slots=True)
class Verdict:
    """Mean log speed-up with its 95 % interval, blocks and row-rounds it rests on."""

    mean: float
    low: float
    high: float
    num_blocks: int
    num_row_rounds: int

    def exceeds(self, speedup: float) -> bool:
        """Whether even the lower end is above `speedup`."""
        return self.low > math.log(speedup)


def verdict(blocks: Sequence[Measurement]) -> Verdict | None:
    """The interval over blocks of one configuration; None with fewer than two, which say nothing about spread."""
    if len(blocks) < 2:
        return None
    values = [block.summary["log_speedup"] for block in blocks]
    mean = fmean(values)
    text, count = text_error(blocks)
    half = math.hypot(student_quantile(CONFIDENCE, len(values) - 1) * stdev(values) / math.sqrt(len(values)), Z * text)
    return Verdict(mean, mean - half, mean + half, len(values), count)


def text_error(blocks: Sequence[Measurement]) -> tuple[float, int]:
    """Relative standard error of tokens per round from the little text that was seen, and the rounds x rows seen.

    Blocks replay the same text, so the longest of them counts, not their sum.
    """
    longest = max((block.summary["tokens_per_round"] for block in blocks), key=lambda yields: yields["count"])
    return longest["sd"] / longest["mean"] / math.sqrt(longest["count"]), int(longest["count"])


def finalist(races: Mapping[SpecConfig, Sequence[Measurement]], winners: Collection[SpecConfig], tie: float) -> SpecConfig:
    """The best of a race, or a plainer one that the race cannot tell from it and that is at most `tie` slower.

    Plainer: sink of at least 4, smaller depth, a chain, a larger window, a configuration that already won elsewhere.
    Races that were cut short (less than half the blocks of the longest) are no evidence and do not compete.
    """
    most = max(map(len, races.values()))
    races = {config: blocks for config, blocks in races.items() if 2 * len(blocks) >= most}
    means = {config: fmean(b.summary["log_speedup"] for b in blocks) for config, blocks in races.items()}
    best = max(means, key=lambda config: (means[config], str(config)))
    floor = means[best] - math.log1p(tie)
    equals = [c for c in races if means[c] >= floor and _overlaps(races[c], races[best])]
    return min(equals, key=lambda config: (_plainness(config), config not in winners, -means[config], str(config)))


def _overlaps(ours: Sequence[Measurement], best: Sequence[Measurement]) -> bool:
    """Whether the difference of two means lies within its noise over blocks."""
    if ours is best:
        return True
    if min(len(ours), len(best)) < 2:
        return False
    a, b = ([block.summary["log_speedup"] for block in side] for side in (ours, best))
    half = student_quantile(CONFIDENCE, len(a) + len(b) - 2) * math.sqrt(stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b))
    return fmean(b) - fmean(a) <= half


def _plainness(config: SpecConfig) -> tuple[bool, int, bool, float]:
    """Sorts the plainer configuration first."""
    view = config.view
    short_sink = view is not None and view.kind == "window" and view.sink < 4
    window = math.inf if view is None or view.max_tokens is None else view.max_tokens
    return short_sink, config.depth, config.tree is not None and not config.tree.is_chain, -window
