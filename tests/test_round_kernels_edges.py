"""The round's Triton kernels where they could go wrong: moves that overlap, adversarial trees, ties, borders between blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels.accept import gpu as accept
from specdec_kernels.accept import reference as accept_reference
from specdec_kernels.accept.reference import Accepted
from specdec_kernels.kv_compact import gpu as compact
from specdec_kernels.kv_compact import reference as compact_reference
from specdec_kernels.noise import gpu as noise
from specdec_kernels.noise import reference as noise_reference
from specdec_kernels.row_lse import gpu as stats
from specdec_kernels.row_lse import reference as stats_reference
from specdec_kernels.sample_rows import gpu as sample
from specdec_kernels.sample_rows import reference as sample_reference

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
FEW = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def random(*shape, seed, spread=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def same(made, expected, tolerance=0.0):
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(made, field.name), getattr(expected, field.name)
        if theirs.dtype.is_floating_point:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(ours, theirs), field.name


@st.composite
def paths(draw, most=40):
    """The way from the root to a node of a random tree whose nodes number from 1, each after its parent."""
    parents = [draw(st.integers(0, node)) for node in range(draw(st.integers(1, most)))]  # of nodes 1, 2, ...
    node, path = draw(st.integers(1, len(parents))), []
    while node:
        path.append(node)
        node = parents[node - 1]
    return path[::-1]


@FEW
@given(paths())
def test_along_a_path_no_later_source_is_an_earlier_place(path):
    """What the proof beside the kernel uses."""
    assert all(node >= entry + 1 for entry, node in enumerate(path))
    assert all(path[j] > i + 1 for i in range(len(path)) for j in range(i + 1, len(path)))


@FEW
@given(st.lists(paths(), min_size=1, max_size=3), st.sampled_from([1, 5, 8]), st.sampled_from([8, 24]), st.data())
def test_nodes_are_moved_in_place_as_if_all_were_read_first_however_they_overlap(rows, heads, dim, data):
    longest = max(map(len, rows))
    path = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.int32)
    counts = torch.tensor([data.draw(st.integers(0, len(row))) for row in rows])
    committed = torch.tensor([data.draw(st.integers(0, 20)) for _ in rows], dtype=torch.int32)
    size = data.draw(st.integers(20, 92))  # some sources lie beyond it
    ours = torch.arange(2 * 2 * len(rows) * heads * size * dim).float().view(2, 2, len(rows), heads, size, dim)
    theirs = compact_reference.kv_compact(ours.clone(), path, counts, committed)
    assert torch.equal(compact.kv_compact(ours, path, counts, committed), theirs)


def star(width):
    return [list(range(1, width + 1))] + [[] for _ in range(width)]


SHAPES = {
    "star": star(9),
    "chain": [[node + 1] for node in range(9)] + [[]],
    "deep with a wide end": [[1], [2], [3], [4], [5, 6, 7, 8], [], [], [], []],
    "comb": [[1, 2], [3, 4], [], [5, 6], [], [7, 8], [], [], []],
}


def walked(families, target, draft, tokens, seed, temperature=1.0):
    """What the kernel and what the reference accept, with draft laws of their own for every node that has children."""
    most, fed = max(map(len, families)), [node for node, family in enumerate(families) if family]
    children = torch.tensor([family + [-1] * (most - len(family)) for family in families])
    law_row = torch.tensor([fed.index(node) if node in fed else 0 for node in range(len(families))])
    depth, level = 0, [0]
    while level := [child for node in level for child in families[node]]:
        depth += 1
    laws = []
    for logits in (target, draft[:, fed].contiguous()):
        laws += [logits, stats_reference.row_lse(logits.flatten(0, 1), temperature).lse.view(logits.shape[:2])]
    batch = tokens.shape[0]
    who = (seed, torch.arange(batch), torch.arange(batch) * 5 + seed, 1)
    args = (tokens, children, law_row, *laws, temperature, *who, depth)
    made, expected = accept.accept_tree(*args), accept_reference.accept_tree(*args)
    same(made, expected, 1e-5)
    behind = (*laws, law_row, temperature, expected, *who)
    same(sample.draw_residual(*behind), sample_reference.draw_residual(*behind), 1e-5)
    return expected


def one_hot(logits, tokens):
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens[..., None], 0.0)


@pytest.mark.parametrize("name", SHAPES)
def test_adversarial_trees_are_walked_as_the_reference_does(name):
    families, batch, vocab = SHAPES[name], 3, 40
    nodes = len(families)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.stack([torch.randperm(vocab, generator=generator)[: nodes - 1] for _ in range(batch)])
    target, draft = random(batch, nodes, vocab, seed=1, spread=2.0), random(batch, nodes, vocab, seed=2, spread=2.0)
    drafted = torch.zeros(batch, nodes, vocab).scatter(2, tokens[:, None].expand(-1, nodes, -1), 1.0) > 0
    first = tokens[:, :1].expand(-1, nodes)
    beside = (tokens.sum(1, keepdim=True) % vocab).expand(-1, nodes)
    worlds = {  # (target logits, draft logits): what it does to the tests
        "apart": (target, draft),
        "equal": (target, target),
        "ties": ((target * 0.5).round(), (draft * 0.5).round()),
        "target gives drafts no chance": (target.masked_fill(drafted, -torch.inf), draft),
        "draft gave its drafts no chance": (target, draft.masked_fill(drafted, -torch.inf)),
        "target is sure of the first": (one_hot(target, first), draft),
        "target is sure of another": (one_hot(target, beside), draft),
        "draft was sure of the first": (target, one_hot(draft, first)),
        "both are sure": (one_hot(target, first), one_hot(draft, first)),
        "draft has nothing left": (target, draft.masked_fill(~drafted, -torch.inf)),
    }
    made = {world: walked(families, *laws, tokens, seed) for seed, (world, laws) in enumerate(worlds.items())}
    assert not made["target gives drafts no chance"].num_accepted.any()
    assert not made["draft gave its drafts no chance"].num_accepted.any()
    assert not made["draft gave its drafts no chance"].num_refused.any(), "the dead are not tested"
    assert (made["target is sure of the first"].num_accepted >= 1).all()
    tested = made["target gives drafts no chance"].num_refused
    assert (tested == len(families[0])).all()


def test_equal_laws_accept_the_first_child_at_every_node():
    families = SHAPES["comb"]
    laws = random(3, 9, 50, seed=4, spread=3.0)
    tokens = torch.arange(8).expand(3, -1).contiguous()
    made = walked(families, laws, laws, tokens, 0)
    assert made.path.tolist() == [[1, 3, 5, 7]] * 3
    assert not made.num_refused.any()


def test_draws_between_two_scores_that_float32_cannot_tell_apart_go_to_the_higher():
    """Two tokens of different blocks within a few 1e-6: the float32 glance errs by more, so both blocks must be looked at."""
    rows, vocab, sequences, positions = 24, 6000, torch.arange(24), torch.arange(24)[:, None]
    generator = torch.Generator().manual_seed(1)
    early, late = torch.randint(0, 2048, (rows,), generator=generator), torch.randint(4096, vocab, (rows,), generator=generator)
    drawn = noise_reference.gumbel(5, sequences, positions, 3, vocab)[:, 0]
    gap, order = torch.where(torch.arange(rows) % 2 == 0, 3e-6, -3e-6), torch.arange(rows)
    logits = torch.full((rows, 1, vocab), -50.0)
    logits[order, 0, early] = (8.0 - drawn[order, early]).float()
    logits[order, 0, late] = (8.0 - drawn[order, late] + gap).float()
    args = (logits, logits.logsumexp(-1), 1.0, 5, sequences, positions, 3)
    made, expected = sample.draw_gumbel(*args), sample_reference.draw_gumbel(*args)
    assert torch.equal(made.tokens, expected.tokens)
    won = (expected.tokens[:, 0] == late).long()
    assert torch.equal(won, (gap > 0).long())
    law = logits.softmax(-1)
    assert torch.equal(noise.gumbel_argmax(law, 5, sequences, positions, 3),
                       noise_reference.gumbel_argmax(law, 5, sequences, positions, 3))  # fmt: skip


def test_equal_best_scores_go_to_the_lowest_token_and_a_row_without_any_to_the_first():
    logits = torch.zeros(3, 1, 6000)
    logits[0, 0, [5000, 4100, 2047]] = torch.inf
    logits[1] = -torch.inf
    logits[2, 0, :5999] = -torch.inf
    sequences, positions = torch.arange(3), torch.zeros(3, 1, dtype=torch.int64)
    made = sample.draw_gumbel(logits, torch.zeros(3, 1), 1.0, 0, sequences, positions, 3)
    assert made.tokens[:, 0].tolist() == [2047, 0, 5999]


@pytest.mark.parametrize("vocab", [1, 2047, 2048, 2049, 4096, 4097, 12289])
def test_vocabularies_that_end_at_and_beside_a_block_are_read_to_their_last_token(vocab):
    logits = random(2, 2, vocab, seed=vocab)
    logits[1, 1, -1] = 30.0
    lse, sequences, positions = logits.logsumexp(-1), torch.arange(2), torch.tensor([[3, 4], [5, 6]])
    args = (logits, lse, 1.0, 2, sequences, positions, 3)
    for name in ("draw_gumbel", "draw_inverse"):
        made = getattr(sample, name)(*args)
        same(made, getattr(sample_reference, name)(*args), 1e-5)
        assert made.tokens[1, 1] == vocab - 1
    rows = stats.row_lse(logits.flatten(0, 1), 1.0)
    same(rows, stats_reference.row_lse(logits.flatten(0, 1), 1.0), 1e-5)
    assert rows.best[3] == vocab - 1


def test_the_highest_of_a_row_is_the_first_of_equals_in_whichever_blocks_they_lie():
    logits = random(4, 9000, seed=2)
    for row, places in enumerate(([4095, 4096], [4096, 8999], [1, 8192], [8192, 8193])):
        logits[row, places] = 9.0
    assert stats.row_lse(logits, 0.3).best.tolist() == [4095, 4096, 1, 8192]


def test_a_row_has_the_same_bits_alone_in_a_batch_and_with_marked_memory():
    """Scratch is written before it is read: memory that nobody wrote holds NaN here."""
    batch, vocab = 3, 5000
    target, draft = random(batch, 3, vocab, seed=1), random(batch, 2, vocab, seed=2)
    lses = [stats_reference.row_lse(x.flatten(0, 1), 0.7).lse.view(x.shape[:2]) for x in (target, draft)]
    one = torch.ones(batch, dtype=torch.int32)
    refused = Accepted(one, torch.ones(batch, 2, dtype=torch.int32), torch.ones(batch, 2, dtype=torch.int32), one, one,
                       torch.tensor([[7], [8], [9]]), torch.ones(batch, 1, dtype=torch.float64),
                       torch.full((batch, 1), 0.5, dtype=torch.float64))  # fmt: skip
    sequences, first = torch.arange(batch), torch.arange(batch) * 3

    def everything(rows):
        of, q = target[rows], draft[rows]
        cut = Accepted(*(getattr(refused, f.name)[rows] for f in dataclasses.fields(Accepted)))
        who = (4, sequences[rows], first[rows])
        at = (4, sequences[rows], first[rows, None] + torch.arange(3))
        yield from dataclasses.astuple(stats.row_lse(of.flatten(0, 1), 0.7, torch.full((of.shape[0] * 3, 1), 5)))
        for draw in (sample.draw_gumbel, sample.draw_inverse):
            yield from dataclasses.astuple(draw(of, lses[0][rows], 0.7, *at, 3))
        yield from dataclasses.astuple(sample.draw_residual(of, lses[0][rows], q, lses[1][rows], None, 0.7, cut, *who, 2))

    whole = list(everything(slice(None)))
    torch.use_deterministic_algorithms(True)
    try:
        marked = list(everything(slice(None)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(whole, marked, strict=True))
    for b in range(batch):
        for alone, together in zip(everything(slice(b, b + 1)), whole, strict=True):
            part = together.shape[0] // batch
            assert torch.equal(alone, together[b * part : (b + 1) * part])


def test_a_refusal_that_left_nothing_draws_from_the_target_itself_in_any_block():
    batch, vocab = 6, 5000
    law = random(batch, 2, vocab, seed=3)
    lse = law.logsumexp(-1)
    zero, one = torch.zeros(batch, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
    wide = torch.ones(batch, 1, dtype=torch.float64)
    refused = Accepted(zero, zero[:, None], zero[:, None], zero, one, torch.full((batch, 1), 3), wide, wide)
    args = (law, lse, law[:, :1].contiguous(), lse[:, :1].contiguous(), None, 1.0, refused, 9, torch.arange(batch), zero, 2)
    made = sample.draw_residual(*args)
    same(made, sample_reference.draw_residual(*args), 1e-5)
    assert len(set((made.tokens // 2048).tolist())) > 1
