"""The Triton kernels that accept; gpu.py launches them.

One program per sequence. Chains and equal tokens take a few loads. A tree of drawn children is walked by its program, which
streams both laws of the current node once per refused child: the mass of what is left, and that of D for the next child, come
from one pass. Laws of earlier refusals are made again from a few numbers each, so nothing of the vocabulary's size is written.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from ..noise.gpu_kernels import key, uniform


@triton.jit
def chance(at, lse, mask, inverse):
    """Probabilities exp(logits / temperature - lse) in float64, made in float32; 0 where masked off."""
    return _as_chance(_logits(at, mask), lse, inverse)


@triton.jit
def _logits(at, mask):
    return tl.load(at, mask=mask, other=float("-inf"))


@triton.jit
def _as_chance(logits, lse, inverse):
    return tl.exp(logits.to(tl.float32) * inverse - lse).to(tl.float64)


@triton.jit
def after_refusals(p, q, ids, count, refused, per_offered, per_rest, BLOCK_K: tl.constexpr):
    """R and unnormalised D of tokens `ids` after the first `count` of the refusals: see reference.accept_tree.

    per_offered, per_rest  one over what the laws of each refusal are divided by
    """
    order = tl.arange(0, BLOCK_K)
    for j in range(count):
        at = order == j
        offered = q * tl.sum(tl.where(at, per_offered, 0.0), 0)
        p = tl.maximum(p - offered, 0.0) * tl.sum(tl.where(at, per_rest, 0.0), 0)
        q = tl.where(ids == tl.sum(tl.where(at, refused, 0), 0), 0.0, q)
    return p, q


@triton.jit
def _write_path(num_accepted, path, ranks, row, b, count, node, nodes, node_ranks, DEPTH: tl.constexpr, BLOCK_A: tl.constexpr):
    """What was accepted; zeros beyond it."""
    order = tl.arange(0, BLOCK_A)
    tl.store(num_accepted + b, count)
    tl.store(row + b, node)
    tl.store(path + b * DEPTH + order, tl.where(order < count, nodes, 0), mask=order < DEPTH)
    tl.store(ranks + b * DEPTH + order, tl.where(order < count, node_ranks, 0), mask=order < DEPTH)


@triton.jit
def _write_refusals(
    num_refused, refused, offered_mass, rest_mass, b, count, tokens, offered, rest, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    order = tl.arange(0, BLOCK_K)
    tl.store(num_refused + b, count)
    tl.store(refused + b * K + order, tl.where(order < count, tokens, -1), mask=order < K)
    tl.store(offered_mass + b * K + order, tl.where(order < count, offered, 1.0), mask=order < K)
    tl.store(rest_mass + b * K + order, tl.where(order < count, rest, 1.0), mask=order < K)


@triton.jit(do_not_specialize=["purpose", "tokens_batch", "chosen_batch", "logprob_batch", "draft_batch"])
def chain_kernel(
    tokens, counts, chosen, target_logprob, draft_logprob, seed, sequences, first_positions, purpose, num_accepted, path, ranks,
    row, num_refused, refused, offered_mass, rest_mass, tokens_batch, chosen_batch, logprob_batch, draft_batch, N: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EQUAL: tl.constexpr, POINT: tl.constexpr,
):  # fmt: skip
    """Grid (sequences). EQUAL: accept what equals `chosen`; else the test, POINT with q = 1."""
    b = tl.program_id(0).to(tl.int64)
    order = tl.arange(0, BLOCK_N)
    count = tl.load(counts + b).to(tl.int32)
    drafted = (order < N) & (order < count)
    token = tl.load(tokens + b * tokens_batch + order, mask=drafted, other=-1).to(tl.int64)
    if EQUAL:
        takes = token == tl.load(chosen + b * chosen_batch + order, mask=drafted, other=-2)
    else:
        p = tl.exp(tl.load(target_logprob + b * logprob_batch + order, mask=drafted, other=float("-inf"))).to(tl.float64)
        position = tl.load(first_positions + b) + order
        u = uniform(key(seed), tl.load(sequences + b), position, purpose, order * 0)
        if POINT:
            takes = u < p
        else:
            takes = u * tl.exp(tl.load(draft_logprob + b * draft_batch + order, mask=drafted, other=0.0)).to(tl.float64) < p
    accepted = tl.min(tl.where(takes & drafted, BLOCK_N, order), 0)
    accepted = tl.minimum(accepted, tl.minimum(tl.maximum(count, 0), N))
    _write_path(num_accepted, path, ranks, row, b, accepted, accepted, order + 1, order * 0 + 1, N, BLOCK_N)
    stop = tl.sum(tl.where(order == accepted, token, 0), 0)
    was_refused = tl.where(EQUAL, 0, (accepted < tl.minimum(count, N)).to(tl.int32))
    ones = tl.full((BLOCK_K,), 1.0, tl.float64)
    stops = tl.zeros((BLOCK_K,), tl.int64) + stop
    _write_refusals(num_refused, refused, offered_mass, rest_mass, b, was_refused, stops, ones, ones, K, BLOCK_K)


@triton.jit(do_not_specialize=["tokens_batch", "exists_batch", "chosen_batch"])
def tree_equal_kernel(
    tokens, exists, children, chosen, num_accepted, path, ranks, row, num_refused, refused, offered_mass, rest_mass,
    tokens_batch, exists_batch, chosen_batch, DEPTH: tl.constexpr, K: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_K: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Grid (sequences). ALL: every row drafted every node."""
    b = tl.program_id(0).to(tl.int64)
    order, levels = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_A)
    nodes = tl.zeros((BLOCK_A,), tl.int32)
    node_ranks = tl.zeros((BLOCK_A,), tl.int32)
    node = 0
    accepted = 0
    moving = 1
    for place in range(DEPTH):
        child = tl.load(children + node * K + order, mask=(order < K) & (moving > 0), other=-1).to(tl.int32)
        there = child > 0
        if not ALL:
            there = there & (tl.load(exists + b * exists_batch + child - 1, mask=there, other=0) != 0)
        token = tl.load(tokens + b * tokens_batch + child - 1, mask=there, other=-1).to(tl.int64)
        wanted = tl.load(chosen + b * chosen_batch + node).to(tl.int64)
        rank = tl.min(tl.where(there & (token == wanted), order, BLOCK_K), 0)
        moving = (rank < BLOCK_K).to(tl.int32)
        found = tl.sum(tl.where(order == rank, child, 0), 0)
        node = tl.where(moving > 0, found, node)
        nodes = tl.where((levels == place) & (moving > 0), found, nodes)
        node_ranks = tl.where((levels == place) & (moving > 0), rank + 1, node_ranks)
        accepted += moving
    _write_path(num_accepted, path, ranks, row, b, accepted, node, nodes, node_ranks, DEPTH, BLOCK_A)
    ones = tl.full((BLOCK_K,), 1.0, tl.float64)
    none = tl.zeros((BLOCK_K,), tl.int64)
    _write_refusals(num_refused, refused, offered_mass, rest_mass, b, 0, none, ones, ones, K, BLOCK_K)


@triton.jit
def _refusal_masses(
    p_at, p_lse, q_at, q_lse, inverse, token, count, refused, per_offered, per_rest, per_mass, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over the vocabulary of max(R - D, 0), and of D, unnormalised, without `token`; D is times `per_mass`.

    A block's logits are asked for while the block before is computed: one multiprocessor has little else to wait with.
    """
    lanes = tl.arange(0, BLOCK)
    rest = tl.zeros((BLOCK,), tl.float64)
    kept = tl.zeros((BLOCK,), tl.float64)
    p_next, q_next = _logits(p_at + lanes, lanes < V), _logits(q_at + lanes, lanes < V)
    for start in range(0, V, BLOCK):
        ids = start + lanes
        p, q = _as_chance(p_next, p_lse, inverse), _as_chance(q_next, q_lse, inverse)
        p_next, q_next = _logits(p_at + ids + BLOCK, ids + BLOCK < V), _logits(q_at + ids + BLOCK, ids + BLOCK < V)
        left, offered = after_refusals(p, q, ids, count, refused, per_offered, per_rest, BLOCK_K)
        rest += tl.maximum(left - offered * per_mass, 0.0)
        kept += tl.where(ids == token, 0.0, offered)
    return tl.sum(rest, 0), tl.sum(kept, 0)


@triton.jit(do_not_specialize=["purpose", "tokens_batch"])
def tree_kernel(
    tokens, children, law_row, target, target_lse, draft, draft_lse, inverse, seed, sequences, first_positions, purpose,
    num_accepted, path, ranks, row, num_refused, refused, offered_mass, rest_mass, tokens_batch, target_batch, target_node,
    draft_batch, draft_row, NODES: tl.constexpr, LAWS: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences). A turn tests one child, so DEPTH * K turns are enough, and nothing in memory can make it run on."""
    b = tl.program_id(0).to(tl.int64)
    order, levels = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_A)
    nodes = tl.zeros((BLOCK_A,), tl.int32)
    node_ranks = tl.zeros((BLOCK_A,), tl.int32)
    no = tl.zeros((BLOCK_K,), tl.int64)  # tokens refused at this node, and what their laws were divided by
    offered = tl.full((BLOCK_K,), 1.0, tl.float64)
    rest = tl.full((BLOCK_K,), 1.0, tl.float64)
    sequence, first, bits = tl.load(sequences + b), tl.load(first_positions + b), key(seed)
    node, place = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    rank, refusals = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    mass = tl.full((), 1.0, tl.float64)
    running = tl.full((), 1, tl.int1)
    for _ in range(DEPTH * K):
        if running:
            child = tl.load(children + node * K + rank).to(tl.int32)
            token = tl.load(tokens + b * tokens_batch + child - 1, mask=child > 0, other=0).to(tl.int64)
            of = tl.load(law_row + node).to(tl.int64)
            p_at = target + b * target_batch + node.to(tl.int64) * target_node
            q_at = draft + b * draft_batch + of * draft_row
            p_lse, q_lse = tl.load(target_lse + b * NODES + node), tl.load(draft_lse + b * LAWS + of)
            p, q = chance(p_at + token, p_lse, True, inverse), chance(q_at + token, q_lse, True, inverse)
            per_offered, per_rest = 1.0 / offered, 1.0 / rest
            r, d = after_refusals(p, q, token, refusals, no, per_offered, per_rest, BLOCK_K)
            d = tl.where(d > 0, d / mass, 0.0)
            u = uniform(bits, sequence, first + place, purpose, rank)
            tested = (child > 0) & (d > 0)
            takes = tested & (r > 0) & (u * d < r)
            if tested & (takes == 0):
                left, kept = _refusal_masses(
                    p_at, p_lse, q_at, q_lse, inverse, token, refusals, no, per_offered, per_rest, 1.0 / mass, V, BLOCK, BLOCK_K
                )
                takes = (left <= 0) & (r > 0)
                at = order == tl.where(left > 0, refusals, -1)
                no = tl.where(at, token, no)
                offered = tl.where(at, mass, offered)
                rest = tl.where(at, left, rest)
                refusals += (left > 0).to(tl.int32)
                mass = tl.where(left > 0, kept, mass)
            at = levels == tl.where(takes, place, -1)
            nodes = tl.where(at, child, nodes)
            node_ranks = tl.where(at, rank + 1, node_ranks)
            node = tl.where(takes, child, node)
            place += takes.to(tl.int32)
            refusals = tl.where(takes, 0, refusals)
            mass = tl.where(takes, 1.0, mass)
            running = tl.where(takes, place < DEPTH, (child > 0) & (rank + 1 < K))
            rank = tl.where(takes, 0, rank + 1)
    _write_path(num_accepted, path, ranks, row, b, place, node, nodes, node_ranks, DEPTH, BLOCK_A)
    _write_refusals(num_refused, refused, offered_mass, rest_mass, b, refusals, no, offered, rest, K, BLOCK_K)
