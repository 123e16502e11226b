"""How far values lie apart, and intervals: of a proportion, and of a ratio measured in paired blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ..records import Spread


def spread(values: Sequence[float]) -> Spread:
    """Median with the 5th and 95th percentile; zeros without values."""
    if not values:
        return Spread(0.0, 0.0, 0.0, 0)
    p05, median, p95 = np.percentile(np.asarray(values, dtype=np.float64), (5, 50, 95))
    return Spread(float(median), float(p05), float(p95), len(values))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a proportion (Wilson 1927), honest near 0 and 1; (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"wilson_interval needs 0 <= successes <= trials, got {successes} of {trials}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, width = successes / trials, z * z / trials
    middle = share + width / 2
    half = z * math.sqrt(share * (1 - share) / trials + width / (4 * trials))
    return max(0.0, (middle - half) / (1 + width)), min(1.0, (middle + half) / (1 + width))


def _student_share(t: float, dof: int) -> float:
    """P(|T| <= t) for an integer number of degrees of freedom: the finite series of Abramowitz & Stegun 26.7.3-4."""
    theta = math.atan(t / math.sqrt(dof))
    cos2 = math.cos(theta) ** 2
    odd = dof % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, dof + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    share = math.sin(theta) * total
    return (share + theta) * 2 / math.pi if odd else share


def student_quantile(confidence: float, dof: int) -> float:
    """The t with P(|T| <= t) = confidence."""
    if not 0 < confidence < 1 or dof < 1:
        raise ValueError(f"student_quantile needs 0 < confidence < 1 and dof >= 1, got {confidence} and {dof}")
    low, high = 0.0, 1.0
    while _student_share(high, dof) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, dof) < confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """Geometric mean of candidate/baseline over paired blocks, with its interval.

    One block gives no interval: low is 0 and high is infinite, so nothing compares as significant.
    """

    mean: float
    low: float
    high: float
    num_blocks: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low > 1 or self.high < 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; JSON knows no infinity, so an unbounded `high` is None."""
        return {**asdict(self), "high": self.high if math.isfinite(self.high) else None}


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> PairedRatio:
    """Candidate over baseline, block by block: exp of the mean log ratio with Student's t interval over the blocks."""
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"paired_ratio needs equally many of both, got {len(baseline)} and {len(candidate)}")
    if any(not 0 < value < math.inf for value in (*baseline, *candidate)):
        raise ValueError("paired_ratio needs positive finite values; a block that measured nothing must be left out")
    logs = np.log(np.asarray(candidate, dtype=np.float64) / np.asarray(baseline, dtype=np.float64))
    mean, blocks = float(logs.mean()), len(logs)
    if blocks == 1:
        return PairedRatio(math.exp(mean), 0.0, math.inf, 1)
    half = student_quantile(confidence, blocks - 1) * float(logs.std(ddof=1)) / math.sqrt(blocks)
    return PairedRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), blocks)
