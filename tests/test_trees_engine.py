"""The parts of tree speculation: layouts, exact counts, compaction, trees from text, limits, records."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import builders
import specdec_lab as sd
import tiny
from specdec_kernels.tree_attention import cpu
from specdec_lab.engine import drafters
from specdec_lab.engine.attention import Need
from specdec_lab.engine.backends import BACKENDS
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.drafters import _IndexedText
from specdec_lab.engine.tree_draft import fill_tree, text_proposal
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.records import KvView, StepRecord, TreeShape, UnsupportedConfig
from specdec_lab.summary import acceptance, summarize
from specdec_lab.trees import Counts, observed

CPU = torch.device("cpu")
SIZES = (4, 3, 2)


@st.composite
def trees(draw, most=12):
    parents = [-1]
    for node in range(1, draw(st.integers(1, most))):
        parents.append(draw(st.integers(-1, node - 1)))
    return TreeShape(tuple(parents))


@given(tree=trees())
def test_a_layout_is_the_same_tree_breadth_first_with_siblings_in_rank_order(tree):
    layout = layout_of(tree, CPU)
    assert sorted(layout.order) == list(range(tree.num_nodes))
    name = {-1: 0, **{node: v for v, node in enumerate(layout.order, start=1)}}
    assert [layout.parents[name[n]] for n in range(tree.num_nodes)] == [name[p] for p in tree.parents]
    assert list(layout.depths) == sorted(layout.depths), "level by level"
    assert [layout.depths[name[n]] for n in range(tree.num_nodes)] == list(tree.depths)
    for node in range(-1, tree.num_nodes):
        kids = [n for n, parent in enumerate(tree.parents) if parent == node]
        assert list(layout.children[name[node]]) == [name[k] for k in kids], "rank is the order of node numbers"
    assert layout_of(TreeShape(tuple(p - 1 for p in layout.parents[1:])), CPU).order == tuple(range(tree.num_nodes))


@given(tree=trees())
def test_only_nodes_with_children_are_fed_and_each_sees_itself_and_its_ancestors(tree):
    layout = layout_of(tree, CPU)
    assert len(layout.levels) == tree.depth, "one forward per level that has nodes with children"
    fed = [v for level in layout.levels for v in level.query_nodes.tolist()]
    assert fed == [v for v in range(len(layout.parents)) if layout.children[v]]
    drafted = 0
    for level in (*layout.levels, layout.whole):
        for row, node in zip(level.corner.tolist(), level.query_nodes.tolist(), strict=True):
            line = {node}
            while node:
                node = layout.parents[node]
                line.add(node)
            assert {c for c, seen in enumerate(row) if seen} == line
    for level in layout.levels:
        drafted += len(level.pick)
    assert drafted == tree.num_nodes


def lists_end(reads, budget):
    """[B, 1, 1] how many entries of lists that name 0, 1, 2, ... a forward of these nodes reads."""
    index = torch.arange(budget, dtype=torch.int32).expand(1, len(reads.committed), 1, -1)
    return replace(reads, index=index).num_listed[:, None, None]


@settings(max_examples=80)
@given(
    tree=trees(), committed=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    view=st.sampled_from(["full", "4+12", "0+1", "3+2", "9+500", "30+4", "snapkv9+4", "snapkv1+1", "snapkv60+30"]),
)  # fmt: skip
def test_counts_of_bytes_and_pairs_are_those_of_the_definition(tree, committed, view):
    layout, view = layout_of(tree, CPU), KvView.parse(view)
    for level, seen_through in [(layout.whole, KvView.full()), *((level, view) for level in layout.levels)]:
        lengths = torch.tensor(committed)
        reads = level.reads(lengths, seen_through, max(committed), len(set(committed)) == 1)
        slots = torch.arange(reads.longest)[None].expand(len(committed), -1)
        visible = reads.visible(slots)
        if seen_through.kind == "snapkv":  # which keys a list names makes no difference to the counts
            listed = slots[:, None] < lists_end(reads, seen_through.budget)
            assert not (visible & listed).any(), "no key is in a list and in a window"
            visible = visible | listed
        counted = level.count(committed, seen_through)
        assert counted.keys == int(visible.any(1).sum()), "every KV row that some query reads, once"
        assert counted.pairs == int(visible.sum())
        assert (counted.rows, counted.queries) == (len(committed), len(level.depths))


def test_compaction_moves_the_accepted_path_in_all_layers_and_reads_nothing_else():
    cache = KvCache(3, 3, 2, 60, 4, torch.float32, CPU)
    cache.committed = torch.tensor([10, 0, 25])
    cache.kv.normal_(generator=torch.Generator().manual_seed(0))
    paths, counts = [[2, 5, 9], [1, 2, 7], [3, 4, 6]], [3, 2, 1]
    for row, (start, path, count) in enumerate(zip([10, 0, 25], paths, counts, strict=True)):
        others = set(range(60)) - set(range(start + 1)) - {start + v for v in path[:count]}
        cache.kv[:, :, row, :, sorted(others)] = float("nan")
    before = cache.kv.clone()
    cache.compact(paths, counts)
    for row, (start, path, count) in enumerate(zip([10, 0, 25], paths, counts, strict=True)):
        assert torch.equal(cache.kv[:, :, row, :, : start + 1], before[:, :, row, :, : start + 1]), "text and root stay"
        for place, node in enumerate(path[:count], start=1):
            assert torch.equal(cache.kv[:, :, row, :, start + place], before[:, :, row, :, start + node])
        assert not cache.kv[:, :, row, :, : start + count + 1].isnan().any()


def test_a_path_that_lies_in_place_moves_nothing():
    cache = KvCache(1, 1, 1, 20, 4, torch.float32, CPU)
    cache._flat = None  # touching it would fail
    cache.compact([[1, 2, 3]], [3])
    cache.compact([[4, 5, 6]], [0])


def test_poisoned_slots_beyond_the_text_change_nothing():
    engine = sd.Engine(sd.load(tiny.model("llama"), tiny.model("llama", seed=1)), backend="reference")
    prompts = tiny.prompts([9, 30])
    clean = [sd.record(engine.steps(sd.Workload("t", prompts, 20, stop_at_eos=False), c)).tokens() for c in ("off",)]
    for config in ("self:4+4/3,2,1", "model:4+4/tree:-1,0,-1,0,2"):
        opened = engine.open(sd.Workload("t", prompts, 20, stop_at_eos=False))
        tokens = [[], []]
        for step in opened.steps(config):
            for row, emitted in enumerate(step.tokens):
                tokens[row] += emitted
            session = opened._session
            for cache in (session._cache, *([session._model.network.cache] if session._model else [])):
                known = session._known if cache is session._cache else session._model._known
                for row, length in enumerate(known):
                    cache.kv[:, :, row, :, length:] = float("nan")
        assert tokens == clean[0], config


def brute_matches(text, depth):
    """All matches of the last 4, 3, 2 tokens, latest first, read off the text without an index."""
    found = []
    for size in SIZES:
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                found.append([text[end + i % (len(text) - end)] for i in range(depth)])
    return found


@given(text=st.lists(st.integers(0, 2), max_size=30), more=st.lists(st.integers(0, 2), max_size=8), depth=st.integers(1, 5))
def test_matches_come_longest_tail_first_and_latest_first_also_after_a_rewind(text, more, depth):
    index = _IndexedText()
    index.extend(text + more, SIZES)
    index.rewind(len(text), SIZES)
    fresh = _IndexedText()
    fresh.extend(text, SIZES)
    assert (index.tokens, index.starts) == (fresh.tokens, fresh.starts)
    assert list(index.continuations(depth, SIZES)) == brute_matches(text, depth)
    assert index.continuation(depth, SIZES) == next(iter(brute_matches(text, depth)), [])


@given(tree=trees(), found=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), max_size=8))
def test_a_tree_from_text_has_distinct_siblings_taken_in_rank_order_and_only_continuations(tree, found):
    filled = fill_tree(tree, found)
    for node, token in filled.items():
        parent = tree.parents[node]
        assert parent < 0 or parent in filled
        siblings = [n for n, p in enumerate(tree.parents) if p == parent]
        assert all(s in filled for s in siblings[: siblings.index(node)]), "no gap before it"
        assert [filled[s] for s in siblings if s in filled].count(token) == 1
        path = []
        while node >= 0:
            path, node = [filled[node], *path], tree.parents[node]
        assert any(c[: len(path)] == path for c in found)
    if found:
        first = next(n for n, p in enumerate(tree.parents) if p < 0)
        assert filled[first] == found[0][0], "the best match is the first child"


def test_rows_without_a_match_draft_nothing_and_nodes_that_nobody_drafted_are_not_verified():
    tree = TreeShape.parse("2,1,1")
    proposal = text_proposal(tree, [{}, {0: 7, 2: 8}, {0: 5, 1: 6, 3: 9}], CPU)
    assert proposal.counts.tolist() == [0, 2, 3]
    assert proposal.nodes == ((), (0, 2), (0, 1, 3))
    assert proposal.layout.num_nodes == 4, "depth 3 was drafted by nobody"
    assert proposal.layout.order == (0, 1, 2, 3)
    assert proposal.exists.tolist() == [[False] * 4, [True, False, True, False], [True, True, False, True]]
    nothing = text_proposal(tree, [{}, {}], CPU)
    assert nothing.tokens.shape == (2, 0)
    assert nothing.layout is None


@pytest.mark.skipif(cpu.why_not(16, torch.float32) is not None, reason="no compiler here")
def test_a_round_with_a_tree_builds_no_corner_again():
    engine = sd.Engine(sd.load(tiny.model("llama")), backend="cpu")
    opened = engine.open(sd.Workload("t", tiny.prompts([20, 31]), 40, stop_at_eos=False))
    layout_of(TreeShape.parse("3,2,1"), CPU)
    sizes, layouts = [], layout_of.cache_info().misses
    for step in opened.steps("self:4+12/3,2,1"):
        if step.kind == "round":
            sizes.append(len(opened._session._cache.prepared))
    assert len(sizes) > 3
    assert len(set(sizes)) == 1
    assert layout_of.cache_info().misses == layouts


def test_chains_never_take_the_path_of_trees(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a chain went the way of trees")

    for name in ("draft_tree", "fill_tree", "text_proposal"):
        monkeypatch.setattr(drafters, name, fail)
    monkeypatch.setattr(KvCache, "compact", fail)
    engine = sd.Engine(sd.load(tiny.model("llama"), tiny.model("llama")))
    for config in ("self:4+12/chain3", "model:full/chain2", "ngram/chain4", "self:4+12/tree:-1,0,1", "self:4+12/1,1"):
        out = engine.generate(tiny.prompts([12]), config, max_new_tokens=10)
        assert all(s.ranks == s.nodes == () for s in out.run.rounds)


# --- what cannot run -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(cpu.why_not(16, torch.float32) is not None, reason="no compiler here")
def test_the_compiled_kernel_refuses_trees_beyond_its_bits_and_others_take_them():
    need = Need("cpu", torch.float32, 16, 2, tree=True, max_queries=65)
    assert "up to 64 nodes, root counted, not 65" in BACKENDS["cpu"].why_not(need)
    assert BACKENDS["cpu"].why_not(replace(need, max_queries=64)) is None
    assert BACKENDS["cpu"].why_not(replace(need, tree=False)) is None, "chains of 64 go on through sdpa"
    pair, asked = sd.load(tiny.model("llama")), {"max_new_tokens": 6, "stop_at_eos": False}
    plain = sd.Engine(pair).generate([[1, 2, 3]], "off", **asked).tokens
    with pytest.raises(UnsupportedConfig, match="self with a tree of 72 nodes: the compiled CPU kernel takes .* not 73"):
        sd.Engine(pair).generate([[1, 2, 3]], "self:4+8/8,8", **asked)
    assert sd.Engine(pair, backend="sdpa").generate([[1, 2, 3]], "self:4+8/8,8", **asked).tokens == plain
    assert sd.Engine(pair).generate([[1, 2, 3]], "self:4+8/7,8", **asked).tokens == plain, "63 nodes and the root"


def test_trees_that_cannot_run_are_refused_with_numbers_before_anything_runs():
    small = {"vocab_size": 5, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    engine = sd.Engine(sd.load(tiny.model("llama", **small)), backend="sdpa")
    opened = engine.open(sd.Workload("t", [[1, 2, 3]], 10))
    with pytest.raises(UnsupportedConfig, match="behind the 13 tokens of this workload the cache has 242 slots for drafts"):
        opened.steps("self:4+8/8,8,8")
    with pytest.raises(UnsupportedConfig, match="a node has 6 children, the vocabulary only 5 tokens"):
        opened.steps("self:4+8/6,1")
    with pytest.raises(UnsupportedConfig, match="no draft model is loaded"):
        opened.steps("model:4+8/2,1")
    opened.steps("ngram/6,1")
    assert not opened._session._known[0], "nothing was read"
    assert len(sd.record(opened.steps("self:4+8/5,5,5")).tokens()[0]) <= 10


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    engine = sd.Engine(sd.load(tiny.model("llama")))
    prompts = tiny.prompts([30, 12, 44])
    asked = {"self:0+2/4,2,1": 0.5, "ngram/3,2,1": 0.0, "self:0+2/chain3": 0.5, "self:0+1/tree:-1,0,-1,2": 0.5}
    return {c: engine.generate(prompts, c, max_new_tokens=50, temperature=t, seed=2).run for c, t in asked.items()}


def test_records_of_trees_obey_their_laws(runs):
    for config, run in runs.items():
        tree = sd.SpecConfig.parse(config).tree
        for step in run.rounds:
            assert StepRecord.from_dict(step.to_dict()) == step
            for row, accepted in enumerate(step.accepted):
                assert accepted <= tree.depth
                assert step.drafted[row] <= tree.num_nodes
                if step.ranks:
                    node = -1
                    for rank in step.ranks[row]:
                        node = [n for n, parent in enumerate(tree.parents) if parent == node][rank - 1]
                        assert not step.nodes or node in step.nodes[row]
            assert not tree.is_chain or not step.ranks
    assert any(s.nodes for s in runs["ngram/3,2,1"].rounds)
    with pytest.raises(ValueError, match="StepRecord.ranks"):
        replace(next(s for s in runs["self:0+2/4,2,1"].rounds if any(s.accepted)), ranks=((), (), ()))


def test_the_histogram_counts_accepted_depths_and_ranks_pool_to_the_same(runs):
    for config, run in runs.items():
        summary, counts = summarize(run), acceptance(run.rounds)
        assert sum(summary.acceptance_histogram) == summary.num_spec_steps
        assert len(summary.acceptance_histogram) == sd.SpecConfig.parse(config).depth + 1
        assert abs(counts.mean_acceptance_length - 1 - sum(
            j * n for j, n in enumerate(summary.acceptance_histogram)) / counts.num_spec_steps) < 1e-12
        by_depth = observed(run.steps, with_cut=False)
        pooled = sum(by_depth, Counts())
        assert summary.rank_acceptance == pooled.vector()
        accepted = sum(pooled.accepted(rank) for rank in range(1, pooled.ranks + 1))
        assert accepted == summary.num_accepted_draft_tokens, "every accepted token is somebody's accepted child"
        assert sum(summary.rank_acceptance) <= 1 + 1e-12
        assert by_depth[0].num_nodes == summary.num_spec_steps, "the root of every round was examined"
    chain = summarize(runs["self:0+2/chain3"])
    assert chain.rank_acceptance == pytest.approx([acceptance(runs["self:0+2/chain3"].rounds).alpha_censored])


def test_a_row_with_few_matches_counts_with_the_children_it_had():
    engine = sd.Engine(sd.load(tiny.model("llama")))
    run = engine.generate([[1, 2, 3, 4, 1, 2, 5, 1, 2], [9, 8, 7]], "ngram/3,1", max_new_tokens=1).run
    first = run.rounds[0]
    assert first.drafted == (4, 0)
    assert first.nodes == ((0, 1, 3, 4), ())
    (root, *_) = observed([replace(first, censored=(False, False))])
    assert set(root.examined) == {2}


def test_a_record_of_a_tree_that_names_no_ranks_counts_for_none():
    silent = builders.round_step((1, 2), config="self:4+60/4,2,1")
    assert observed([silent]) == ()
    assert summarize(builders.run_of(silent)).rank_acceptance == ()
    named = replace(silent, ranks=((4,), (1, 2)))
    assert observed([named])[0].examined == {4: (0, 1, 0, 0, 1)}
    chain = builders.round_step((1, 3), config="self:4+60/chain3", censored=(True, False))
    assert sum(observed([chain]), Counts()).examined == {1: (0, 4)}, "a cut row's last node was not examined"
    assert sum(observed([chain], with_cut=False), Counts()).examined == {1: (0, 3)}
