"""The Triton kernel of ngram_match; gpu.py launches it.

Programs of a row look at disjoint blocks of its text and join what they found by an atomic maximum over (size of the match,
where its continuation starts): a longer match wins, of equals the later one. The program that arrives last reads it, writes
the continuation and leaves the counters at zero for the next launch.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["depth", "programs"])
def match_kernel(
    texts, lengths, work, tokens, num_tokens, text_row, depth, programs, SIZES: tl.constexpr, LONGEST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (programs, sequences)."""
    b = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    text = texts + b * text_row
    best = tl.program_id(0).to(tl.int64) * 0
    for first in range(tl.program_id(0) * BLOCK, length, programs * BLOCK):
        start = first + tl.arange(0, BLOCK)
        equal = start < length
        found = tl.zeros((BLOCK,), tl.int64)
        for back in tl.static_range(1, LONGEST + 1):
            last = tl.load(text + length - back, mask=length >= back, other=-1)
            equal = equal & (start >= back)
            equal = equal & (tl.load(text + start - back, mask=equal, other=-2) == last)
            if (SIZES >> (back - 1)) & 1:
                found = tl.where(equal, start.to(tl.int64) + (back << 32), found)
        best = tl.maximum(best, tl.max(found, 0))
    tl.atomic_max(work + b * 2, best)
    arrived = tl.atomic_add(work + b * 2 + 1, 1)
    if arrived == programs - 1:
        best = tl.atomic_xchg(work + b * 2, 0)
        tl.store(work + b * 2 + 1, 0)
        start = (best & 0xFFFFFFFF).to(tl.int32)
        order = tl.arange(0, BLOCK_D)
        at = start + order % tl.maximum(length - start, 1)
        kept = (order < depth) & (best > 0)
        tl.store(tokens + b * depth + order, tl.load(text + at, mask=kept, other=0), mask=order < depth)
        tl.store(num_tokens + b, tl.where(best > 0, depth, 0))
