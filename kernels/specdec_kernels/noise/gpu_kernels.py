"""Random numbers by counter inside Triton kernels, and the kernels that are nothing else; gpu.py launches them.

The words are Triton's own Philox-4x32-10 with our counter (block, position, sequence, purpose) and key (seed): the reference's.
"""

# mypy: disable-error-code="no-untyped-def,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
SERIES_BELOW = tl.constexpr(2.0**-7)  # of 1 - u, where log u loses its digits
SLACK = tl.constexpr(1e-3)  # more than quick_gumbel errs, by far


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
def quick_gumbel(word):
    """The same in float32, within SLACK. Close to u = 1, -log u is a series in 1 - u, which float32 has with all digits."""
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * TWO_TO_MINUS_32  # 1 - u
    series = rest * (1.0 + rest * (0.5 + rest * (1.0 / 3.0)))
    u = (word.to(tl.float32) + 0.5) * TWO_TO_MINUS_32
    return -tl.log(tl.where(rest < SERIES_BELOW, series, -tl.log(tl.minimum(u, 1.0 - SERIES_BELOW / 2))))


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
def noisy_argmax(at, inverse, seed, sequence, position, purpose, V: tl.constexpr, IS_LAW: tl.constexpr, BLOCK: tl.constexpr):
    """The token of largest score + Gumbel noise, the first of equals; score: at[] * inverse, or log at[] of a law.

    A block is first looked at in float32. Only where its best might beat what is found is it computed in float64, which then
    decides: about ln(number of blocks) + 1 times.
    """
    best = tl.full((), float("-inf"), tl.float64)
    token = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(at + ids, mask=ids < V, other=0.0 if IS_LAW else float("-inf")).to(tl.float32)
        score = tl.log(x) if IS_LAW else x * inverse
        word = block_words(seed, sequence, position, purpose, start, BLOCK)
        quick = tl.max(score + quick_gumbel(word), 0)
        if quick.to(tl.float64) + (SLACK + 1e-6 * tl.minimum(tl.abs(quick), 1e30)) >= best:  # -inf stays -inf
            exact = (tl.log(x.to(tl.float64)) if IS_LAW else score.to(tl.float64)) + gumbel(word)
            highest = tl.max(exact, 0)
            first = tl.min(tl.where(exact == highest, ids, V), 0)
            token = tl.where(highest > best, first, token)
            best = tl.maximum(best, highest)
    return token


@triton.jit(do_not_specialize=["purpose", "queries"])
def argmax_kernel(
    law, seed, sequences, positions, purpose, tokens, queries, law_batch, law_query, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (rows): the Gumbel-max draw from a law."""
    row = tl.program_id(0)
    b = row // queries
    at = law + b.to(tl.int64) * law_batch + (row % queries).to(tl.int64) * law_query
    token = noisy_argmax(at, 1.0, key(seed), tl.load(sequences + b), tl.load(positions + row), purpose, V, True, BLOCK)
    tl.store(tokens + row, token)
