"""How many tokens a round yields: from the chance of one token to the mean of a round, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def omega(gamma: int, alpha: float) -> float:
    """Expected tokens of a round of `gamma` drafted ones, each accepted with chance alpha while all before it were."""
    return math.fsum(alpha**i for i in range(gamma + 1))


def alpha_implied(gamma: int, mean_acceptance_length: float) -> float:
    """The alpha whose omega is this length, clamped to [0, 1]."""
    if gamma < 1:
        raise ValueError(f"alpha_implied needs at least 1 drafted token, got gamma {gamma}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if omega(gamma, middle) < mean_acceptance_length else (low, middle)
    return (low + high) / 2 if 1 < mean_acceptance_length < gamma + 1 else float(mean_acceptance_length > 1)


@dataclass(frozen=True, slots=True)
class AcceptanceFit:
    """alpha(S, K) = c0 + c1*log S + c2*log K, clamped to [0, 1]; of one drafter on one workload."""

    constant: float
    per_log_length: float
    per_log_view: float
    lengths: tuple[int, int]  # calibrated range
    views: tuple[int, int]

    def alpha(self, length: int, view_tokens: int) -> float:
        """Chance that a drafted token is accepted, at this context and this many keys read by the draft."""
        raw = self.constant + self.per_log_length * math.log(length) + self.per_log_view * math.log(view_tokens)
        return min(1.0, max(0.0, raw))

    def outside(self, length: int, view_tokens: int) -> tuple[str, ...]:
        """In words, what of this question lies outside the calibrated range."""
        asked = (("length", length, self.lengths), ("view", view_tokens, self.views))
        return tuple(
            f"acceptance: {name} {value} is outside the calibrated {low} to {high}"
            for name, value, (low, high) in asked
            if not low <= value <= high
        )


def fit_acceptance(samples: Sequence[tuple[int, int, float]]) -> AcceptanceFit:
    """Least squares over measured (context length, keys a draft reads, alpha)."""
    logs = np.array([[1.0, math.log(length), math.log(view)] for length, view, _ in samples])
    if len(samples) < 3 or np.linalg.matrix_rank(logs) < 3:
        raise ValueError(
            f"{len(samples)} samples do not tell context length and window apart: measure two of each, in three corners"
        )
    c0, c1, c2 = map(float, np.linalg.lstsq(logs, np.array([alpha for *_, alpha in samples]), rcond=None)[0])
    lengths, views = [s[0] for s in samples], [s[1] for s in samples]
    return AcceptanceFit(c0, c1, c2, (min(lengths), max(lengths)), (min(views), max(views)))
