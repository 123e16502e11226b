"""ngram_match on GPUs through Triton; meaning and arguments as in reference.py. One launch, no host sync.

Reads, by count: every token of the text once from memory (8 bytes; its neighbours' programs find it in a cache), so 8 * B *
lengths: 8.4 MB for 32 texts of 32,768 tokens. Nothing is kept between launches but `work`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import check_sizes

BLOCK = 1024  # tokens that a program looks at at once
MOST_PROGRAMS = 32  # of one row; longer texts are gone through in turns
MOST_REGISTERS = 64  # named: left to choose, some assemblers take 32 and spill (Triton 3.6, 3.7)
LONGEST = 32  # of a match: its comparisons are unrolled


def ngram_match(
    ids: Tensor, lengths: Tensor, sizes: Sequence[int], depth: int, work: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See reference.ngram_match.

    work  int64 [B, 2], contiguous, zero before the first call; every call leaves it zero. Not given: made here, which in a
          CUDA graph is another node
    """
    from .gpu_kernels import match_kernel

    check_sizes(sizes)
    batch, width = ids.shape
    work = torch.zeros(batch, 2, dtype=torch.int64, device=ids.device) if work is None else work
    _check(ids, lengths, sizes, depth, work)
    tokens = torch.empty(batch, depth, dtype=torch.int64, device=ids.device)
    counts = torch.empty(batch, dtype=torch.int64, device=ids.device)
    programs = programs_of(width)
    match_kernel[(programs, batch)](
        ids, lengths, work, tokens, counts, ids.stride(0), depth, programs, SIZES=bits_of(sizes), LONGEST=sizes[0],
        BLOCK=BLOCK, BLOCK_D=1 << (max(depth, 1) - 1).bit_length(), num_warps=4, maxnreg=MOST_REGISTERS,
    )  # fmt: skip
    return tokens, counts


def programs_of(width: int) -> int:
    """Programs per row of a buffer of this width. What a text does not reach ends at once."""
    return min(MOST_PROGRAMS, -(-width // BLOCK))


def bits_of(sizes: Sequence[int]) -> int:
    """Bit n - 1 for each size n."""
    return sum(1 << size - 1 for size in sizes)


def _check(ids: Tensor, lengths: Tensor, sizes: Sequence[int], depth: int, work: Tensor) -> None:
    batch = ids.shape[0]
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.stride(1) != 1:
        raise ValueError(f"ids is int64 [B, S] without gaps in a row, got {ids.dtype} {list(ids.shape)}, {ids.stride()}")
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int32, torch.int64) or not lengths.is_contiguous():
        raise ValueError(f"lengths must be contiguous int32 or int64 [{batch}], got {lengths.dtype} {list(lengths.shape)}")
    if work.shape != (batch, 2) or work.dtype != torch.int64 or not work.is_contiguous():
        raise ValueError(f"work must be contiguous int64 [{batch}, 2], got {work.dtype} {list(work.shape)}")
    if sizes[0] > LONGEST or depth < 1:
        raise ValueError(f"ngram_match takes matches of up to {LONGEST} tokens and at least 1 wanted, got {sizes[0]}, {depth}")
