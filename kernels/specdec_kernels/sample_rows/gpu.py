"""Draws on GPUs through Triton; meaning and arguments as in reference.py. Two launches each, no sync.

**Gumbel.** Scores are compared as logits / temperature + noise in float64. A float32 glance at every block leaves one of them,
rarely two, that can hold the best; only those pay for float64 logarithms. The engine on a CPU compares logarithms of a float32
law, so a token may differ where the two best scores agree to some float32 ulp of the law, about 3e-7: as rare as that.
**Inverse distribution.** See reference.py: weights differ from a CPU's by some float32 ulp.
**Why two launches.** Many multiprocessors share a row, and somebody has to wait for all of them. The end of a launch is that
wait: no counter to reset between replays, no fence to get right. What the first leaves for the second (one or two numbers for
every 2,048 tokens) is allocated by torch, inside a capture from the graph's own pool; `out` saves the other allocations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..accept.gpu import MOST_REGISTERS, check_laws
from ..accept.reference import Accepted
from ..noise.gpu import check_out, check_places, glance, noisy_tile, power_of_two, seed_tensor
from ..row_lse.gpu import INTEGERS, block_of
from .reference import Drawn

BLOCK = 2048  # tokens of a row that one program of a draw by inverse distribution sums; fixed, as noise's NOISY_BLOCK is
TOKENS_PER_THREAD = 16


def draw_gumbel(
    logits: Tensor, lse: Tensor, temperature: float, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """See reference.draw_gumbel."""
    from .gpu_kernels import gumbel_kernel

    out = _check(logits, lse, temperature, sequences, positions, out)
    at, inverse = (seed_tensor(seed, logits.device), sequences, positions, int(purpose)), 1.0 / temperature
    quick = glance(logits, inverse, *at, is_law=False)
    gumbel_kernel[(positions.numel(),)](
        logits, lse, quick, inverse, *at, out.tokens, out.logprob, positions.shape[1], *logits.stride()[:2], V=logits.shape[2],
        **noisy_tile(logits.shape[2]),
    )  # fmt: skip
    return out


def draw_inverse(
    logits: Tensor, lse: Tensor, temperature: float, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int,
    lane: int = 0, removed: Tensor | None = None, out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """See reference.draw_inverse."""
    from .gpu_kernels import inverse_kernel, inverse_sums_kernel

    out = _check(logits, lse, temperature, sequences, positions, out)
    gone = 0 if removed is None else removed.shape[2]
    fits = removed is None or (removed.shape[:2] == positions.shape and (gone < 2 or removed.stride(2) == 1))
    if removed is not None and (not fits or removed.dtype not in INTEGERS):
        raise ValueError(f"removed must be int32 or int64 [B, T, K], got {removed.dtype} {list(removed.shape)}")
    rows, vocabulary, inverse = positions.numel(), logits.shape[2], 1.0 / temperature
    strides = (*logits.stride()[:2], *((0, 0) if removed is None else removed.stride()[:2]))
    sums = _block_sums(rows, vocabulary, device=logits.device)
    inverse_sums_kernel[(sums.numel(),)](
        logits, lse, inverse, removed, sums, positions.shape[1], *strides, K=gone, V=vocabulary, **sums_tile(vocabulary)
    )
    inverse_kernel[(rows,)](
        logits, lse, inverse, seed_tensor(seed, logits.device), sequences, positions, int(purpose), lane, removed, sums,
        out.tokens, out.logprob, positions.shape[1], *strides, K=gone, V=vocabulary, **tile(vocabulary),
    )  # fmt: skip
    return out


def draw_residual(
    target: Tensor, target_lse: Tensor, draft: Tensor | None, draft_lse: Tensor | None, law_row: Tensor | None,
    temperature: float, accepted: Accepted, seed: int | Tensor, sequences: Tensor, first_positions: Tensor, purpose: int,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """See reference.draw_residual."""
    from .gpu_kernels import residual_kernel, residual_sums_kernel

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
    laws_of = (target, target_lse, draft, draft_lse, law_row, 1.0 / temperature, accepted.row)
    refusals = (accepted.num_refused, accepted.refused, accepted.offered_mass, accepted.rest_mass)
    strides = (*target.stride()[:2], *(draft.stride()[:2] if draft is not None else (0, 0)))
    constants = {"NODES": nodes, "LAWS": laws, "K": most, "BLOCK_K": power_of_two(most), "TABLED": law_row is not None,
                 "POINT": laws == 0, "V": vocabulary}  # fmt: skip
    sums = _block_sums(batch, 2, vocabulary, device=target.device)
    residual_sums_kernel[(sums.numel() // 2,)](*laws_of, *refusals, sums, *strides, **constants, **sums_tile(vocabulary))
    residual_kernel[(batch,)](
        *laws_of, accepted.num_accepted, *refusals, seed_tensor(seed, target.device), sequences, first_positions, int(purpose),
        sums, out.tokens, out.logprob, *strides, **constants, **tile(vocabulary),
    )  # fmt: skip
    return out


def tile(vocabulary: int) -> dict[str, int]:
    """Block, how many of them (to a power of two), warps, and the registers that a thread may use."""
    return sums_tile(vocabulary) | {"BLOCKS": power_of_two(_blocks(vocabulary))}


def sums_tile(vocabulary: int) -> dict[str, int]:
    """The same of the first launch, which has a program for each block."""
    block = block_of(vocabulary, BLOCK)
    return {"BLOCK": block, "num_warps": max(1, block // (32 * TOKENS_PER_THREAD)), "maxnreg": MOST_REGISTERS}


def _blocks(vocabulary: int) -> int:
    return -(-vocabulary // block_of(vocabulary, BLOCK))


def _block_sums(*shape: int, device: torch.device) -> Tensor:
    """Room for float64 numbers of every block; the last of the shape is the vocabulary."""
    return torch.empty(*shape[:-1], _blocks(shape[-1]), dtype=torch.float64, device=device)


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
