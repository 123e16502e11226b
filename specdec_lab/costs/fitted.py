"""A line through a handful of measured times: what a batch, a context and a number of query tokens cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


def nonnegative_least_squares(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 that minimises |matrix x - wanted|, by trying every set of nonzero coefficients (there are few)."""
    num_columns = matrix.shape[1]
    best, least = np.zeros(num_columns), float(wanted @ wanted)
    for bits in range(1, 1 << num_columns):
        support = [i for i in range(num_columns) if bits >> i & 1]
        solution = np.linalg.lstsq(matrix[:, support], wanted, rcond=None)[0]
        rest = matrix[:, support] @ solution - wanted
        if (solution >= 0).all() and rest @ rest < least:
            best, least = np.zeros(num_columns), float(rest @ rest)
            best[support] = solution
    return best


@dataclass(frozen=True, slots=True)
class CostSample:
    """One measured time: B sequences, q query tokens each, and the KV bytes that were read for all of them."""

    batch: int
    query_tokens: int
    kv_bytes: float
    seconds: float

    @property
    def tokens(self) -> int:
        """Query tokens of the whole batch."""
        return self.batch * self.query_tokens


@dataclass(frozen=True, slots=True)
class FittedCost:
    """seconds = a + b*B*q + c*KV_bytes + b2*max(0, B*q - knee): decode, verify, a draft forward or the overhead.

    residuals  measured over predicted - 1 of every sample; large ones are kernel inefficiency at that batch, not noise
    left_out   the largest error of a prediction from all other samples; None where too few remain to fit
    """

    fixed_s: float
    per_token_s: float
    per_kv_byte_s: float
    beyond_knee_s: float
    knee_tokens: float
    samples: tuple[CostSample, ...]
    residuals: tuple[float, ...] = ()
    left_out: float | None = None

    def seconds(self, batch: int, query_tokens: int, kv_bytes: float) -> float:
        """Predicted time."""
        tokens = batch * query_tokens
        beyond = self.beyond_knee_s * (tokens - self.knee_tokens) if tokens > self.knee_tokens else 0.0
        return self.fixed_s + self.per_token_s * tokens + self.per_kv_byte_s * kv_bytes + beyond

    def outside(self, batch: int, query_tokens: int, kv_bytes: float) -> tuple[str, ...]:
        """In words, what of this question lies outside the calibrated range."""
        asked = {"batch": batch, "tokens": batch * query_tokens, "kv_bytes": kv_bytes}
        words = []
        for name, value in asked.items():
            known = [getattr(sample, name) for sample in self.samples]
            if not min(known) <= value <= max(known):
                words.append(f"{name} {value:g} is outside the calibrated {min(known):g} to {max(known):g}")
        return tuple(words)


def fit_cost(samples: Sequence[CostSample], knee_tokens: float = math.inf) -> FittedCost:
    """Relative least squares (weights 1/T) with coefficients >= 0, and its leave-one-out error.

    knee_tokens  B*q beyond which computing is no longer free (about the ridge); infinite = no such term
    """
    fitted = _fit(tuple(samples), knee_tokens)
    predicted = [fitted.seconds(s.batch, s.query_tokens, s.kv_bytes) for s in samples]
    residuals = tuple(s.seconds / p - 1 if p else math.inf for s, p in zip(samples, predicted, strict=True))
    return replace(fitted, residuals=residuals, left_out=_leave_one_out(tuple(samples), knee_tokens))


def _fit(samples: tuple[CostSample, ...], knee_tokens: float) -> FittedCost:
    if any(not 0 < s.seconds < math.inf for s in samples):
        raise ValueError("fit_cost needs positive finite times; leave cells that were not measured out")
    rows = [(1.0, s.tokens, s.kv_bytes, max(0.0, s.tokens - knee_tokens)) for s in samples]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4)
    used = columns.any(axis=0)
    scale = columns[:, used].max(axis=0, initial=0.0)
    relative = columns[:, used] / scale / np.array([s.seconds for s in samples])[:, None]
    if len(samples) < max(1, used.sum()) or np.linalg.matrix_rank(relative) < used.sum():
        raise ValueError(
            f"{len(samples)} samples do not tell fixed time, tokens and KV bytes apart; measure the corners of batch "
            "and length (for a draft: two windows), with two query lengths"
        )
    coefficients = np.zeros(4)
    coefficients[used] = nonnegative_least_squares(relative, np.ones(len(samples))) / scale
    fixed_s, per_token_s, per_kv_byte_s, beyond_knee_s = map(float, coefficients)
    return FittedCost(fixed_s, per_token_s, per_kv_byte_s, beyond_knee_s, knee_tokens, samples)


def _leave_one_out(samples: tuple[CostSample, ...], knee_tokens: float) -> float | None:
    errors = []
    for i, left in enumerate(samples):
        try:
            others = _fit(samples[:i] + samples[i + 1 :], knee_tokens)
        except ValueError:
            return None
        errors.append(abs(others.seconds(left.batch, left.query_tokens, left.kv_bytes) / left.seconds - 1))
    return max(errors)


def self_draft_disagreement(target: FittedCost, draft: FittedCost) -> float:
    """Largest relative gap of both on the draft's samples: self-drafting runs the target, so it must be small."""
    gaps = [target.seconds(s.batch, s.query_tokens, s.kv_bytes) / s.seconds - 1 for s in draft.samples]
    return max(map(abs, gaps))
