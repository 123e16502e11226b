"""Draws on GPUs through Triton; meaning and arguments as in reference.py. One launch each, no sync; with `out` no allocation.

**Gumbel.** Scores are compared as logits / temperature + noise in float64. A float32 glance skips blocks that cannot hold the
best, so float64 logarithms are paid for a few blocks of a row. The engine on a CPU compares logarithms of a float32 law, so a
token may differ where the two best scores agree to some float32 ulp of the law, about 3e-7: as rare as that.
**Inverse distribution.** See reference.py: weights differ from a CPU's by some float32 ulp.
One program draws one row, so few rows leave most multiprocessors idle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..accept.gpu import MOST_REGISTERS, check_laws
from ..accept.reference import Accepted
from ..noise.gpu import check_out, check_places, noisy_block, noisy_warps, seed_tensor
from ..row_lse.gpu import INTEGERS, block_of
from .reference import Drawn

BLOCK = 4096  # tokens of a draw by inverse distribution
TOKENS_PER_THREAD = 16  # with 8, in twice as many warps, a variant spills


def draw_gumbel(
    logits: Tensor, lse: Tensor, temperature: float, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """See reference.draw_gumbel."""
    from .gpu_kernels import gumbel_kernel

    out = _check(logits, lse, temperature, sequences, positions, out)
    vocabulary = logits.shape[2]
    gumbel_kernel[(positions.numel(),)](
        logits, lse, 1.0 / temperature, seed_tensor(seed, logits.device), sequences, positions, int(purpose), out.tokens,
        out.logprob, positions.shape[1], *logits.stride()[:2], V=vocabulary, BLOCK=noisy_block(vocabulary),
        num_warps=noisy_warps(vocabulary),
    )  # fmt: skip
    return out


def draw_inverse(
    logits: Tensor, lse: Tensor, temperature: float, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int,
    lane: int = 0, removed: Tensor | None = None, out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """See reference.draw_inverse."""
    from .gpu_kernels import inverse_kernel

    out = _check(logits, lse, temperature, sequences, positions, out)
    gone = 0 if removed is None else removed.shape[2]
    fits = removed is None or (removed.shape[:2] == positions.shape and (gone < 2 or removed.stride(2) == 1))
    if removed is not None and (not fits or removed.dtype not in INTEGERS):
        raise ValueError(f"removed must be int32 or int64 [B, T, K], got {removed.dtype} {list(removed.shape)}")
    strides = (0, 0) if removed is None else removed.stride()[:2]
    inverse_kernel[(positions.numel(),)](
        logits, lse, 1.0 / temperature, seed_tensor(seed, logits.device), sequences, positions, int(purpose), lane, removed,
        out.tokens, out.logprob, positions.shape[1], *logits.stride()[:2], *strides, K=gone, V=logits.shape[2],
        **tile(logits.shape[2]),
    )  # fmt: skip
    return out


def draw_residual(
    target: Tensor, target_lse: Tensor, draft: Tensor | None, draft_lse: Tensor | None, law_row: Tensor | None,
    temperature: float, accepted: Accepted, seed: int | Tensor, sequences: Tensor, first_positions: Tensor, purpose: int,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """See reference.draw_residual."""
    from .gpu_kernels import residual_kernel

    batch, nodes, vocabulary = target.shape
    check_laws(target, target_lse, temperature, (batch, nodes, vocabulary), "target")
    laws = 0 if draft is None else draft.shape[1]
    if (draft is None) != (draft_lse is None):
        raise ValueError("draw_residual takes draft logits with their log-sum-exps, or neither: drafts were point masses then")
    if draft is not None and draft_lse is not None:
        check_laws(draft, draft_lse, temperature, (batch, laws, vocabulary), "draft")
    if law_row is not None and (law_row.shape != (nodes,) or not law_row.is_contiguous()):
        raise ValueError(f"law_row must have {nodes} entries, one per node, got {list(law_row.shape)}")
    check_places(sequences, first_positions)
    out = Drawn.empty(batch, device=target.device) if out is None else out
    _check_drawn(out, (batch,))
    most = accepted.refused.shape[1]
    residual_kernel[(batch,)](
        target, target_lse, draft, draft_lse, law_row, 1.0 / temperature, accepted.row, accepted.num_accepted,
        accepted.num_refused, accepted.refused, accepted.offered_mass, accepted.rest_mass, seed_tensor(seed, target.device),
        sequences, first_positions, int(purpose), out.tokens, out.logprob, *target.stride()[:2],
        *(draft.stride()[:2] if draft is not None else (0, 0)), NODES=nodes, LAWS=laws, K=most,
        BLOCK_K=1 << (most - 1).bit_length(), TABLED=law_row is not None, POINT=laws == 0, V=vocabulary, **tile(vocabulary),
    )  # fmt: skip
    return out


def tile(vocabulary: int) -> dict[str, int]:
    """Block, how many of them (to a power of two), warps, and the registers that a thread may use."""
    block = block_of(vocabulary, BLOCK)
    blocks = -(-vocabulary // block)
    warps = max(1, block // (32 * TOKENS_PER_THREAD))
    return {"BLOCK": block, "BLOCKS": 1 << (blocks - 1).bit_length(), "num_warps": warps, "maxnreg": MOST_REGISTERS}


def _check(
    logits: Tensor, lse: Tensor, temperature: float, sequences: Tensor, positions: Tensor, out: Drawn | None
) -> Drawn:  # fmt: skip
    check_places(sequences, positions)
    check_laws(logits, lse, temperature, (positions.shape[0], positions.shape[1], logits.shape[2]), "logits")
    out = Drawn.empty(*positions.shape, device=logits.device) if out is None else out
    _check_drawn(out, tuple(positions.shape))
    return out


def _check_drawn(out: Drawn, shape: tuple[int, ...]) -> None:
    check_out(out.tokens, shape, INTEGERS, "tokens")
    check_out(out.logprob, shape, (torch.float32,), "logprob")
