"""The Triton kernels of row_lse, and how every kernel of a round reads logits; gpu.py launches them.

Two launches. The first has a program for every block of BLOCK tokens of every row, which holds it whole: its highest logit, the
sum of weights beside that, one exponential a token, and where it is. The second joins the blocks of a row. Blocks have one
length, so a row's bits depend neither on the rows beside it nor on the GPU.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(3.0e38)  # beyond every score that is not infinite: no -inf - -inf
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scaled(at, mask, inverse):
    """Scores logits / temperature in float32 of tokens, -inf where masked off."""
    return tl.load(at, mask=mask, other=float("-inf")).to(tl.float32) * inverse


@triton.jit
def _finite(x):
    return tl.minimum(tl.maximum(x, -FAR), FAR)


@triton.jit
def stats_kernel(logits, inverse, highest, total, where, logits_row, V: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows * blocks): a block's highest logit, the sum of exp((logit - highest) / temperature), the first so high.

    Temperature comes after the difference: the highest logit has the highest score, so nothing else needs scores.
    """
    row, block = tl.program_id(0) // tl.cdiv(V, BLOCK), tl.program_id(0) % tl.cdiv(V, BLOCK)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = scaled(logits + row.to(tl.int64) * logits_row + ids, ids < V, 1.0)
    m = tl.max(x, 0)
    tl.store(highest + tl.program_id(0), m)
    tl.store(total + tl.program_id(0), tl.sum(tl.exp2((x - _finite(m)) * (inverse * LOG2_E)), 0))
    tl.store(where + tl.program_id(0), tl.min(tl.where(x == m, ids, V - 1), 0))


@triton.jit(do_not_specialize=["ids_row"])
def join_kernel(
    logits, ids, highest, total, where, lse, best, best_value, logprob, inverse, logits_row, ids_row, ASKED: tl.constexpr,
    BLOCK_K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows), after stats_kernel."""
    row, order = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    at, there = row * tl.cdiv(V, BLOCK) + order, order < tl.cdiv(V, BLOCK)
    m = tl.load(highest + at, mask=there, other=float("-inf"))
    first = tl.load(where + at, mask=there, other=V - 1)
    most = tl.max(m, 0)
    share = tl.exp2((_finite(m) - _finite(most)) * (inverse * LOG2_E))
    norm = tl.sum(tl.load(total + at, mask=there, other=0.0) * share, 0)
    row_lse = _finite(most * inverse) + tl.log(norm)
    tl.store(lse + row, row_lse)
    tl.store(best + row, tl.min(tl.where(m == most, first, V - 1), 0))
    tl.store(best_value + row, most * inverse)
    if ASKED > 0:
        wanted = tl.arange(0, BLOCK_K)
        asked = tl.load(ids + row * ids_row + wanted, mask=wanted < ASKED, other=-1)
        x = scaled(logits + row * logits_row + asked, (asked >= 0) & (asked < V), inverse)
        tl.store(logprob + row * ASKED + wanted, x - row_lse, mask=wanted < ASKED)
