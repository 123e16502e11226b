"""The Triton kernels of tree attention; gpu.py launches them, reference.py says what they mean.

A program owns one (sequence, KV head), a block of packed query rows and one *part*: a run of `chunk` of the sequence's keys.
Row r is query r // GROUP of head r % GROUP of the KV head, so a KV row is read once for all of them. The keys of a sequence are
numbered first the kept ones (sinks, or an index list), then the prefix from the window on, then the corner; without a window
the number is the slot. Which part a key is in depends on its sequence alone, so a sequence has the same bits in every batch.

Scores are in base 2 here. Loads are masked, not only scores: slots beyond a row's corner may hold NaN. Offsets have 64 bits.
Names: m is the highest score so far, norm the sum of weights, acc that of weighted values (l and o in FlashAttention-2).
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer  # interpreted it does not work: STAMPED is off there

EVERYTHING = tl.constexpr(1 << 30)  # a window that reaches beyond every context
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def shallowest_query(node_depth, query_node, queries, MOST: tl.constexpr):
    """Depth of the query whose window begins first."""
    order = tl.arange(0, MOST)
    node = tl.load(query_node + order, mask=order < queries, other=0)
    depth = tl.load(node_depth + node, mask=order < queries, other=1 << 30)
    return tl.min(depth, 0).to(tl.int32)


@triton.jit
def geometry(plen, shallowest, window, nodes, list_len, WINDOWED: tl.constexpr, LISTED: tl.constexpr):
    """How the keys of sequences with `plen` committed tokens are numbered: (kept, shift, total).

    Key n < kept is a sink or a list's entry; the others lie in slot n + shift; total counts all, the corner's nodes included.
    """
    kept = plen * 0
    begin = plen * 0
    if WINDOWED:
        recent = tl.load(window + 1)
        recent = tl.where(recent > 0, recent, EVERYTHING)
        begin = tl.minimum(tl.maximum(plen + shallowest - recent + 1, 0), plen)
        if LISTED:
            kept = tl.minimum(begin, list_len)
        else:
            kept = tl.minimum(plen, tl.load(window))
            begin = tl.maximum(begin, kept)
    return kept, begin - kept, kept + plen - begin + nodes


@triton.jit
def _fold(queries, k_at, v_at, inside, seen, m, norm, acc, scale_log2, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """One block of keys into m, norm and acc of every row."""
    k = tl.load(k_at, mask=inside, other=0.0) if MASKED or PADDED else tl.load(k_at)
    s = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    highest = tl.maximum(m, tl.max(s, 1))
    base = highest
    if MASKED:
        base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing: never -inf - -inf
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(m - base)
    v = tl.load(v_at, mask=inside, other=0.0) if MASKED or PADDED else tl.load(v_at)
    acc = acc * fade[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return highest, norm * fade + tl.sum(p, 1), acc


@triton.jit
def _attend(
    q, k, v, committed, words, node_depth, query_node, window, index, b, h, rows, lo, hi,
    plen, kept, shift, scale_log2, alias_mask, queries, nodes, list_len, num_words, kv_heads,
    q_batch, q_query, q_head, kv_batch, kv_head, kv_slot,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, ALIASED: tl.constexpr,
):  # fmt: skip
    """Attention of a block of rows to keys lo..hi-1 of one (sequence, KV head): (m, norm, acc)."""
    PADDED: tl.constexpr = BLOCK_D != DIM
    t = rows // GROUP
    live = t < queries
    dims = tl.arange(0, BLOCK_D)
    real = dims < DIM
    q_at = q + b.to(tl.int64) * q_batch + t.to(tl.int64)[:, None] * q_query + (h * GROUP + rows % GROUP)[:, None] * q_head
    asking = tl.load(q_at + dims[None, :], mask=live[:, None] & real[None, :], other=0.0).to(k.dtype.element_ty)
    start = b.to(tl.int64) * kv_batch + h.to(tl.int64) * kv_head
    k += start
    v += start
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    order = tl.arange(0, BLOCK_N)

    rest = lo
    if not WINDOWED:  # whole blocks of the committed prefix need no mask at all
        rest = lo + tl.maximum(tl.minimum(hi, plen) - lo, 0) // BLOCK_N * BLOCK_N
        for n in range(lo, rest, BLOCK_N):
            slot = n + order
            if ALIASED:
                slot = slot & alias_mask
            at = slot.to(tl.int64)[:, None] * kv_slot + dims[None, :]
            m, norm, acc = _fold(asking, k + at, v + at, real[None, :], None, m, norm, acc, scale_log2, False, PADDED)

    if WINDOWED:
        recent = tl.load(window + 1)
        recent = tl.where(recent > 0, recent, EVERYTHING)
        asked = tl.load(node_depth + tl.load(query_node + t, mask=live, other=0), mask=live, other=0).to(tl.int32)
    for n in range(rest, hi, BLOCK_N):  # what is left of the prefix, and the corner
        key = n + order
        inside = key < hi
        slot = key
        if WINDOWED:
            slot = key + shift
            if LISTED:
                listed = tl.load(index + (b * kv_heads + h).to(tl.int64) * list_len + key, mask=inside & (key < kept), other=0)
                slot = tl.where(key < kept, listed, slot)
            else:
                slot = tl.where(key < kept, key, slot)
        node = slot - plen  # negative in the prefix
        in_corner = inside & (node >= 0)
        word = tl.load(
            words + t[:, None] * num_words + (node >> 5)[None, :], mask=live[:, None] & in_corner[None, :], other=0
        )
        seen = inside[None, :] & ((node < 0)[None, :] | (((word >> (node & 31)[None, :]) & 1) == 1))
        if WINDOWED:
            depth = tl.load(node_depth + node, mask=in_corner, other=0).to(tl.int32)
            depth = tl.where(node < 0, node, depth)
            distance = asked[:, None] - depth[None, :]
            near = distance < recent
            if LISTED:
                near = near | (key < kept)[None, :]
            else:
                is_sink = (plen + depth < tl.load(window))[None, :]
                near = near | (is_sink & (distance < tl.load(window + 2)))
            seen = seen & near
        if ALIASED:
            slot = slot & alias_mask
        at = slot.to(tl.int64)[:, None] * kv_slot + dims[None, :]
        there = inside[:, None] & real[None, :]
        m, norm, acc = _fold(asking, k + at, v + at, there, seen, m, norm, acc, scale_log2, True, PADDED)
    return m, norm, acc


@triton.jit
def _store(
    m, norm, acc, out, lse, part_out, part_lse, b, h, rows, part, fits, queries, kv_heads, parts,
    out_batch, out_query, out_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The answer where one part is all there may be, else the part for `combine_kernel`. Keys that do not fit show as NaN."""
    t = rows // GROUP
    dims = tl.arange(0, BLOCK_D)
    keep = ((t < queries) & (part < parts))[:, None] & (dims < DIM)[None, :]
    acc = acc * tl.where(norm > 0, 1.0 / norm, 0.0)[:, None]
    sum2 = tl.where(norm > 0, m + tl.log2(norm), float("-inf"))
    if FINAL:
        head = h * GROUP + rows % GROUP
        at = b.to(tl.int64) * out_batch + t.to(tl.int64)[:, None] * out_query + head[:, None] * out_head + dims[None, :]
        acc = tl.where(fits, acc, float("nan"))
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=keep)
        tl.store(lse + (b * queries + t) * (kv_heads * GROUP) + head, sum2 * LN_2, mask=(t < queries) & (part < parts))
    else:
        row = ((b * kv_heads + h).to(tl.int64) * parts + part) * (queries * GROUP) + rows
        tl.store(part_out + row[:, None] * DIM + dims[None, :], acc, mask=keep)
        tl.store(part_lse + row, sum2, mask=(t < queries) & (part < parts))


SCALARS = ["alias_mask", "queries", "nodes", "list_len", "num_words", "kv_heads", "parts", "chunk", "row_blocks"]


@triton.jit(do_not_specialize=SCALARS)
def split_kernel(
    q, k, v, committed, words, node_depth, query_node, window, index, out, lse, part_out, part_lse, stamps,
    scale_log2, alias_mask, queries, nodes, list_len, num_words, kv_heads, parts, chunk, row_blocks,
    q_batch, q_query, q_head, kv_batch, kv_head, kv_slot, out_batch, out_query, out_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, FINAL: tl.constexpr, ALIASED: tl.constexpr, STAMPED: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks * parts, batch * KV heads): row blocks are neighbours, so the second finds its KV in L2."""
    if STAMPED:
        tl.atomic_min(stamps, globaltimer())
    part = tl.program_id(0) // row_blocks
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(1) // kv_heads
    h = tl.program_id(1) % kv_heads
    plen = tl.load(committed + b).to(tl.int32)
    shallowest = 0
    if WINDOWED:
        shallowest = shallowest_query(node_depth, query_node, queries, MOST)
    kept, shift, total = geometry(plen, shallowest, window, nodes, list_len, WINDOWED, LISTED)
    lo = part * chunk
    if lo < total:
        m, norm, acc = _attend(
            q, k, v, committed, words, node_depth, query_node, window, index, b, h, rows, lo, tl.minimum(lo + chunk, total),
            plen, kept, shift, scale_log2, alias_mask, queries, nodes, list_len, num_words, kv_heads,
            q_batch, q_query, q_head, kv_batch, kv_head, kv_slot,
            GROUP, DIM, BLOCK_M, BLOCK_N, BLOCK_D, WINDOWED, LISTED, ALIASED,
        )  # fmt: skip
        _store(
            m, norm, acc, out, lse, part_out, part_lse, b, h, rows, part, total <= parts * chunk, queries, kv_heads, parts,
            out_batch, out_query, out_head, GROUP, DIM, BLOCK_D, FINAL,
        )  # fmt: skip
    if STAMPED:
        tl.atomic_max(stamps + 1, globaltimer())


@triton.jit(do_not_specialize=SCALARS)
def list_kernel(
    q, k, v, committed, words, node_depth, query_node, window, index, out, lse, part_out, part_lse, stamps, work, work_count,
    scale_log2, alias_mask, queries, nodes, list_len, num_words, kv_heads, parts, chunk, row_blocks,
    q_batch, q_query, q_head, kv_batch, kv_head, kv_slot, out_batch, out_query, out_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, FINAL: tl.constexpr, ALIASED: tl.constexpr, STAMPED: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """The same from a work list made on the device, on as many programs as the GPU holds: no length is in the grid."""
    if STAMPED:
        tl.atomic_min(stamps, globaltimer())
    shallowest = 0
    if WINDOWED:
        shallowest = shallowest_query(node_depth, query_node, queries, MOST)
    for turn in range(tl.program_id(0), tl.load(work_count) * row_blocks, tl.num_programs(0)):
        item = work + turn // row_blocks * 5
        rows = turn % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        b = tl.load(item)
        h = tl.load(item + 1)
        plen = tl.load(committed + b).to(tl.int32)
        kept, shift, total = geometry(plen, shallowest, window, nodes, list_len, WINDOWED, LISTED)
        m, norm, acc = _attend(
            q, k, v, committed, words, node_depth, query_node, window, index, b, h, rows, tl.load(item + 2), tl.load(item + 3),
            plen, kept, shift, scale_log2, alias_mask, queries, nodes, list_len, num_words, kv_heads,
            q_batch, q_query, q_head, kv_batch, kv_head, kv_slot,
            GROUP, DIM, BLOCK_M, BLOCK_N, BLOCK_D, WINDOWED, LISTED, ALIASED,
        )  # fmt: skip
        _store(
            m, norm, acc, out, lse, part_out, part_lse, b, h, rows, tl.load(item + 4), total <= parts * chunk, queries,
            kv_heads, parts, out_batch, out_query, out_head, GROUP, DIM, BLOCK_D, FINAL,
        )  # fmt: skip
    if STAMPED:
        tl.atomic_max(stamps + 1, globaltimer())


@triton.jit(do_not_specialize=["queries", "nodes", "list_len", "kv_heads", "parts", "chunk"])
def combine_kernel(
    part_out, part_lse, committed, node_depth, query_node, window, out, lse, stamps,
    queries, nodes, list_len, kv_heads, parts, chunk, out_batch, out_query, out_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    WINDOWED: tl.constexpr, LISTED: tl.constexpr, STAMPED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One row from its parts, in blocks of BLOCK_S in fixed order, so that more capacity does not change a bit."""
    row = tl.program_id(0) % (queries * GROUP)
    b = tl.program_id(0) // (queries * GROUP)
    h = tl.program_id(1)
    plen = tl.load(committed + b).to(tl.int32)
    shallowest = 0
    if WINDOWED:
        shallowest = shallowest_query(node_depth, query_node, queries, MOST)
    kept, shift, total = geometry(plen, shallowest, window, nodes, list_len, WINDOWED, LISTED)
    live = tl.minimum((total + chunk - 1) // chunk, parts)
    dims = tl.arange(0, BLOCK_D)
    order = tl.arange(0, BLOCK_S)
    m = float("-inf")
    norm = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for s in range(0, live, BLOCK_S):
        part = s + order
        at = ((b * kv_heads + h).to(tl.int64) * parts + part) * (queries * GROUP) + row
        sum2 = tl.load(part_lse + at, mask=part < live, other=float("-inf"))
        values = tl.load(
            part_out + at[:, None] * DIM + dims[None, :], mask=(part < live)[:, None] & (dims < DIM)[None, :], other=0.0
        )
        highest = tl.maximum(m, tl.max(sum2, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp2(sum2 - base)
        fade = tl.exp2(m - base)
        norm = norm * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(values * weight[:, None], 0)
        m = highest
    acc = tl.where(total <= parts * chunk, acc * tl.where(norm > 0, 1.0 / norm, 0.0), float("nan"))  # keys that do not fit
    head = h * GROUP + row % GROUP
    t = row // GROUP
    place = b.to(tl.int64) * out_batch + t.to(tl.int64) * out_query + head * out_head
    tl.store(out + place + dims, acc.to(out.dtype.element_ty), mask=dims < DIM)
    tl.store(lse + (b * queries + t) * (kv_heads * GROUP) + head, tl.where(norm > 0, m + tl.log2(norm), float("-inf")) * LN_2)
    if STAMPED:
        tl.atomic_max(stamps + 1, globaltimer())
