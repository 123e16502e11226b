"""Random numbers by counter inside Triton kernels, and the kernels that are nothing else; gpu.py launches them.

The words are Triton's own Philox-4x32-10 with our counter (block, position, sequence, purpose) and key (seed): the reference's.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
SERIES_BELOW = tl.constexpr(2.0**-3)  # of 1 - u, where log u loses its digits
LOG2_E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(3.0e38)  # beyond every score that is not infinite
SLACK = tl.constexpr(1e-3)  # several times what quick_exponential errs, as a share


@triton.jit
def uniform(seed, sequence, position, purpose, lane):
    """One float64 in [0, 1): the first word of block `lane`."""
    counter = (lane.to(tl.uint32), position.to(tl.uint32), sequence.to(tl.uint32))
    word, _, _, _ = tl.philox(seed, counter[0], counter[1], counter[2], purpose)
    return word.to(tl.float64) * TWO_TO_MINUS_32


@triton.jit
def block_words(seed, sequence, position, purpose, start, BLOCK: tl.constexpr):
    """Words start .. start + BLOCK - 1 of a position; start is a multiple of 4."""
    blocks = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, blocks, position.to(tl.uint32), sequence.to(tl.uint32), purpose)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel(word):
    """Gumbel noise of a word in float64, as the reference has it."""
    return -tl.log(-tl.log((word.to(tl.float64) + 0.5) * TWO_TO_MINUS_32))


@triton.jit
def quick_log(x):
    """log x in float32 of normal numbers above 0, within 2e-5 where it is small; in 8 instructions, where tl.log takes 25.

    The bits of a float are its logarithm, drawn straight between powers of two; a polynomial of the mantissa (least largest
    error) bends it.
    """
    bits = x.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # in [1, 2)
    bend = -1.24791813 + m * (2.8361605 + m * (-2.46122528 + m * (1.13062796 + m * (-0.288740426 + m * 0.0311040642))))
    return bits.to(tl.float32) * (0.6931471805599453 * 2.0**-23) + (bend - 127 * 0.6931471805599453)


@triton.jit
def quick_exponential(word):
    """-log u of a word in float32, within SLACK as a share. Close to u = 1 it is a series in 1 - u, which has all digits."""
    rest = (word ^ 0xFFFFFFFF).to(tl.float32) * TWO_TO_MINUS_32 + 2.0**-33  # 1 - u
    series = rest * (1.0 + rest * (0.5 + rest * (1.0 / 3.0 + rest * 0.25)))
    u = word.to(tl.float32) * TWO_TO_MINUS_32 + 2.0**-33
    return tl.where(rest < SERIES_BELOW, series, -quick_log(u))


@triton.jit
def key(seed):
    """The 64 bits of the key."""
    return tl.load(seed).to(tl.uint64)


@triton.jit(do_not_specialize=["purpose", "queries"])
def words_kernel(seed, sequences, positions, purpose, out, queries, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, blocks): words (KIND 0) or Gumbel noise (1) of every position."""
    row = tl.program_id(0)
    start = tl.program_id(1) * BLOCK
    sequence = tl.load(sequences + row // queries)
    word = block_words(key(seed), sequence, tl.load(positions + row), purpose, start, BLOCK)
    ids = start + tl.arange(0, BLOCK)
    made = word.to(tl.int64) if KIND == 0 else gumbel(word)
    tl.store(out + row.to(tl.int64) * count + ids, made, mask=ids < count)


@triton.jit(do_not_specialize=["purpose", "each", "numel"])
def uniform_kernel(seed, sequences, positions, lanes, purpose, out, each, numel, BLOCK: tl.constexpr):
    """Grid (blocks): one uniform per position; `each` positions per sequence."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    sequence = tl.load(sequences + at // each, mask=inside, other=0)
    position = tl.load(positions + at, mask=inside, other=0)
    lane = tl.load(lanes + at, mask=inside, other=0)
    tl.store(out + at, uniform(key(seed), sequence, position, purpose, lane), mask=inside)


@triton.jit
def _scores(at, ids, inverse, V: tl.constexpr, IS_LAW: tl.constexpr):
    """Scores of tokens in float32: at[] * inverse, or at[] itself of a law, whose logarithm is taken where it is needed."""
    x = tl.load(at + ids, mask=ids < V, other=0.0 if IS_LAW else float("-inf")).to(tl.float32)
    return x if IS_LAW else x * inverse


@triton.jit(do_not_specialize=["purpose", "queries"])
def glance_kernel(
    scores, inverse, seed, sequences, positions, purpose, quick, queries, scores_batch, scores_query, V: tl.constexpr,
    IS_LAW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows * blocks): the largest score + noise of each block, within its margin; noisy_argmax settles the rest."""
    row, block = tl.program_id(0) // tl.cdiv(V, BLOCK), tl.program_id(0) % tl.cdiv(V, BLOCK)
    b = row // queries
    at = scores + b.to(tl.int64) * scores_batch + (row % queries).to(tl.int64) * scores_query
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = _scores(at, ids, inverse, V, IS_LAW)
    x = tl.log(x) if IS_LAW else x
    word = block_words(key(seed), tl.load(sequences + b), tl.load(positions + row), purpose, block * BLOCK, BLOCK)
    # largest x - log e is least e * exp(highest - x): no second logarithm a token; infinities stay what they are
    highest = tl.minimum(tl.maximum(tl.max(x, 0), -FAR), FAR)
    least = tl.min(quick_exponential(word) * tl.exp2((highest - x) * LOG2_E), 0)
    tl.store(quick + tl.program_id(0), highest - tl.log(least))


@triton.jit
def noisy_argmax(
    at, quick, inverse, seed, sequence, position, purpose, V: tl.constexpr, IS_LAW: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token of largest score + Gumbel noise in float64, the first of equals; score: at[] * inverse, or log at[] of a law.

    quick  what glance_kernel found in each block of the row. Only blocks that may hold the best are computed: mostly one
    """
    order = tl.arange(0, BLOCKS)
    glance = tl.load(quick + order, mask=order < tl.cdiv(V, BLOCK), other=float("-inf"))
    margin = SLACK + 1e-6 * tl.minimum(tl.abs(glance), 1e30)  # infinite scores keep a finite one
    may_win = (glance > float("-inf")) & (glance + margin >= tl.max(glance - margin, 0))
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    for _ in range(tl.sum(may_win.to(tl.int32), 0)):
        block = tl.min(tl.where(may_win, order, BLOCKS), 0)
        may_win = may_win & (order > block)
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = _scores(at, ids, inverse, V, IS_LAW).to(tl.float64)
        word = block_words(seed, sequence, position, purpose, block * BLOCK, BLOCK)
        exact = (tl.log(x) if IS_LAW else x) + gumbel(word)
        highest = tl.max(exact, 0)
        first = tl.min(tl.where(exact == highest, ids, V), 0)
        token = tl.where(highest > best, first, token)
        best = tl.maximum(best, highest)
    return token


@triton.jit(do_not_specialize=["purpose", "queries"])
def argmax_kernel(
    law, quick, seed, sequences, positions, purpose, tokens, queries, law_batch, law_query, V: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the Gumbel-max draw from a law, after glance_kernel."""
    row = tl.program_id(0)
    b = row // queries
    at = law + b.to(tl.int64) * law_batch + (row % queries).to(tl.int64) * law_query
    found = quick + row.to(tl.int64) * tl.cdiv(V, BLOCK)
    sequence, position = tl.load(sequences + b), tl.load(positions + row)
    token = noisy_argmax(at, found, 1.0, key(seed), sequence, position, purpose, V, True, BLOCK, BLOCKS)
    tl.store(tokens + row, token)
