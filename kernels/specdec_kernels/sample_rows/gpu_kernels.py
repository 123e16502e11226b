"""The Triton kernels that draw tokens from rows of logits; gpu.py launches them.

One program per row. A draw by inverse distribution reads the row once: the weights of its blocks stay in registers, and their
cumulative sums name the block in which the token lies; only that block is read again.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..accept.gpu_kernels import after_refusals, chance
from ..noise.gpu_kernels import key, noisy_argmax, uniform
from ..row_lse.gpu_kernels import scaled


@triton.jit
def _report(tokens, logprob, row, at, lse, token, inverse):
    tl.store(tokens + row, token)
    tl.store(logprob + row, scaled(at + token, True, inverse) - lse)


@triton.jit
def _block_beyond(sums, u, BLOCKS: tl.constexpr):
    """(block, weight before it, target): where cumulative weight passes u times the total. A total of 0 names block BLOCKS."""
    order = tl.arange(0, BLOCKS)
    cumulative = tl.cumsum(sums, 0)
    target = u * tl.max(cumulative, 0)
    block = tl.sum((cumulative <= target).to(tl.int32), 0)
    before = tl.max(tl.where(order < block, cumulative, 0.0), 0)
    return block, before, target


@triton.jit
def _token_beyond(weights, ids, before, target):
    """The first token of a block where cumulative weight passes the target; at the latest its last one with any weight."""
    beyond = before + tl.cumsum(weights, 0) > target
    last = tl.max(tl.where(weights > 0, ids, -1), 0)
    return tl.min(tl.where(beyond, ids, last), 0)


@triton.jit(do_not_specialize=["purpose", "queries"])
def gumbel_kernel(
    logits, lse, inverse, seed, sequences, positions, purpose, tokens, logprob, queries, logits_batch, logits_query,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0)
    b = row // queries
    at = logits + b.to(tl.int64) * logits_batch + (row % queries).to(tl.int64) * logits_query
    token = noisy_argmax(at, inverse, key(seed), tl.load(sequences + b), tl.load(positions + row), purpose, V, False, BLOCK)
    _report(tokens, logprob, row, at, tl.load(lse + row), token, inverse)


@triton.jit
def _left_in_law(at, lse, ids, removed, inverse, V: tl.constexpr, K: tl.constexpr):
    weights = chance(at + ids, lse, ids < V, inverse)
    for k in tl.static_range(K):
        weights = tl.where(ids == tl.load(removed + k), 0.0, weights)
    return weights


@triton.jit(do_not_specialize=["purpose", "queries", "lane", "removed_batch", "removed_query"])
def inverse_kernel(
    logits, lse, inverse, seed, sequences, positions, purpose, lane, removed, tokens, logprob, queries, logits_batch,
    logits_query, removed_batch, removed_query, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0)
    b = row // queries
    t = (row % queries).to(tl.int64)
    at = logits + b.to(tl.int64) * logits_batch + t * logits_query
    gone = at  # not read where K is 0
    if K > 0:
        gone = removed + b.to(tl.int64) * removed_batch + t * removed_query
    row_lse = tl.load(lse + row)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, V, BLOCK):
        weights = _left_in_law(at, row_lse, start + lanes, gone, inverse, V, K)
        sums = tl.where(tl.arange(0, BLOCKS) == start // BLOCK, tl.sum(weights, 0), sums)
    u = uniform(key(seed), tl.load(sequences + b), tl.load(positions + row), purpose, lane)
    block, before, target = _block_beyond(sums, u, BLOCKS)
    token = V - 1
    if block < BLOCKS:
        ids = block * BLOCK + lanes
        token = _token_beyond(_left_in_law(at, row_lse, ids, gone, inverse, V, K), ids, before, target)
    _report(tokens, logprob, row, at, row_lse, token, inverse)


@triton.jit
def _left_of_target(
    p_at, p_lse, q_at, q_lse, ids, inverse, count, refused, offered, rest, V: tl.constexpr, BLOCK_K: tl.constexpr,
    POINT: tl.constexpr,
):  # fmt: skip
    """(what the refusals left of p, p); q is read only where something was refused."""
    p = chance(p_at + ids, p_lse, ids < V, inverse)
    if POINT:
        left = p
        order = tl.arange(0, BLOCK_K)
        j = 0
        while j < count:
            left = tl.where(ids == tl.sum(tl.where(order == j, refused, 0), 0), 0.0, left)
            j += 1
    else:
        q = chance(q_at + ids, q_lse, (ids < V) & (count > 0), inverse)
        left, _ = after_refusals(p, q, ids, count, refused, offered, rest, BLOCK_K)
    return left, p


@triton.jit(do_not_specialize=["purpose"])
def residual_kernel(
    target, target_lse, draft, draft_lse, law_row, inverse, rows, num_accepted, num_refused, refused, offered_mass, rest_mass,
    seed, sequences, first_positions, purpose, tokens, logprob, target_batch, target_node, draft_batch, draft_row,
    NODES: tl.constexpr, LAWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TABLED: tl.constexpr, POINT: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (sequences). TABLED: law_row says which draft row a node's children came from. POINT: drafts were point masses."""
    b = tl.program_id(0)
    node = tl.load(rows + b).to(tl.int64)
    count = tl.load(num_refused + b).to(tl.int32)
    order, lanes, blocks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    no = tl.load(refused + b * K + order, mask=order < K, other=-1).to(tl.int64)
    offered = tl.load(offered_mass + b * K + order, mask=order < K, other=1.0)
    rest = tl.load(rest_mass + b * K + order, mask=order < K, other=1.0)
    p_at = target + b.to(tl.int64) * target_batch + node * target_node
    p_lse = tl.load(target_lse + b * NODES + node)
    q_at, q_lse = p_at, p_lse
    if not POINT:
        of = tl.load(law_row + node).to(tl.int64) if TABLED else tl.minimum(node, LAWS - 1)
        q_at = draft + b.to(tl.int64) * draft_batch + of * draft_row
        q_lse = tl.load(draft_lse + b * LAWS + of)
    sums = tl.zeros((BLOCKS,), tl.float64)
    whole = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, V, BLOCK):
        left, p = _left_of_target(
            p_at, p_lse, q_at, q_lse, start + lanes, inverse, count, no, offered, rest, V, BLOCK_K, POINT
        )
        sums = tl.where(blocks == start // BLOCK, tl.sum(left, 0), sums)
        whole = tl.where(blocks == start // BLOCK, tl.sum(p, 0), whole)
    some = tl.sum(sums, 0) > 0
    position = tl.load(first_positions + b) + tl.load(num_accepted + b)
    u = uniform(key(seed), tl.load(sequences + b), position, purpose, node * 0)
    block, before, goal = _block_beyond(tl.where(some, sums, whole), u, BLOCKS)
    token = V - 1
    if block < BLOCKS:
        ids = block * BLOCK + lanes
        left, p = _left_of_target(p_at, p_lse, q_at, q_lse, ids, inverse, count, no, offered, rest, V, BLOCK_K, POINT)
        token = _token_beyond(tl.where(some, left, p), ids, before, goal)
    _report(tokens, logprob, b, p_at, p_lse, token, inverse)
