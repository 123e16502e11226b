"""The round's Triton kernels, interpreted: each equals its reference, writes what it is given and nothing beside it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from specdec_kernels.accept import gpu as accept
from specdec_kernels.accept import reference as accept_reference
from specdec_kernels.accept.reference import Accepted
from specdec_kernels.kv_compact import gpu as compact
from specdec_kernels.kv_compact import reference as compact_reference
from specdec_kernels.noise import gpu as noise
from specdec_kernels.noise import reference as noise_reference
from specdec_kernels.rope_append import gpu as rope
from specdec_kernels.rope_append import reference as rope_reference
from specdec_kernels.row_lse import gpu as stats
from specdec_kernels.row_lse import reference as stats_reference
from specdec_kernels.row_lse.reference import RowStats
from specdec_kernels.sample_rows import gpu as sample
from specdec_kernels.sample_rows import reference as sample_reference
from specdec_kernels.sample_rows.reference import Drawn

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
noise_kernels = pytest.importorskip("specdec_kernels.noise.gpu_kernels")
quick_exponential, gumbel = noise_kernels.quick_exponential, noise_kernels.gumbel
pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
GUARD = 24  # elements on either side of an output
PUBLISHED = (  # Philox-4x32-10 of the Random123 distribution, counters and keys that our arguments reach
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


def random(*shape, seed, dtype=torch.float32, spread=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def integers(*shape, seed, high, low=0, dtype=torch.int64):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Guarded:
    """Outputs in the middle of buffers full of a mark."""

    def __init__(self):
        self.buffers = []

    def like(self, tensor):
        mark = 77 if not tensor.dtype.is_floating_point else -123.0
        buffer = torch.full((tensor.numel() + 2 * GUARD,), mark, dtype=tensor.dtype)
        self.buffers.append((buffer, mark))
        return buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)

    def fields(self, made):
        return type(made)(*(self.like(getattr(made, f.name)) for f in dataclasses.fields(made)))

    def check(self):
        for buffer, mark in self.buffers:
            assert (buffer[:GUARD] == mark).all()
            assert (buffer[buffer.numel() - GUARD :] == mark).all()


def same(made, expected, tolerance=0.0):
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(made, field.name), getattr(expected, field.name)
        if theirs.dtype.is_floating_point:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert torch.equal(ours, theirs), field.name


@pytest.mark.parametrize(("counter", "seed", "words"), PUBLISHED)
def test_words_are_the_published_ones(counter, seed, words):
    block, position, sequence, purpose = (c - (1 << 32) if c >> 31 and i else c for i, c in enumerate(counter))
    at = torch.tensor([[position]]), torch.tensor([sequence])
    if block == 0:
        assert noise.words(seed, at[1], at[0], purpose, 4).flatten().tolist() == list(words)
    lane = torch.tensor([[block]], dtype=torch.int64).to(torch.int32)
    assert noise.uniform(seed, at[1], at[0], purpose, lane).item() == words[0] * 2.0**-32


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 100, 2049])
def test_noise_is_the_reference_s(count, kind):
    sequences = torch.tensor([3, -1, 2**31 - 1], dtype=kind)
    positions = torch.tensor([[0, 5], [7, 2**31 - 1], [1, 2]], dtype=kind)
    for seed in (0, 2**63 + 5, torch.tensor([-(2**40)])):
        guarded = Guarded()
        out = guarded.like(torch.empty(3, 2, count, dtype=torch.int64))
        args = (sequences, positions, 2)
        expected = noise_reference.words(seed, *args, count)
        assert torch.equal(noise.words(seed, *args, count, out), expected)
        assert torch.equal(noise.uniform(seed, *args, 3), noise_reference.uniform(seed, *args, 3))
        made, exact = noise.gumbel(seed, *args, count), noise_reference.gumbel(seed, *args, count)
        assert ((made - exact).abs() <= 2 * 2.0**-52 * exact.abs().clamp(min=1)).all()
        guarded.check()


@pytest.mark.parametrize("vocabulary", [100, 1000, 2049, 9000])
def test_gumbel_draws_are_the_reference_s_token_for_token(vocabulary):
    logits, sequences, positions = random(5, 3, vocabulary, seed=vocabulary), torch.arange(5), integers(5, 3, seed=1, high=9999)
    logits[1, 0, 3:] = -torch.inf
    law = logits.softmax(-1)
    guarded = Guarded()
    out = guarded.like(torch.empty(5, 3, dtype=torch.int32))
    made = noise.gumbel_argmax(law, 9, sequences, positions, 3, out)
    assert torch.equal(made.long(), noise_reference.gumbel_argmax(law, 9, sequences, positions, 3))
    args = (logits, logits.logsumexp(-1), 0.5, 9, sequences, positions, 3)
    drawn = sample.draw_gumbel(*args, guarded.fields(Drawn.empty(5, 3, device=CPU)))
    same(drawn, sample_reference.draw_gumbel(*args), 2e-6)
    guarded.check()


@triton.jit
def both_kernel(words, quick, exact, BLOCK: tl.constexpr):
    word = tl.load(words + tl.arange(0, BLOCK)).to(tl.uint32)
    tl.store(quick + tl.arange(0, BLOCK), quick_exponential(word))
    tl.store(exact + tl.arange(0, BLOCK), gumbel(word))


def test_a_quick_glance_misses_no_best_token():
    """Words at both ends of the range, where float32 has no digits left, against the float64 noise."""
    edges = [(1 << k) + d for k in range(32) for d in (-1, 0, 1)] + [(1 << 32) - (1 << k) for k in range(32)]
    words = torch.tensor(edges + integers(4096 - len(edges), seed=3, high=1 << 32).tolist())
    quick, exact = torch.empty(4096), torch.empty(4096, dtype=torch.float64)
    both_kernel[(1,)](words, quick, exact, BLOCK=4096)
    off = (quick.double().log() + exact).abs()  # of the noise, as it enters a score
    assert 1e-6 < off.max() < noise_kernels.SLACK.value / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 100), (5, 1000), (3, 2049), (2, 20000)])
def test_row_statistics_are_the_reference_s(rows, vocabulary, dtype):
    wide = random(rows, vocabulary + 7, seed=rows, dtype=dtype, spread=4.0)
    wide[:, vocabulary:] = torch.nan  # beside the vocabulary
    logits = wide[:, :vocabulary]
    logits[0, 10:90] = -torch.inf
    logits[-1, [20, 40]] = 30.0  # the first of equals
    ids = integers(rows, 3, seed=2, low=-1, high=vocabulary + 1, dtype=torch.int32)
    guarded = Guarded()
    out = guarded.fields(RowStats.empty(rows, 3, CPU))
    made = stats.row_lse(logits, 0.7, ids, out)
    assert made is out
    same(made, stats_reference.row_lse(logits, 0.7, ids), 3e-6)
    assert made.best[-1].item() == 20
    same(stats.row_lse(logits, 1.0), stats_reference.row_lse(logits, 1.0), 3e-6)
    guarded.check()


def test_a_row_without_any_chance_has_lse_minus_infinity_and_nan_shows():
    logits = torch.full((2, 50), -torch.inf)
    logits[1, 3] = torch.nan
    made = stats.row_lse(logits, 1.0)
    assert made.lse[0].item() == -math.inf
    assert (made.best[0].item(), made.best_value[0].item()) == (0, -math.inf)
    assert made.lse[1].isnan()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "kv_heads", "dim"), [(1, 1, 4, 1, 16), (3, 5, 6, 2, 80), (2, 3, 3, 3, 128)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rope_append_is_the_reference_s(batch, queries, heads, kv_heads, dim, dtype, normed):
    size, table = 11, 40
    qkv = random(batch, queries, (heads + 2 * kv_heads) * dim, seed=1, dtype=dtype)
    angles = random(table, dim // 2, seed=2)
    slots = torch.stack([torch.randperm(size, generator=torch.Generator().manual_seed(b))[:queries] for b in range(batch)])
    slots[0, 0], slots[-1, -1] = -1, size  # neither may be written
    positions = integers(batch, queries, seed=3, high=table, dtype=torch.int32)
    if queries > 1:
        positions[0, 1] = table  # outside the table
    weights = [random(dim, seed=s, dtype=dtype) for s in (4, 5)] if normed else [None, None]
    guarded = Guarded()
    ours = guarded.like(torch.empty(2, batch, kv_heads, size, dim, dtype=dtype))
    out = guarded.like(qkv.view(batch, queries, -1, dim)[:, :, :heads])
    ours.fill_(torch.nan)  # unused slots stay as they are
    theirs = ours.clone()
    rest = (angles.cos(), angles.sin())
    made = rope.rope_append(qkv, positions, slots, *rest, ours, *weights, 1e-5, out)
    expected = rope_reference.rope_append(qkv, positions, slots, *rest, theirs, *weights, 1e-5)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(made, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(ours[1], theirs[1]) or ours[1].isnan().any(), "values are copies"
    guarded.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [1, 3, 20])
def test_compaction_is_the_reference_s(longest, dtype):
    batch, size = 5, 64
    generator = torch.Generator().manual_seed(longest)
    path = torch.stack([torch.randperm(40, generator=generator)[:longest].sort().values + 1 for _ in range(batch)])
    counts, committed = integers(batch, seed=1, high=longest + 1), torch.tensor([0, 7, 20, 23, 60], dtype=torch.int32)
    counts[2] = longest
    guarded = Guarded()
    ours = guarded.like(torch.empty(3, 2, batch, 3, size, 24, dtype=dtype))
    ours.copy_(random(3, 2, batch, 3, size, 24, seed=2))
    ours[:, :, 4, :, 61:] = torch.nan
    theirs = ours.clone()
    compact.kv_compact(ours, path, counts, committed)
    compact_reference.kv_compact(theirs, path, counts, committed)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    guarded.check()


def chain(batch, drafted, vocabulary, seed, dtype=torch.float32):
    target = random(batch, drafted + 1, vocabulary, seed=seed, spread=2.0, dtype=dtype)
    draft = (target[:, :drafted].float() + random(batch, drafted, vocabulary, seed=seed + 1, spread=0.8)).to(dtype)
    lse = [stats_reference.row_lse(x.flatten(0, 1), 0.5).lse.view(x.shape[:2]) for x in (target, draft)]
    first, sequences = torch.arange(batch) * 9, torch.arange(batch) + 2
    positions = first[:, None] + torch.arange(drafted)
    tokens = sample_reference.draw_inverse(draft, lse[1], 0.5, 3, sequences, positions, 0).tokens
    return target, draft, lse, tokens, first, sequences


@pytest.mark.parametrize("point", [False, True])
@pytest.mark.parametrize(("batch", "drafted", "vocabulary"), [(1, 1, 100), (5, 4, 1000), (3, 7, 2049)])
def test_chains_are_accepted_and_continued_as_the_reference_does(batch, drafted, vocabulary, point):
    target, draft, lse, tokens, first, sequences = chain(batch, drafted, vocabulary, 5)
    counts = torch.arange(batch) % (drafted + 1)
    counts[0] = drafted
    logits = [x.flatten(0, 1) for x in (target[:, :-1], draft)]
    p, q = (stats_reference.row_lse(x, 0.5, tokens.view(-1, 1)).logprob.view(batch, drafted) for x in logits)
    guarded = Guarded()
    args = (tokens, counts, p, None if point else q, 3, sequences, first, 1)
    made = accept.accept_chain(*args, guarded.fields(Accepted.empty(batch, drafted, 1, CPU)))
    same(made, accept_reference.accept_chain(*args))
    laws = (target, lse[0], None if point else draft, None if point else lse[1], None, 0.5)
    drawn = sample.draw_residual(*laws, made, 3, sequences, first, 2, guarded.fields(Drawn.empty(batch, device=CPU)))
    same(drawn, sample_reference.draw_residual(*laws, made, 3, sequences, first, 2), 3e-6)
    chosen = torch.cat([tokens, tokens[:, :1]], 1)
    chosen[-1, drafted // 2] += 1
    equal = accept.accept_chain_equal(tokens, counts, chosen, guarded.fields(Accepted.empty(batch, drafted, 2, CPU)))
    same(equal, accept_reference.accept_chain_equal(tokens, counts, chosen, Accepted.empty(batch, drafted, 2, CPU)))
    guarded.check()


def test_chains_of_no_drafts_accept_nothing():
    none, counts = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    same(accept.accept_chain_equal(none, counts, torch.ones(2, 1, dtype=torch.int64)),
         accept_reference.accept_chain_equal(none, counts, torch.ones(2, 1, dtype=torch.int64)))  # fmt: skip


TREES = {  # children of every node, breadth-first; which law the children come from
    "two levels": [[1, 2, 3], [4, 5], [6, -1], [7, -1], [], [], [], []],
    "star": [[1, 2, 3, 4, 5], [], [], [], [], []],
    "chain": [[1], [2], []],
}


def tree(name, batch, vocabulary, seed, spread=2.0, away=0.8):
    """A tree with children drawn one at a time from the draft's laws."""
    most = max(map(len, TREES[name]))
    children = torch.tensor([c + [-1] * (most - len(c)) for c in TREES[name]], dtype=torch.int32)
    nodes, parents = len(TREES[name]), [v for v, c in enumerate(TREES[name]) if c]
    depths = [0] * nodes
    for v in parents:
        for c in TREES[name][v]:
            depths[c] = depths[v] + 1 if c > 0 else 0
    law_row = torch.tensor([parents.index(v) if v in parents else 0 for v in range(nodes)])
    target = random(batch, nodes, vocabulary, seed=seed, spread=spread)
    draft = target[:, parents] + random(batch, len(parents), vocabulary, seed=seed + 1, spread=away)
    lse = [stats_reference.row_lse(x.flatten(0, 1), 0.5).lse.view(x.shape[:2]) for x in (target, draft)]
    first, sequences, tokens = torch.arange(batch) * 7, torch.arange(batch), torch.zeros(batch, nodes - 1, dtype=torch.int64)
    for row, v in enumerate(parents):
        drawn = torch.zeros(batch, 1, 0, dtype=torch.int64)
        for lane, child in enumerate(c for c in TREES[name][v] if c > 0):
            at = slice(row, row + 1)
            made = sample_reference.draw_inverse(
                draft[:, at], lse[1][:, at], 0.5, seed, sequences, first[:, None] + depths[v], 0, lane, drawn
            )
            drawn = torch.cat([drawn, made.tokens[..., None]], -1)
            tokens[:, child - 1] = made.tokens[:, 0]
    return children, law_row, target, draft, lse, tokens, first, sequences, max(depths)


@pytest.mark.parametrize(("batch", "vocabulary"), [(5, 100), (2, 2049), (1, 4500)])
@pytest.mark.parametrize("name", TREES)
def test_trees_are_accepted_and_continued_as_the_reference_does(name, batch, vocabulary):
    refusals = 0
    for seed, (spread, away) in enumerate(((1.0, 0.8), (0.5, 2.0), (20.0, 20.0))):  # the last one's support is soon used up
        made = tree(name, batch, vocabulary, seed, spread, away)
        children, law_row, target, draft, lse, tokens, first, sequences, depth = made
        guarded = Guarded()
        laws = (target, lse[0], draft, lse[1])
        args = (tokens, children, law_row, *laws, 0.5, seed, sequences, first, 1, depth)
        made = accept.accept_tree(*args, guarded.fields(Accepted.empty(batch, depth, children.shape[1], CPU)))
        same(made, accept_reference.accept_tree(*args), 1e-5)
        drawn = sample.draw_residual(*laws, law_row, 0.5, made, seed, sequences, first, 2)
        same(drawn, sample_reference.draw_residual(*laws, law_row, 0.5, made, seed, sequences, first, 2), 3e-6)
        refusals = max(refusals, int(made.num_refused.max()))
        guarded.check()
    assert refusals > 1 or name == "chain" or batch == 1


def test_equal_trees_are_accepted_as_the_reference_does():
    children, _, _, _, _, tokens, *_, depth = tree("two levels", 5, 100, 1)
    chosen = torch.zeros(5, 8, dtype=torch.int64)
    chosen[:, 0], chosen[:, 1], chosen[:, 3] = tokens[:, 0], tokens[:, 4], tokens[:, 6]
    chosen[1, 0] = tokens[1, 2]
    chosen[2, 0] = -3
    exists = torch.ones(5, 7, dtype=torch.bool)
    exists[3, 0] = exists[4, 4] = False
    for there in (None, exists):
        guarded = Guarded()
        out = guarded.fields(Accepted.empty(5, depth, children.shape[1], CPU))
        made = accept.accept_tree_equal(tokens, there, children, chosen, depth, out)
        same(made, accept_reference.accept_tree_equal(tokens, there, children, chosen, depth))
        assert made.num_accepted.tolist() == ([2, 2, 0, 2, 2] if there is None else [2, 2, 0, 0, 1])
        guarded.check()


def test_laws_of_exact_probabilities_are_drawn_alike_whatever_the_order_of_sums():
    """Probabilities k / 4096 and uniforms on their borders: what a sum in any order has exactly."""
    weights = torch.zeros(4, 1, 4096)
    for row, width in enumerate((1, 8, 64, 4096)):
        weights[row, 0, :: 4096 // width] = 1.0 / width
    logits = weights.log()
    lse, sequences, positions = torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64), torch.arange(4)[:, None]
    for seed in range(6):
        made = sample.draw_inverse(logits, lse, 1.0, seed, sequences, positions, 2)
        u = noise_reference.uniform(seed, sequences, positions, 2)
        expected = torch.tensor([[int(u[row, 0] * width) * (4096 // width)] for row, width in enumerate((1, 8, 64, 4096))])
        assert torch.equal(made.tokens, expected)


@pytest.mark.parametrize("vocabulary", [100, 1000, 2049, 9000])
def test_inverse_draws_are_the_reference_s_with_and_without_tokens_removed(vocabulary):
    logits = random(3, 2, vocabulary, seed=vocabulary, spread=3.0, dtype=torch.float16)
    logits[0, 0, 5:] = -torch.inf
    lse = stats_reference.row_lse(logits.flatten(0, 1), 0.5).lse.view(3, 2)
    sequences, positions = torch.arange(3, dtype=torch.int32), integers(3, 2, seed=1, high=9999, dtype=torch.int32)
    likely = logits.topk(2, dim=-1).indices
    removed = torch.stack([likely[..., 0], torch.full((3, 2), -1), likely[..., 1]], -1)
    for gone, lane in ((None, 0), (removed, 3), (removed[..., :0], 1)):
        guarded = Guarded()
        args = (logits, lse, 0.5, 4, sequences, positions, 0, lane, gone)
        made = sample.draw_inverse(*args, guarded.fields(Drawn.empty(3, 2, device=CPU)))
        same(made, sample_reference.draw_inverse(*args), 3e-6)
        guarded.check()


def test_a_law_of_which_nothing_is_left_gives_the_last_token_as_the_reference_does():
    logits = torch.full((1, 1, 50), -torch.inf)
    logits[0, 0, 7] = 2.0
    args = (logits, torch.tensor([[2.0]]), 1.0, 0, torch.tensor([0]), torch.tensor([[3]]), 0, 1, torch.tensor([[[7]]]))
    assert sample.draw_inverse(*args).tokens.item() == sample_reference.draw_inverse(*args).tokens.item() == 49


def test_what_would_touch_the_wrong_memory_is_refused_with_the_value():
    kv, cos = torch.zeros(2, 2, 1, 8, 16), torch.zeros(4, 8)
    one = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not hold 1 KV heads"):
        rope.rope_append(torch.zeros(2, 1, 40), one, one, cos, cos, kv)
    with pytest.raises(ValueError, match="float32"):
        rope.rope_append(torch.zeros(2, 1, 64), one, one, cos.double(), cos.double(), kv)
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        compact.kv_compact(kv[None], torch.zeros(3, 1, dtype=torch.int64), one[:, 0], one[:, 0])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        stats.row_lse(torch.zeros(2, 5), 0.0)
    with pytest.raises(ValueError, match="lse must be contiguous"):
        stats.row_lse(torch.zeros(2, 5), 1.0, None, RowStats.empty(3, 0, CPU))
    with pytest.raises(ValueError, match="counts must be"):
        accept.accept_chain_equal(one, one, torch.zeros(2, 2, dtype=torch.int64))
    laws = (torch.zeros(2, 2, 5), torch.zeros(2, 2), torch.zeros(2, 1, 5), None, None, 1.0)
    with pytest.raises(ValueError, match="log-sum-exps, or neither"):
        sample.draw_residual(*laws, Accepted.empty(2, 1, 1, CPU), 0, one[:, 0], one[:, 0], 2)
    with pytest.raises(ValueError, match="int64"):
        noise.words(torch.zeros(1), one[:, 0], one, 0, 4)
