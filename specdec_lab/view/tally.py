"""Running totals of one configuration in one cell, for a view that must not wait for the end of the run.

The final numbers come from `summary`; on the same steps both agree (a test compares them).
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import Any

from ..records import PHASES, SpecConfig, StepRecord
from ..summary import PairedRatio


@lru_cache(maxsize=1024)
def drafted_depth(config: str, drafted: int) -> int:
    """Positions that could be accepted when a row drafted the first `drafted` nodes of its tree."""
    tree = SpecConfig.parse(config).tree
    return max(tree.depths[:drafted], default=0) if tree else 0


class Acceptance:
    """Counts per draft position over rows that were not cut by end of text or length limit."""

    def __init__(self) -> None:
        self.row_rounds = 0
        self.num_accepted = 0
        self.drafted_at: list[int] = []  # row-rounds that drafted position i
        self.reached_at: list[int] = []  # of those, the ones that accepted every earlier position
        self.accepted_at: list[int] = []

    def add(self, step: StepRecord) -> None:
        """Count the rows of a round that drafted something."""
        rows = zip(step.drafted, step.accepted, step.tokens, step.censored, strict=True)
        alike = Counter((drafted, accepted) for drafted, accepted, tokens, cut in rows if tokens and drafted and not cut)
        for (drafted, accepted), count in alike.items():
            self._count(drafted_depth(step.config, drafted), accepted, count)

    def _count(self, depth: int, accepted: int, count: int) -> None:
        missing = depth - len(self.drafted_at)
        for counts in (self.drafted_at, self.reached_at, self.accepted_at):
            counts.extend([0] * missing)
        self.row_rounds += count
        self.num_accepted += accepted * count
        for position in range(depth):
            self.drafted_at[position] += count
            self.reached_at[position] += count * (accepted >= position)
            self.accepted_at[position] += count * (accepted > position)

    @property
    def mean_length(self) -> float:
        """Mean tokens per row and round, bonus included; 1 for plain decoding."""
        return 1.0 + self.num_accepted / self.row_rounds if self.row_rounds else 1.0

    @property
    def alpha(self) -> float | None:
        """Maximum-likelihood chance that one more draft token is accepted, if all positions were alike."""
        trials = sum(self.reached_at)
        return sum(self.accepted_at) / trials if trials else None


class Tally:
    """What the live table and the acceptance bars say about one configuration in one cell."""

    def __init__(self, workload: str, cell: str, config: str) -> None:
        self.workload, self.cell, self.config = workload, cell, config
        self.num_rounds = 0
        self.acceptance = Acceptance()
        self.labels: tuple[str, ...] = ()
        self.speedup: PairedRatio | None = None
        self.is_touched = True
        self._is_steady = False
        self._forget_times()

    def _forget_times(self) -> None:
        self.timed_rounds = 0
        self.timed_tokens = 0
        self.wall_s = 0.0
        self.kv_floor_s = 0.0
        self.parts_s = dict.fromkeys(PHASES, 0.0)

    def add(self, step: StepRecord) -> None:
        """Count one round."""
        self.num_rounds += 1
        self.acceptance.add(step)
        self._time(step)
        self.is_touched = True

    def _time(self, step: StepRecord) -> None:
        """Timing comes from rounds in which all rows are alive and uncut; from all rounds while there is none such."""
        is_steady = all(step.live) and not any(step.censored)
        if is_steady and not self._is_steady:
            self._is_steady = True
            self._forget_times()
        if self._is_steady and not is_steady:
            return
        self.timed_rounds += 1
        self.timed_tokens += step.num_emitted
        self.wall_s += step.wall_s
        self.kv_floor_s += step.kv_floor_s
        for name in PHASES:
            self.parts_s[name] += getattr(step, name)

    @property
    def tokens_per_s(self) -> float:
        """Emitted tokens per second of rounds, all rows together, prefill not counted."""
        return self.timed_tokens / self.wall_s if self.wall_s else 0.0

    def to_message(self) -> dict[str, Any]:
        """The row as the front end reads it; times in ms per round."""
        rounds = self.timed_rounds or 1
        counts = self.acceptance
        return {
            "workload": self.workload,
            "cell": self.cell,
            "config": self.config,
            "tps": round(self.tokens_per_s, 3),
            "rounds": self.num_rounds,
            "speedup": _paired(self.speedup),
            "length": round(counts.mean_length, 4),
            "ms": round(self.wall_s / rounds * 1e3, 4),
            "parts": [round(self.parts_s[name] / rounds * 1e3, 4) for name in PHASES],
            "kv_ms": round(self.kv_floor_s / rounds * 1e3, 4),
            "labels": list(self.labels),
            "pos": [list(pair) for pair in zip(counts.accepted_at, counts.drafted_at, strict=True)],
            "alpha": counts.alpha and round(counts.alpha, 4),
        }


def _paired(ratio: PairedRatio | None) -> list[float | None] | None:
    """Ratio, low, high, blocks; low and high None where one block gives no interval."""
    if ratio is None:
        return None
    has_interval = math.isfinite(ratio.high)
    low, high = (round(ratio.low, 4), round(ratio.high, 4)) if has_interval else (None, None)
    return [round(ratio.mean, 4), low, high, ratio.num_blocks]
