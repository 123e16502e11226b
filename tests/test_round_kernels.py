"""The kernels of a round mean what the engine does: positions, cache, acceptance and draws, decision for decision."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import tiny
from specdec_kernels.accept import reference as accept
from specdec_kernels.kv_compact.reference import kv_compact
from specdec_kernels.noise import reference as noise
from specdec_kernels.rope_append.reference import rope_append
from specdec_kernels.row_lse.reference import law, row_lse
from specdec_kernels.sample_rows import reference as sample
from specdec_lab.engine import tree_verify, verify
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.models.fast_llama import FastLlama
from specdec_lab.engine.models.runner import Scores
from specdec_lab.engine.sampling import Noise, Processor, Purpose
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.engine.verify import Proposal
from specdec_lab.records import TreeShape

BATCH = 48
TREES = ("2,1", "4,2,1", "1,1,1", "3", "tree:-1,-1,0,0,1", "tree:-1,0,-1,0,2,3,-1")
CPU = torch.device("cpu")


def logits_of(*shape, seed, spread=2.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def noise_of(batch, seed=7):
    return Noise(seed, torch.arange(batch) * 3 + 1)


def lse_of(logits, temperature=1.0):
    return row_lse(logits.flatten(0, -2), temperature).lse.view(logits.shape[:-1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_rope_append_is_the_projection_of_fast_llama_and_the_append_of_its_cache(family):
    reference = tiny.model(family)
    model = FastLlama(reference.config, reference.state_dict(), name="t", device=CPU, dtype=torch.float32)
    s, layer, batch, queries = model.shape, model._layers[0], 3, 4
    hidden = logits_of(batch * queries, s.hidden, seed=1)
    slots = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 30], [50, 51, 52, 53]])
    positions = torch.tensor([[0, 1, 1, 2], [40, 41, 42, 43], [5, 6, 7, 8]])
    ours, theirs = (model.new_cache(batch, 60) for _ in range(2))
    q, kv = model._project(layer, hidden, batch, queries, model._cos[positions][:, :, None], model._sin[positions][:, :, None])
    theirs.append(0, kv, theirs.write_index(slots))
    qkv = F.linear(F.rms_norm(hidden, (s.hidden,), layer.input_norm, model._eps), layer.qkv, layer.qkv_bias)
    made = rope_append(
        qkv.view(batch, queries, -1), positions, slots, model._cos, model._sin, ours.kv[0], layer.q_norm, layer.k_norm,
        model._eps,
    )  # fmt: skip
    torch.testing.assert_close(made, q, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.kv, theirs.kv, rtol=2e-6, atol=2e-6)
    assert (layer.q_norm is not None) == (family == "qwen3")


def test_a_slot_outside_the_cache_is_not_written_and_a_position_outside_the_table_is_nan():
    cos, sin = torch.ones(4, 4), torch.zeros(4, 4)
    qkv, kv = logits_of(1, 4, 3 * 8, seed=2), torch.zeros(2, 1, 1, 5, 8)
    slots = torch.tensor([[-1, 5, 2, 1]], dtype=torch.int32)
    q = rope_append(qkv, torch.tensor([[0, 1, 3, 4]]), slots, cos, sin, kv)
    assert kv[0, 0, 0].isfinite().all(1).tolist() == [True, False, True, True, True]
    assert (kv[1, 0, 0] != 0).any(1).tolist() == [False, True, True, False, False]
    assert q[0].isfinite().all(-1).all(-1).tolist() == [True, True, True, False]


def test_compaction_is_the_cache_s_in_all_layers():
    generator = torch.Generator().manual_seed(3)
    cache = KvCache(2, 5, 3, 100, 8, torch.float32, CPU)
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=generator))
    cache.committed = torch.tensor([0, 7, 31, 90, 5])
    paths = [[1, 2, 3], [2, 5, 6], [3, 4, 9], [2, 3, 4], [6, 7, 8]]
    counts = [3, 2, 3, 0, 1]
    ours = cache.kv.clone()
    cache.compact(paths, counts)
    done = kv_compact(ours, torch.tensor(paths, dtype=torch.int32), torch.tensor(counts), cache.committed)
    assert done is ours
    assert torch.equal(ours, cache.kv)


def test_row_statistics_are_torch_s_and_ids_outside_have_no_chance():
    logits = logits_of(5, 100, seed=4, dtype=torch.bfloat16)
    logits[2, 7] = -torch.inf
    ids = torch.tensor([[0, 99], [3, 3], [7, 8], [-1, 100], [5, 6]])
    made, x = row_lse(logits, 0.7, ids), logits.float() / 0.7
    assert torch.equal(made.lse, x.logsumexp(-1))
    assert torch.equal(made.best, x.argmax(-1))
    torch.testing.assert_close(made.logprob[:2], x.log_softmax(-1).gather(1, ids.clamp(0, 99))[:2])
    assert made.logprob[3].tolist() == [-torch.inf] * 2
    assert made.logprob[2, 0] == -torch.inf
    tied = torch.zeros(1, 50)
    tied[0, [20, 30]] = 1.0
    assert row_lse(tied, 1.0).best.item() == 20


def test_noise_is_the_engine_s_in_every_lane_from_an_int_or_a_tensor_of_either_width():
    made, positions = noise_of(4, seed=-5), torch.tensor([[0, 5], [1, 2], [70000, 3], [2**31 - 1, 9]])
    for seed, kind in itertools.product((-5, torch.tensor([-5])), (torch.int32, torch.int64)):
        args = (seed, made.sequences.to(kind), positions.to(kind))
        for lane in (0, 3):
            assert torch.equal(noise.uniform(*args, 1, lane), made.uniform(positions, Purpose.ACCEPT, lane))
        assert torch.equal(noise.gumbel(*args, 3, 33), made.gumbel(positions, 33, Purpose.TARGET))


@pytest.mark.parametrize("seed", range(3))
def test_equal_chains_are_accepted_as_the_engine_does(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, chosen = (torch.randint(0, 4, (BATCH, n), generator=generator) for n in (4, 5))
    chosen[:, :4] = torch.where(torch.rand(BATCH, 4, generator=generator) < 0.8, tokens, chosen[:, :4])
    counts = torch.randint(0, 5, (BATCH,), generator=generator)
    made = accept.accept_chain_equal(tokens, counts, chosen)
    expected = verify.accept_equal(Proposal(tokens, counts), chosen)
    assert torch.equal(made.num_accepted.long(), expected.num_accepted)
    assert torch.equal(made.row, made.num_accepted)
    assert not made.num_refused.any()
    assert made.path[made.num_accepted == 4].unique(dim=0).tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("point", [False, True])
def test_chains_are_accepted_and_continued_token_for_token_as_the_engine_does(temperature, point):
    vocabulary, depth = 40, 5
    processor, randoms = Processor(temperature), noise_of(BATCH)
    target = logits_of(BATCH, depth + 1, vocabulary, seed=5)
    draft = target[:, :depth] + logits_of(BATCH, depth, vocabulary, seed=6, spread=0.7)
    first = torch.arange(BATCH) * 11
    positions = first[:, None] + torch.arange(depth)
    scores = [lse_of(x, temperature) for x in (target, draft)]
    tokens = sample.draw_inverse(draft, scores[1], temperature, 7, randoms.sequences, positions, Purpose.DRAFT).tokens
    for i in range(depth):
        step, _ = verify.choose_draft(Scores(draft[:, i : i + 1]), positions[:, i], processor, "rejection", randoms)
        assert torch.equal(tokens[:, i], step)
    counts = torch.arange(BATCH) % (depth + 1)
    proposal = Proposal(tokens, counts, None if point else processor.law(draft))
    expected = verify.decide(proposal, Scores(target), first, processor, "rejection", randoms)
    logprobs = [row_lse(x.flatten(0, 1), temperature, tokens.view(-1, 1)).logprob for x in (target[:, :-1], draft)]
    p, q = (x.view(BATCH, depth) for x in logprobs)
    made = accept.accept_chain(tokens, counts, p, None if point else q, 7, randoms.sequences, first, Purpose.ACCEPT)
    assert torch.equal(made.num_accepted.long(), expected.num_accepted)
    drawn = sample.draw_residual(
        target, scores[0], None if point else draft, None if point else scores[1], None, temperature, made, 7,
        randoms.sequences, first, Purpose.RESIDUAL,
    )  # fmt: skip
    row = expected.num_accepted
    assert torch.equal(drawn.tokens, expected.tokens[torch.arange(BATCH), row])
    assert torch.equal(drawn.logprob, target[torch.arange(BATCH), row].div(temperature).gather(1, drawn.tokens[:, None])[:, 0]
                       - scores[0][torch.arange(BATCH), row])  # fmt: skip
    assert 0 < made.num_refused.sum() < BATCH


def tree_world(spelling, temperature=0.8, seed=0, vocabulary=24, closeness=0.8, sharp=2.0):
    """A drafted tree as the engine drafts it, and both models' logits at its nodes."""
    layout, randoms, processor = layout_of(TreeShape.parse(spelling), CPU), noise_of(BATCH, seed), Processor(temperature)
    nodes, first = layout.num_nodes + 1, torch.arange(BATCH) * 13
    target = logits_of(BATCH, nodes, vocabulary, seed=seed + 8, spread=sharp)
    draft_of = target + logits_of(BATCH, nodes, vocabulary, seed=seed + 9, spread=closeness)
    fed = [v for v in range(nodes) if layout.children[v]]
    draft = draft_of[:, fed]  # [B, M, V]
    tokens = torch.zeros(BATCH, layout.num_nodes, dtype=torch.int64)
    for v, row in zip(fed, range(len(fed)), strict=True):
        drawn, _ = tree_verify.choose_children(
            Scores(draft[:, row : row + 1]), len(layout.children[v]), first + layout.depths[v], processor, "rejection", randoms
        )
        tokens[:, [c - 1 for c in layout.children[v]]] = drawn[:, 0]
    return layout, randoms, processor, first, target, draft, tokens


@pytest.mark.parametrize("spelling", TREES)
def test_trees_are_accepted_and_continued_node_for_node_as_the_engine_does(spelling):
    refusals = 0
    for seed, (sharp, closeness) in enumerate(((2.0, 0.8), (5.0, 0.3), (30.0, 20.0))):  # the last one's support is soon used up
        layout, randoms, processor, first, target, draft, tokens = tree_world(spelling, 0.8, seed, 24, closeness, sharp)
        counts = torch.full((BATCH,), layout.num_nodes)
        expected = tree_verify.decide_tree(
            Proposal(tokens, counts, processor.law(draft), layout), Scores(target), first, processor, "rejection", randoms
        )
        laws = [(target, lse_of(target, 0.8)), (draft, lse_of(draft, 0.8))]
        made = accept.accept_tree(
            tokens, layout.child_table, layout.law_row, *laws[0], *laws[1], 0.8, seed, randoms.sequences, first, Purpose.ACCEPT,
            layout.depth,
        )  # fmt: skip
        rows, n = torch.arange(BATCH), expected.num_accepted
        assert torch.equal(made.num_accepted.long(), n)
        inside = torch.arange(expected.path.shape[1]) < n[:, None]
        for ours, theirs in ((made.path, expected.path), (made.ranks, expected.ranks)):
            assert torch.equal(ours[:, : inside.shape[1]].long(), theirs * inside)
            assert not ours[:, inside.shape[1] :].any()
        drawn = sample.draw_residual(
            *laws[0], *laws[1], layout.law_row, 0.8, made, seed, randoms.sequences, first, Purpose.RESIDUAL
        )
        assert torch.equal(drawn.tokens, expected.tokens[rows, n])
        refusals += int((made.num_refused > 1).sum())
    assert refusals or max(map(len, layout.children)) == 1, "several refusals at one node occur"


@pytest.mark.parametrize("spelling", TREES)
def test_coupled_trees_and_draws_are_the_engine_s(spelling):
    layout, randoms, processor, first, target, _, tokens = tree_world(spelling, closeness=0.3)
    counts, depths = torch.full((BATCH,), layout.num_nodes), torch.tensor(layout.depths)
    exists = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.8
    for there in (None, exists):
        proposal = Proposal(tokens, counts, None, layout, exists=there)
        expected = tree_verify.decide_tree(proposal, Scores(target), first, processor, "coupled", randoms)
        chosen = sample.draw_gumbel(
            target, lse_of(target, 0.8), 0.8, 0, randoms.sequences, first[:, None] + depths, Purpose.TARGET
        ).tokens
        assert torch.equal(chosen, randoms.draw(processor.law(target), first[:, None] + depths, Purpose.TARGET))
        made = accept.accept_tree_equal(tokens, there, layout.child_table, chosen, layout.depth)
        assert torch.equal(made.num_accepted.long(), expected.num_accepted)
        rows, n = torch.arange(BATCH), expected.num_accepted
        assert torch.equal(chosen[rows, made.row.long()], expected.tokens[rows, n])
        assert made.num_accepted.sum() > 0
        greedy = accept.accept_tree_equal(tokens, there, layout.child_table, target.argmax(-1), layout.depth)
        expected = tree_verify.decide_tree(proposal, Scores(target), first, Processor(0.0), "", randoms)
        assert torch.equal(greedy.num_accepted.long(), expected.num_accepted)


def test_siblings_drawn_one_at_a_time_are_the_engine_s_children():
    randoms, first = noise_of(BATCH), torch.arange(BATCH) * 5
    logits = logits_of(BATCH, 2, 12, seed=11, spread=3.0)
    expected, _ = tree_verify.choose_children(Scores(logits), 4, first, Processor(0.9), "rejection", randoms)
    lse, positions, drawn = lse_of(logits, 0.9), first[:, None].expand(-1, 2), torch.full((BATCH, 2, 4), -1)
    for lane in range(4):
        made = sample.draw_inverse(logits, lse, 0.9, 7, randoms.sequences, positions, Purpose.DRAFT, lane, drawn[..., :lane])
        drawn[..., lane] = made.tokens
    assert torch.equal(drawn, expected)
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()


def test_a_filtered_law_goes_through_every_kernel_as_its_logarithm():
    processor, logits = Processor(0.7, top_p=0.9, top_k=6), logits_of(BATCH, 1, 30, seed=12)
    left = processor.law(logits).log()
    sequences, positions = noise_of(BATCH).sequences, torch.arange(BATCH)[:, None]
    drawn = sample.draw_inverse(left, lse_of(left), 1.0, 7, sequences, positions, Purpose.DRAFT)
    expected, kept = verify.choose_draft(Scores(logits), torch.arange(BATCH), processor, "rejection", noise_of(BATCH))
    assert torch.equal(drawn.tokens[:, 0], expected)
    torch.testing.assert_close(law(left, lse_of(left), 1.0)[:, 0], kept)


def test_outputs_that_are_given_are_written_whole():
    tokens, counts = torch.tensor([[1, 2], [1, 3]]), torch.tensor([2, 1])
    out = accept.Accepted.empty(2, 2, 1, CPU)
    for field in (out.num_accepted, out.path, out.ranks, out.row, out.num_refused, out.refused):
        field.fill_(77)
    made = accept.accept_chain_equal(tokens, counts, torch.tensor([[1, 2, 3], [5, 5, 5]]), out)
    assert made is out
    assert made.path.tolist() == [[1, 2], [0, 0]]
    assert made.ranks.tolist() == [[1, 1], [0, 0]]
    assert made.refused.tolist() == [[-1], [-1]]
