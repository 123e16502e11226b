"""The Triton kernel of row_lse, and how every kernel of a round reads logits; gpu.py launches it.

A program owns a row and reads it once. Each lane keeps its own highest score, where it was and its sum of weights, so nothing
is reduced before the end. One exponential a token: with d = x - m and e = exp(-|d|), the sum becomes sum * e + 1 where x is the
new highest, else sum + e.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every score but -inf, and finite: a lane without tokens has no -inf - -inf


@triton.jit
def scaled(at, mask, inverse):
    """Scores logits / temperature in float32 of tokens, -inf where masked off."""
    return tl.load(at, mask=mask, other=float("-inf")).to(tl.float32) * inverse


@triton.jit(do_not_specialize=["ids_row"])
def stats_kernel(
    logits, ids, lse, best, best_value, logprob, inverse, logits_row, ids_row, ASKED: tl.constexpr, BLOCK_K: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * logits_row
    lanes = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    where = lanes
    for start in range(0, V, BLOCK):
        x = scaled(at + start + lanes, start + lanes < V, inverse)
        d = x - m
        e = tl.exp(-tl.abs(d))
        higher = d > 0
        total = tl.where(higher, total * e + 1.0, total + e)
        where = tl.where(higher, start + lanes, where)
        m = tl.maximum(m, x)
    highest = tl.max(m, 0)
    norm = tl.sum(total * tl.exp(m - highest), 0)
    row_lse = highest + tl.log(norm)
    tl.store(lse + row, row_lse)
    tl.store(best + row, tl.min(tl.where(m == highest, where, V), 0))
    tl.store(best_value + row, tl.where(norm > 0, highest, float("-inf")))
    if ASKED > 0:
        order = tl.arange(0, BLOCK_K)
        asked = tl.load(ids + row * ids_row + order, mask=order < ASKED, other=-1)
        x = scaled(at + asked, (asked >= 0) & (asked < V), inverse)
        tl.store(logprob + row * ASKED + order, x - row_lse, mask=order < ASKED)
