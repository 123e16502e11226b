"""What drawing means, in torch on any device. gpu.py computes the same; same arguments, same order.

    draw_gumbel    the arg-max of log-probability + noise by position and token: plain sampling, and coupled drafts
    draw_inverse   inverse distribution with one uniform: drafts of rejection; of trees one child at a time, without replacement
    draw_residual  the same from what acceptance left: the token after a refusal, or the bonus
Greedy decoding draws nothing: row_lse has the arg-max. `purpose` names the random numbers (noise/reference.py).

**Top-k and top-p** need a sort, and stay torch operations on the device (topk, sort, scatter: a graph can hold them). Give
every kernel of the round the logarithm of the law that they leave as logits, with temperature 1 and the row_lse of those.

**Agreement.** A draw by inverse distribution takes the first token whose cumulative weight exceeds u times the total, both
summed in float64 over weights in float32. Another device's exp differs by some float32 ulp, so the token may differ where u
is as close to a border: never on laws whose probabilities are exact. A Gumbel draw may differ where two scores are as close.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..accept.reference import Accepted
from ..noise.reference import gumbel, uniform
from ..row_lse.reference import law, scaled


@dataclass(frozen=True, slots=True)
class Drawn:
    """tokens int64 and logprob float32 of one shape: what was drawn, and how likely the law of the row itself makes it."""

    tokens: Tensor
    logprob: Tensor

    @classmethod
    def empty(cls, *shape: int, device: torch.device) -> Drawn:
        """Room for tokens of this shape."""
        tokens = torch.empty(*shape, dtype=torch.int64, device=device)
        return cls(tokens, torch.empty(*shape, dtype=torch.float32, device=device))


def draw_gumbel(
    logits: Tensor, lse: Tensor, temperature: float, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """The token of largest logits / temperature + Gumbel noise of its position, the first of equals.

    logits, lse  [B, T, V] and [B, T] (row_lse; only the returned log-probability needs it)
    seed         an int, or int64 [1] on the device, which a captured graph reads anew
    sequences, positions  [B] and [B, T] int32 or int64: whose noise, and of which position
    returns      [B, T], written to `out` where given
    Scores are compared in float64; the quotient is float32.
    """
    x = scaled(logits, temperature)
    tokens = (x.double() + gumbel(seed, sequences, positions, purpose, x.shape[-1])).argmax(-1)
    return _written(tokens, x, lse, out)


def draw_inverse(
    logits: Tensor, lse: Tensor, temperature: float, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int,
    lane: int = 0, removed: Tensor | None = None, out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """The first token whose cumulative probability exceeds u times the total, u the uniform of position and lane.

    removed  [B, T, K] tokens that cannot be drawn any more (or -1): the siblings drawn before, of lane K
    other arguments as draw_gumbel's. A token of probability zero is drawn only where nothing else is left: then the last one.
    """
    weights = law(logits, lse, temperature).double()
    if removed is not None:
        ids = torch.arange(weights.shape[-1], device=weights.device)
        weights = weights.masked_fill((removed[..., None] == ids).any(-2), 0.0)
    u = uniform(seed, sequences, positions, purpose, lane)
    return _written(_first_beyond(weights, u), scaled(logits, temperature), lse, out)


def draw_residual(
    target: Tensor, target_lse: Tensor, draft: Tensor | None, draft_lse: Tensor | None, law_row: Tensor | None,
    temperature: float, accepted: Accepted, seed: int | Tensor, sequences: Tensor, first_positions: Tensor, purpose: int,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """Each row's token behind its last accepted node, drawn from what the refusals there left of the target's law.

    target, target_lse  [B, N+1, V] and [B, N+1]
    draft, draft_lse    [B, M, V] and [B, M] as accepted against; None: drafts were point masses, so refused tokens are left out
    law_row             [N+1] which row of `draft` the children of a node were drawn from; None: row v for node v (chains)
    accepted            from accept_*
    first_positions     [B]; the uniform is that of position first + num_accepted
    returns             [B]; logprob is the target's own
    R_0 = p; R_(j+1) = max(R_j - D_j, 0) / rest_mass[j], D_j = q without refused[:j], / offered_mass[j]. A rest that is zero
    everywhere means p = q, where refusal has chance zero: rounding brought us there, and p itself is drawn from.
    """
    order = torch.arange(target.shape[0], device=target.device)
    row = accepted.row.long()
    logits, lse = target[order, row], target_lse[order, row]
    left = p = law(logits, lse, temperature).double()
    q = torch.zeros_like(p)
    if draft is not None and draft_lse is not None:
        of = row.clamp(max=draft.shape[1] - 1) if law_row is None else law_row.long()[row]
        q = law(draft[order, of], draft_lse[order, of], temperature).double()
    for j in range(accepted.refused.shape[1]):
        applies = (j < accepted.num_refused)[:, None]
        token = accepted.refused[:, j : j + 1].long().clamp(min=0)
        offered = q / accepted.offered_mass[:, j : j + 1] if draft is not None else torch.zeros_like(p).scatter(1, token, 1.0)
        left = torch.where(applies, (left - offered).clamp(min=0) / accepted.rest_mass[:, j : j + 1], left)
        q = torch.where(applies, q.scatter(1, token, 0.0), q)
    weights = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
    u = uniform(seed, sequences, (first_positions + accepted.num_accepted)[:, None], purpose)[:, 0]
    return _written(_first_beyond(weights, u), scaled(logits, temperature), lse, out)


def _first_beyond(weights: Tensor, u: Tensor) -> Tensor:
    cumulative = weights.cumsum(-1)
    target = (u * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def _written(tokens: Tensor, x: Tensor, lse: Tensor, out: Drawn | None) -> Drawn:
    out = Drawn.empty(*tokens.shape, device=tokens.device) if out is None else out
    out.tokens.copy_(tokens)
    out.logprob.copy_(x.gather(-1, tokens[..., None])[..., 0] - lse)
    return out
