"""Two numbers instead of a vector: p_1, and how fast the chance that all of k children are rejected falls with k."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .counts import Counts

STEEPEST = 20.0  # r_2 = (1-p1) * 2^-20: rank 2 accepts all that rank 1 does not
TOLERANCE = 0.01  # an error of a chance that changes no decision
SURE = 3  # standard errors that sampling is granted


@dataclass(frozen=True, slots=True)
class RankFit:
    """r_k = (1-p1) * k^-b is the chance that k children are all rejected; p_k = r_(k-1) - r_k. Unpacks as `p1, b`.

    error       gap between fitted and observed r_k, at the rank where it is largest against what is granted
    granted     the gap that sampling (3 standard errors) and indifference (0.01) explain there
    worst_rank  that rank
    num_nodes   examined nodes behind the fit
    """

    p1: float
    b: float
    error: float
    granted: float
    worst_rank: int
    num_nodes: int

    def __iter__(self) -> Iterator[float]:
        """(p1, b)."""
        return iter((self.p1, self.b))

    @property
    def is_good(self) -> bool:
        """Whether the two numbers tell what the counts tell."""
        return self.error <= self.granted

    @property
    def is_monotone(self) -> bool:
        """Whether p_k never rises with k, so that the heap search is exact."""
        return self.p1 >= (1 - 2**-self.b) / (2 - 2**-self.b)

    def survival(self, rank: int) -> float:
        """r_k; r_0 = 1."""
        return float((1 - self.p1) * rank**-self.b) if rank else 1.0

    def vector(self, ranks: int) -> tuple[float, ...]:
        """(p_1, ..., p_K) for a tree search."""
        return tuple(self.survival(rank - 1) - self.survival(rank) for rank in range(1, ranks + 1))

    def __str__(self) -> str:
        gap = f"rejection of the first {self.worst_rank} is off by {self.error:.3f} where {self.granted:.3f} is granted"
        verdict = "good fit" if self.is_good else "BAD FIT, use the empirical Counts.vector()"
        return f"p1 {self.p1:.3f}, b {self.b:.2f} from {self.num_nodes} nodes: {gap}: {verdict}"


def fit_acceptance(counts: Counts | Mapping[int, Sequence[int]]) -> RankFit:
    """Maximum likelihood of (p1, b) on the outcomes at examined nodes; the fit carries its error, `is_good` judges it.

    counts  Counts, or {children: (none, rank 1, ..., rank m)}; trees of any width pool, ranks above m are censored
    ValueError where the counts cannot tell b: no node, only chains, or no rejection of a rank 1 that had a sibling.
    Source: the law describes the vectors shipped with Sequoia (Chen 2024); algorithms.md 3.3.
    """
    counts = counts if isinstance(counts, Counts) else Counts({m: tuple(row) for m, row in counts.items()})
    _check_tells_b(counts)
    # The likelihood splits: every outcome but rank 1 has a factor 1-p1, and b is in the other factor.
    p1 = counts.accepted(1) / counts.num_nodes
    b = _steepness(counts)
    survival = counts.survival()
    gaps = [abs((1 - p1) * rank**-b - seen) for rank, seen in enumerate(survival.chances, start=1)]
    granted = [TOLERANCE + SURE * error for error in survival.errors]
    worst = max(range(len(gaps)), key=lambda i: gaps[i] / granted[i])
    return RankFit(p1, b, gaps[worst], granted[worst], worst + 1, counts.num_nodes)


def _check_tells_b(counts: Counts) -> None:
    if counts.num_nodes == 0:
        raise ValueError("fit_acceptance got counts of 0 examined nodes; run at least one round that drafts a tree")
    if counts.ranks < 2:
        raise ValueError(
            f"all {counts.num_nodes} examined nodes had 1 child: chains tell p1, not how later ranks fare; draft a tree"
        )
    if counts.at_risk(2) == 0:
        raise ValueError("rank 1 was accepted wherever it had a sibling, so nothing is known of rank 2: count more rounds")


def _steepness(counts: Counts) -> float:
    """The b in 0..STEEPEST where the likelihood's slope, which falls with b, is zero: Newton's steps inside a bracket."""
    ranks = np.arange(2, counts.ranks + 1)
    accepted = np.array([counts.accepted(int(rank)) for rank in ranks])
    steps = np.log(ranks / (ranks - 1))
    fixed = accepted @ np.log(ranks) + sum(outcomes[0] * math.log(m) for m, outcomes in counts.examined.items())
    if not accepted.any():
        return 0.0  # no later rank was ever accepted: r_k stays what it is

    def slope(b: float) -> float:
        return float(accepted @ (steps / -np.expm1(-b * steps)) - fixed)

    def curvature(b: float) -> float:
        return float(-accepted @ (steps**2 * np.exp(-b * steps) / np.expm1(-b * steps) ** 2))

    low, high = 0.0, STEEPEST
    if slope(high) >= 0:
        return high
    b = _regressed(counts)
    for _ in range(100):
        low, high = (b, high) if slope(b) > 0 else (low, b)
        step = b - slope(b) / curvature(b)
        following = step if low < step < high else (low + high) / 2
        if abs(following - b) <= 1e-12 * following:
            break
        b = following
    return b


def _regressed(counts: Counts) -> float:
    """Where to start: minus the slope of log r_k over log k, kept inside the range."""
    alive = [chance for chance in counts.survival().chances if chance > 0]
    if len(alive) < 2:
        return 1.0
    slope = float(np.polyfit(np.log(np.arange(1, len(alive) + 1)), np.log(alive), deg=1)[0])
    return min(max(-slope, 1e-3), STEEPEST / 2)
