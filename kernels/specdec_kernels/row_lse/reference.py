"""What row_lse means, in torch on any device. gpu.py computes the same; same arguments, same order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowStats:
    """What one read of rows of logits gives.

    lse         float32 [R] natural log-sum-exp of logits / temperature
    best        [R] the arg-max, the first of equals
    best_value  float32 [R] logits / temperature there
    logprob     float32 [R, K] log-probability of each asked token; -inf where its id is not in [0, V)
    """

    lse: Tensor
    best: Tensor
    best_value: Tensor
    logprob: Tensor

    @classmethod
    def empty(cls, rows: int, asked: int, device: torch.device) -> RowStats:
        """Room for `rows` rows of which `asked` tokens each are asked."""
        lse, value = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        best = torch.empty(rows, dtype=torch.int64, device=device)
        return cls(lse, best, value, torch.empty(rows, asked, dtype=torch.float32, device=device))


def row_lse(logits: Tensor, temperature: float, ids: Tensor | None = None, out: RowStats | None = None) -> RowStats:
    """Log-sum-exp, arg-max and the log-probabilities of some tokens of every row of logits.

    logits       [R, V] float32, bfloat16 or float16; -inf is a token of probability zero
    temperature  above 0; of greedy decoding, which has no law, give 1
    ids          [R, K] int32 or int64, or None
    out          written and returned where given
    """
    x = scaled(logits, temperature)
    lse = x.logsumexp(-1)
    best_value, best = x.max(-1)[0], x.argmax(-1)
    out = RowStats.empty(x.shape[0], 0 if ids is None else ids.shape[1], x.device) if out is None else out
    if ids is not None and ids.shape[1]:
        known = (ids >= 0) & (ids < x.shape[1])
        picked = x.gather(1, ids.long().clamp(0, x.shape[1] - 1)) - lse[:, None]
        out.logprob.copy_(torch.where(known, picked, -torch.inf))
    out.lse.copy_(lse)
    out.best.copy_(best)
    out.best_value.copy_(best_value)
    return out


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32, or in float64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def law(logits: Tensor, lse: Tensor, temperature: float) -> Tensor:
    """Probabilities exp(logits / temperature - lse) of rows [..., V], lse [...]: what all kernels of a round call p and q."""
    return (scaled(logits, temperature) - lse[..., None]).exp()
