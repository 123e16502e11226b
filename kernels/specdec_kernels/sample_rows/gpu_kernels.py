"""The Triton kernels that draw tokens from rows of logits; gpu.py launches them.

Each draw is two launches. The first has a program for every block of BLOCK tokens of every row: it computes what the block
offers, one or two numbers. The second has a program for every row: it picks the block in which the token lies and computes that
one again. Blocks have one length, so a row's bits depend neither on the rows beside it nor on the GPU.
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
    logits, lse, quick, inverse, seed, sequences, positions, purpose, tokens, logprob, queries, logits_batch, logits_query,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows), after noise's glance_kernel."""
    row = tl.program_id(0)
    b = row // queries
    at = logits + b.to(tl.int64) * logits_batch + (row % queries).to(tl.int64) * logits_query
    found = quick + row.to(tl.int64) * tl.cdiv(V, BLOCK)
    sequence, position = tl.load(sequences + b), tl.load(positions + row)
    token = noisy_argmax(at, found, inverse, key(seed), sequence, position, purpose, V, False, BLOCK, BLOCKS)
    _report(tokens, logprob, row, at, tl.load(lse + row), token, inverse)


@triton.jit
def _left_in_law(at, lse, ids, removed, inverse, V: tl.constexpr, K: tl.constexpr):
    weights = chance(at + ids, lse, ids < V, inverse)
    for k in tl.static_range(K):
        weights = tl.where(ids == tl.load(removed + k), 0.0, weights)
    return weights


@triton.jit
def _row_of(row, queries, logits, logits_batch, logits_query, removed, removed_batch, removed_query, K: tl.constexpr):
    """(the row's logits, its removed tokens: not read where K is 0)."""
    b, t = (row // queries).to(tl.int64), (row % queries).to(tl.int64)
    at = logits + b * logits_batch + t * logits_query
    gone = at
    if K > 0:
        gone = removed + b * removed_batch + t * removed_query
    return at, gone


@triton.jit(do_not_specialize=["queries", "removed_batch", "removed_query"])
def inverse_sums_kernel(
    logits, lse, inverse, removed, sums, queries, logits_batch, logits_query, removed_batch, removed_query, K: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows * blocks): the weight of each block."""
    row, block = tl.program_id(0) // tl.cdiv(V, BLOCK), tl.program_id(0) % tl.cdiv(V, BLOCK)
    at, gone = _row_of(row, queries, logits, logits_batch, logits_query, removed, removed_batch, removed_query, K)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(_left_in_law(at, tl.load(lse + row), ids, gone, inverse, V, K), 0))


@triton.jit(do_not_specialize=["purpose", "queries", "lane", "removed_batch", "removed_query"])
def inverse_kernel(
    logits, lse, inverse, seed, sequences, positions, purpose, lane, removed, sums, tokens, logprob, queries, logits_batch,
    logits_query, removed_batch, removed_query, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows), after inverse_sums_kernel."""
    row = tl.program_id(0)
    at, gone = _row_of(row, queries, logits, logits_batch, logits_query, removed, removed_batch, removed_query, K)
    order, row_lse = tl.arange(0, BLOCKS), tl.load(lse + row)
    found = sums + row.to(tl.int64) * tl.cdiv(V, BLOCK)
    weights = tl.load(found + order, mask=order < tl.cdiv(V, BLOCK), other=0.0)
    u = uniform(key(seed), tl.load(sequences + row // queries), tl.load(positions + row), purpose, lane)
    block, before, target = _block_beyond(weights, u, BLOCKS)
    token = V - 1
    if block < BLOCKS:
        ids = block * BLOCK + tl.arange(0, BLOCK)
        token = _token_beyond(_left_in_law(at, row_lse, ids, gone, inverse, V, K), ids, before, target)
    _report(tokens, logprob, row, at, row_lse, token, inverse)


@triton.jit
def _laws_of(
    b, node, target, target_lse, draft, draft_lse, law_row, target_batch, target_node, draft_batch, draft_row,
    NODES: tl.constexpr, LAWS: tl.constexpr, TABLED: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """Logits of p and of q at a node of sequence b, each with its log-sum-exp; of point masses q is p, and not read."""
    p_at = target + b.to(tl.int64) * target_batch + node * target_node
    p_lse = tl.load(target_lse + b * NODES + node)
    q_at, q_lse = p_at, p_lse
    if not POINT:
        of = tl.load(law_row + node).to(tl.int64) if TABLED else tl.minimum(node, LAWS - 1)
        q_at = draft + b.to(tl.int64) * draft_batch + of * draft_row
        q_lse = tl.load(draft_lse + b * LAWS + of)
    return p_at, p_lse, q_at, q_lse


@triton.jit
def _left_of_target(
    p_at, p_lse, q_at, q_lse, ids, inverse, b, num_refused, refused, offered_mass, rest_mass, V: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """(what the refusals of sequence b left of p, p); q is read only where something was refused."""
    order, count = tl.arange(0, BLOCK_K), tl.minimum(tl.load(num_refused + b).to(tl.int32), K)
    no = tl.load(refused + b * K + order, mask=order < K, other=-1).to(tl.int64)
    p = chance(p_at + ids, p_lse, ids < V, inverse)
    left = p
    if POINT:
        for j in range(count):
            left = tl.where(ids == tl.sum(tl.where(order == j, no, 0), 0), 0.0, left)
    else:
        offered = tl.load(offered_mass + b * K + order, mask=order < K, other=1.0)
        rest = tl.load(rest_mass + b * K + order, mask=order < K, other=1.0)
        q = chance(q_at + ids, q_lse, (ids < V) & (count > 0), inverse)
        left, _ = after_refusals(p, q, ids, count, no, 1.0 / offered, 1.0 / rest, BLOCK_K)
    return left, p


@triton.jit
def residual_sums_kernel(
    target, target_lse, draft, draft_lse, law_row, inverse, rows, num_refused, refused, offered_mass, rest_mass, sums,
    target_batch, target_node, draft_batch, draft_row, NODES: tl.constexpr, LAWS: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, TABLED: tl.constexpr, POINT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks): of each block what the refusals left of p, and p: sums [sequences, 2, blocks]."""
    b, block = tl.program_id(0) // tl.cdiv(V, BLOCK), tl.program_id(0) % tl.cdiv(V, BLOCK)
    node = tl.load(rows + b).to(tl.int64)
    p_at, p_lse, q_at, q_lse = _laws_of(
        b, node, target, target_lse, draft, draft_lse, law_row, target_batch, target_node, draft_batch, draft_row, NODES, LAWS,
        TABLED, POINT,
    )  # fmt: skip
    ids = block * BLOCK + tl.arange(0, BLOCK)
    left, p = _left_of_target(
        p_at, p_lse, q_at, q_lse, ids, inverse, b, num_refused, refused, offered_mass, rest_mass, V, K, BLOCK_K, POINT
    )
    at = sums + b.to(tl.int64) * (2 * tl.cdiv(V, BLOCK)) + block
    tl.store(at, tl.sum(left, 0))
    tl.store(at + tl.cdiv(V, BLOCK), tl.sum(p, 0))


@triton.jit(do_not_specialize=["purpose"])
def residual_kernel(
    target, target_lse, draft, draft_lse, law_row, inverse, rows, num_accepted, num_refused, refused, offered_mass, rest_mass,
    seed, sequences, first_positions, purpose, sums, tokens, logprob, target_batch, target_node, draft_batch, draft_row,
    NODES: tl.constexpr, LAWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TABLED: tl.constexpr, POINT: tl.constexpr,
    V: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (sequences), after residual_sums_kernel.

    TABLED: law_row says which draft row a node's children came from. POINT: drafts were point masses.
    """
    b = tl.program_id(0)
    node = tl.load(rows + b).to(tl.int64)
    p_at, p_lse, q_at, q_lse = _laws_of(
        b, node, target, target_lse, draft, draft_lse, law_row, target_batch, target_node, draft_batch, draft_row, NODES, LAWS,
        TABLED, POINT,
    )  # fmt: skip
    order = tl.arange(0, BLOCKS)
    found = sums + b.to(tl.int64) * (2 * tl.cdiv(V, BLOCK)) + order
    lefts = tl.load(found, mask=order < tl.cdiv(V, BLOCK), other=0.0)
    whole = tl.load(found + tl.cdiv(V, BLOCK), mask=order < tl.cdiv(V, BLOCK), other=0.0)
    some = tl.sum(lefts, 0) > 0
    position = tl.load(first_positions + b) + tl.load(num_accepted + b)
    u = uniform(key(seed), tl.load(sequences + b), position, purpose, node * 0)
    block, before, goal = _block_beyond(tl.where(some, lefts, whole), u, BLOCKS)
    token = V - 1
    if block < BLOCKS:
        ids = block * BLOCK + tl.arange(0, BLOCK)
        left, p = _left_of_target(
            p_at, p_lse, q_at, q_lse, ids, inverse, b, num_refused, refused, offered_mass, rest_mass, V, K, BLOCK_K, POINT
        )
        token = _token_beyond(tl.where(some, left, p), ids, before, goal)
    _report(tokens, logprob, b, p_at, p_lse, token, inverse)
