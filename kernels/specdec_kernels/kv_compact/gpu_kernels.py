"""The Triton kernel of kv_compact; gpu.py launches it.

A program owns some KV heads of one layer's keys or values of one sequence, and one thread moves an element of a head for all
entries: it loads four of them, stores them, and goes on to the next four. That needs no barrier. Proof. Nodes rise along a path
and number from 1 below the root, so path[i] >= i + 1, and path[j] >= path[i] + (j - i) for i < j.

1. A source of a later entry is no place of an earlier one: path[j] >= (i + 1) + (j - i) = j + 1 > i + 1. So no thread may
   read what another has written, in whatever order the two come.
2. A place may be the source of an earlier entry or of its own, path[k] = i + 1 with k <= i. The thread that writes an element
   has read that of the source before, being the only one that moves it, and a thread's load comes before its own later store
   to the same address.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _source(path, entry, count, last):
    """The node that moves to slot `entry` + 1 behind the root, or 0 where none does; `last` is the last that the cache has."""
    node = tl.load(path + entry, mask=entry < count, other=0).to(tl.int64)
    return tl.where((node > entry + 1) & (node <= last), node, 0)


@triton.jit(do_not_specialize=["size", "path_batch"])
def compact_kernel(
    kv, path, counts, committed, size, path_batch, kv_layer, kv_two, kv_batch, kv_head, kv_slot, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, LONGEST: tl.constexpr,
):  # fmt: skip
    """Grid (layers * 2, blocks of heads, sequences)."""
    b = tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.load(counts + b).to(tl.int32), LONGEST)
    root = tl.load(committed + b).to(tl.int64)
    nodes, last = path + b * path_batch, size - 1 - root
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    there = (head < HEADS) & (column < DIM)
    half = tl.program_id(0).to(tl.int64)
    at = kv + half // 2 * kv_layer + half % 2 * kv_two + b * kv_batch + root * kv_slot + head * kv_head + column
    place = at + kv_slot
    for i in range(0, count, 4):  # the nodes before the rows, the rows before their places: loads then wait for memory together
        n0, n1 = _source(nodes, i, count, last), _source(nodes, i + 1, count, last)
        n2, n3 = _source(nodes, i + 2, count, last), _source(nodes, i + 3, count, last)
        row0 = tl.load(at + n0 * kv_slot, mask=there & (n0 > 0))
        row1 = tl.load(at + n1 * kv_slot, mask=there & (n1 > 0))
        row2 = tl.load(at + n2 * kv_slot, mask=there & (n2 > 0))
        row3 = tl.load(at + n3 * kv_slot, mask=there & (n3 > 0))
        tl.store(place, row0, mask=there & (n0 > 0))
        tl.store(place + kv_slot, row1, mask=there & (n1 > 0))
        tl.store(place + 2 * kv_slot, row2, mask=there & (n2 > 0))
        tl.store(place + 3 * kv_slot, row3, mask=there & (n3 > 0))
        place += 4 * kv_slot
