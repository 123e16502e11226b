"""The Triton kernel that makes a work list from the lengths on the device; gpu.py launches it."""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..tree_attention.gpu_kernels import geometry, shallowest_query

NEVER = tl.constexpr(9223372036854775807)  # later than every stamp


@triton.jit(do_not_specialize=["batch", "kv_heads", "queries", "nodes", "list_len", "chunk", "capacity", "stamped"])
def plan_kernel(
    committed, node_depth, query_node, window, items, count, stamps, batch, kv_heads, queries, nodes, list_len, chunk, capacity,
    stamped, WINDOWED: tl.constexpr, LISTED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Grid (batch): every program sums the parts of all sequences before its own, then writes its own."""
    b = tl.program_id(0)
    shallowest = 0
    if WINDOWED:
        shallowest = shallowest_query(node_depth, query_node, queries, MOST)
    order = tl.arange(0, BLOCK_B)
    plen = tl.load(committed + order, mask=order < batch, other=0).to(tl.int32)
    _, _, totals = geometry(plen, shallowest, window, nodes, list_len, WINDOWED, LISTED)
    parts = tl.where(order < batch, (totals + chunk - 1) // chunk, 0)
    mine = tl.sum(tl.where(order == b, parts, 0), 0)
    total = tl.sum(tl.where(order == b, totals, 0), 0)
    before = tl.sum(tl.where(order < b, parts, 0), 0) * kv_heads
    for i in range(0, mine * kv_heads, BLOCK):
        own = i + tl.arange(0, BLOCK)
        write = (own < mine * kv_heads) & (before + own < capacity)
        part = own % mine
        at = items + (before + own) * 5
        tl.store(at, own * 0 + b, mask=write)
        tl.store(at + 1, own // mine, mask=write)
        tl.store(at + 2, part * chunk, mask=write)
        tl.store(at + 3, tl.minimum(part * chunk + chunk, total), mask=write)
        tl.store(at + 4, part, mask=write)
    if b == 0:
        tl.store(count, tl.minimum(tl.sum(parts, 0) * kv_heads, capacity))
        for layer in range(0, stamped):
            tl.store(stamps + 2 * layer, NEVER)
            tl.store(stamps + 2 * layer + 1, 0)
