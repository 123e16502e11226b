"""The Triton kernel of kv_compact; gpu.py launches it.

A program owns some KV heads of one layer's keys or values of one sequence. A block of sources is read whole before any of its
places is written; a later block's sources lie behind an earlier block's places, so blocks may follow each other.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size", "path_batch"])
def compact_kernel(
    kv, path, counts, committed, size, path_batch, kv_layer, kv_two, kv_batch, kv_head, kv_slot, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """Grid (layers * 2, blocks of heads, sequences)."""
    b = tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.load(counts + b).to(tl.int32), LONGEST)
    if count > 0:
        root = tl.load(committed + b).to(tl.int64)
        rows = tl.arange(0, BLOCK_A * BLOCK_H)
        head = (tl.program_id(1) * BLOCK_H + rows // BLOCK_A).to(tl.int64)
        column = tl.arange(0, BLOCK_D)[None, :]
        half = tl.program_id(0).to(tl.int64)
        base = kv + half // 2 * kv_layer + half % 2 * kv_two + b * kv_batch + (head * kv_head)[:, None] + column
        for start in range(0, LONGEST, BLOCK_A):
            entry = start + rows % BLOCK_A
            node = tl.load(path + b * path_batch + entry, mask=entry < count, other=0).to(tl.int64)
            moved = (entry < count) & (node > entry + 1) & (root + node < size) & (head < HEADS)
            mask = moved[:, None] & (column < DIM)
            kept = tl.load(base + ((root + node) * kv_slot)[:, None], mask=mask)
            tl.debug_barrier()  # a place of one thread may be a source of another
            tl.store(base + ((root + 1 + entry) * kv_slot)[:, None], kept, mask=mask)
            tl.debug_barrier()
