"""kv_compact on GPUs through Triton; meaning and arguments as in reference.py. One launch for all layers, no allocation."""

from __future__ import annotations

import torch
from torch import Tensor

WARPS = 4
ELEMENTS_PER_THREAD = 8  # of one entry: 16 bytes of a 2-byte cache; four entries are in flight


def kv_compact(kv: Tensor, path: Tensor, counts: Tensor, committed: Tensor) -> Tensor:
    """See reference.kv_compact."""
    from .gpu_kernels import compact_kernel

    _check(kv, path, counts, committed)
    layers, _, batch, heads, size, dim = kv.shape
    heads_at_once, block_d = tile(heads, dim)
    if path.shape[1]:
        compact_kernel[(layers * 2, -(-heads // heads_at_once), batch)](
            kv, path, counts, committed, size, path.stride(0), *kv.stride()[:5], HEADS=heads, DIM=dim, BLOCK_H=heads_at_once,
            BLOCK_D=block_d, LONGEST=path.shape[1], num_warps=WARPS,
        )  # fmt: skip
    return kv


def tile(heads: int, dim: int) -> tuple[int, int]:
    """Heads, and elements of each, that a program moves at once; both powers of two."""
    block_d = 1 << (dim - 1).bit_length()
    fill = max(1, WARPS * 32 * ELEMENTS_PER_THREAD // block_d)
    return min(fill, 1 << (heads - 1).bit_length()), block_d


def _check(kv: Tensor, path: Tensor, counts: Tensor, committed: Tensor) -> None:
    batch = kv.shape[2]
    if kv.dim() != 6 or kv.shape[1] != 2 or kv.stride(5) != 1:
        raise ValueError(f"kv is [L, 2, B, Hkv, S, D] with D contiguous, got {list(kv.shape)} with strides {kv.stride()}")
    fit = path.dim() == 2 and path.shape[0] == batch and counts.shape == committed.shape == (batch,)
    if not fit or path.stride(1) != 1:
        raise ValueError(
            f"path [B, A], counts [B] and committed [B] do not fit {batch} rows: {list(path.shape)}, {list(counts.shape)}, "
            f"{list(committed.shape)}"
        )
    if any(t.dtype not in (torch.int32, torch.int64) for t in (path, counts, committed)):
        raise ValueError(f"path, counts and committed are int32 or int64, got {path.dtype}, {counts.dtype}, {committed.dtype}")
