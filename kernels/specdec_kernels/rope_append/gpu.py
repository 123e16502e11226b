"""rope_append on GPUs through Triton; meaning and arguments as in reference.py. One launch, no sync; with `out` no allocation.

Arithmetic is float32, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEADS_AT_ONCE = 8


def rope_append(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See reference.rope_append. Tokens that share a slot race for it: give padding the scratch slot, or -1."""
    from .gpu_kernels import rope_kernel

    (batch, queries), kv_heads, size, dim = positions.shape, *kv.shape[2:]
    heads = qkv.shape[2] // dim - 2 * kv_heads
    out = torch.empty(batch, queries, heads, dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    _check(qkv, positions, slots, cos, sin, kv, q_norm, k_norm, out)
    blocks = -(-(heads + 2 * kv_heads) // HEADS_AT_ONCE)
    rope_kernel[(batch * queries, blocks)](
        qkv, positions, slots, cos, sin, kv, q_norm, k_norm, out, float(eps), queries, cos.shape[0], size, *qkv.stride()[:2],
        positions.stride(0), slots.stride(0), *kv.stride()[:4], *out.stride()[:3], HEADS=heads, KV_HEADS=kv_heads,
        HALF=dim // 2, BLOCK_H=HEADS_AT_ONCE, BLOCK_D=1 << (dim // 2 - 1).bit_length(), NORMED=q_norm is not None,
        num_warps=num_warps(dim),
    )  # fmt: skip
    return out


def num_warps(dim: int) -> int:
    """A thread has 8 columns of a half: 16 bytes of 16-bit numbers."""
    return max(1, HEADS_AT_ONCE * (1 << (dim // 2 - 1).bit_length()) // 256)


def _check(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """ValueError for what would read or write the wrong memory; values on the device are masked by the kernel."""
    batch, kv_heads, dim = kv.shape[1], kv.shape[2], kv.shape[4]
    heads = out.shape[2]
    if kv.shape[0] != 2 or dim % 2 or tuple(qkv.shape) != (*positions.shape, (heads + 2 * kv_heads) * dim) or heads < 1:
        raise ValueError(
            f"qkv {list(qkv.shape)} does not hold {kv_heads} KV heads of {dim} and some query heads of tokens "
            f"{list(positions.shape)}"
        )
    if positions.shape[0] != batch or slots.shape != positions.shape or tuple(out.shape) != (*positions.shape, heads, dim):
        raise ValueError(
            f"positions {list(positions.shape)}, slots {list(slots.shape)}, out {list(out.shape)} do not fit KV of {batch} rows"
        )
    if any(t.stride(-1) != 1 for t in (qkv, kv, out, positions, slots)) or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("rope_append takes tensors whose last dimension is contiguous, and contiguous tables")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.shape != sin.shape or cos.shape[1] != dim // 2:
        raise ValueError(
            f"cos and sin are float32 [P, {dim // 2}], got {cos.dtype} {list(cos.shape)}, {sin.dtype} {list(sin.shape)}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("rope_append takes weights of both norms or of neither")
    for weight in (q_norm, k_norm):
        if weight is not None and (tuple(weight.shape) != (dim,) or not weight.is_contiguous()):
            raise ValueError(f"norm weights are contiguous [{dim}], got {list(weight.shape)}")
