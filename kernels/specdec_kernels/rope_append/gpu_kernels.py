"""The Triton kernel of rope_append; gpu.py launches it.

A program owns one token and some of its heads. Heads of queries, keys and values alike are two halves of D/2; values are not
turned.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["queries", "table", "size", "pos_batch", "slot_batch"])
def rope_kernel(
    qkv, positions, slots, cos, sin, kv, q_norm, k_norm, out, eps, queries, table, size, qkv_batch, qkv_query, pos_batch,
    slot_batch, kv_two, kv_batch, kv_head, kv_slot, out_batch, out_query, out_head, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, blocks of heads)."""
    b = (tl.program_id(0) // queries).to(tl.int64)
    t = tl.program_id(0) % queries
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS + 2 * KV_HEADS) & (column < HALF)
    at = qkv + b * qkv_batch + t * qkv_query + head * (2 * HALF) + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    if NORMED:
        square = tl.sum(first * first + second * second, 1)[:, None] / (2 * HALF)
        scale = 1.0 / tl.sqrt_rn(square + eps)
        first = tl.where(is_value, first, first * scale * _weight(q_norm, k_norm, column, is_query, inside))
        second = tl.where(is_value, second, second * scale * _weight(q_norm, k_norm, column + HALF, is_query, inside))
    position = tl.load(positions + b * pos_batch + t)
    known = (position >= 0) & (position < table) & (column < HALF)
    c = tl.load(cos + position.to(tl.int64) * HALF + column, mask=known, other=float("nan"))
    s = tl.load(sin + position.to(tl.int64) * HALF + column, mask=known, other=float("nan"))
    turned_first = tl.where(is_value, first, first * c - second * s)
    turned_second = tl.where(is_value, second, second * c + first * s)
    q_at = out + b * out_batch + t * out_query + head * out_head + column
    tl.store(q_at, turned_first, mask=inside & is_query)
    tl.store(q_at + HALF, turned_second, mask=inside & is_query)
    slot = tl.load(slots + b * slot_batch + t).to(tl.int64)
    written = inside & (head >= HEADS) & (slot >= 0) & (slot < size)
    kv_row = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS).to(tl.int64)
    kv_at = kv + tl.where(is_value, kv_two, kv_two * 0) + b * kv_batch + kv_row * kv_head + slot * kv_slot + column
    tl.store(kv_at, turned_first, mask=written)
    tl.store(kv_at + HALF, turned_second, mask=written)


@triton.jit
def _weight(q_norm, k_norm, column, is_query, inside):
    """Weights of the RMS norm of every head's columns."""
    of_query = tl.load(q_norm + column, mask=inside & is_query, other=0.0).to(tl.float32)
    return of_query + tl.load(k_norm + column, mask=inside & (is_query == 0), other=0.0).to(tl.float32)
