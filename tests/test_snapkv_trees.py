"""Trees drafted through SnapKV views: the text stays, back ends agree, each key is read once and counted exactly."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import specdec_lab as sd
import tiny
from specdec_kernels.decoder.cpu import Decoder
from specdec_lab.engine.attention import Reads
from specdec_lab.engine.backends import BACKENDS
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.sampling import Processor
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.records import KvView, TreeShape, UnsupportedConfig
from test_lossless import SAMPLING, chi_square_p, exact_law, noisy_copy, sampled
from test_snapkv import RUNNABLE, engine_of, keys_by_definition, lists_of, made_lists
from test_trees_lossless import random_trees

TREES = ("4,2,1", "2,2,2", "tree:-1,-1,0,0,1", "tree:-1,0,-1,0,2,3,-1")
VIEWS = ("snapkv16+8", "snapkv40+3r20", "snapkv1+1", "snapkv16+8r8")
CONFIGS = tuple(f"self:{view}/{tree}" for view, tree in zip(VIEWS, TREES, strict=True))
LENGTHS = [1, 2, 33, 34, 64, 65, 130]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def expected():
    return [tiny.plain_greedy(tiny.model("llama"), p, 40) for p in tiny.prompts(LENGTHS)]


@pytest.fixture(scope="module")
def by_reference():
    """What the meaning drafts and accepts, per configuration."""
    return {c: rounds_of(engine_of(tiny.model("llama"), "reference").generate(tiny.prompts(LENGTHS), c, max_new_tokens=40))
            for c in CONFIGS}


def rounds_of(out):
    return [(s.drafted, s.accepted, s.ranks) for s in out.run.rounds]


@pytest.mark.parametrize("runner", ["fast", "hf"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_greedy_trees_through_lists_equal_transformers_and_back_ends_accept_alike(backend, runner, expected, by_reference):
    engine = engine_of(tiny.model("llama"), backend, "hf" if runner == "hf" else "auto")
    assert (engine.backend.name, engine.pair.target.kind) == (backend, runner)
    for config in CONFIGS:
        out = engine.generate(tiny.prompts(LENGTHS), config, max_new_tokens=40)
        assert out.tokens == expected, config
        assert rounds_of(out) == by_reference[config], config
        assert any(max(ranks, default=0) > 1 for s in out.run.rounds for ranks in s.ranks), "a second child was worth something"


@pytest.mark.skipif("cpu" not in RUNNABLE, reason="no compiled kernel here")
def test_a_tree_through_lists_is_drafted_in_one_compiled_call(monkeypatch):
    calls, forward, draft = [], Decoder.forward, Decoder.draft
    monkeypatch.setattr(Decoder, "forward", lambda self, *given: calls.append(bool(given[1].index)) or forward(self, *given))
    monkeypatch.setattr(Decoder, "draft", lambda self, *given: calls.append(bool(given[1].index)) or draft(self, *given))
    run = engine_of(tiny.model("llama"), "cpu").generate(tiny.prompts([90, 40]), "self:snapkv16+8/4,2,1", max_new_tokens=30).run
    assert calls.count(True) >= len(run.rounds), "all levels at once"
    assert calls.count(False) >= len(run.rounds), "verify reads everything"


@pytest.mark.parametrize("view", ["snapkv400+7", "snapkv1+400", "snapkv3000+7r16", "snapkv160+300"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_lists_as_large_as_the_context_let_a_tree_see_everything(backend, view):
    """Then draft = target, and greedy text walks down first children to the leaf."""
    out = engine_of(tiny.model("llama"), backend).generate(
        tiny.prompts([1, 64, 300]), f"self:{view}/2,2,1,1", max_new_tokens=40, stop_at_eos=False
    )
    for step in out.run.rounds:
        for tokens, accepted, ranks, cut in zip(step.tokens, step.accepted, step.ranks, step.censored, strict=True):
            assert cut or not tokens or accepted == 4, view
            assert set(ranks) <= {1}
    assert out.summary.num_accepted_draft_tokens > 60


def test_a_small_list_accepts_less_of_a_tree_than_the_whole_context():
    accepted = [
        engine_of(tiny.model("llama")).generate(tiny.prompts([200]), f"self:{view}/2,2,1", max_new_tokens=40, stop_at_eos=False)
        .summary.num_accepted_draft_tokens for view in ("snapkv1+1", "snapkv400+7")
    ]  # fmt: skip
    assert accepted[0] < accepted[1]


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}])
@pytest.mark.parametrize("config", ["self:snapkv12+6r16/4,2,1", "self:snapkv1+1/tree:-1,0,-1,0,2"])
def test_coupled_trees_through_lists_sample_what_plain_decoding_samples(config, kwargs):
    engine, prompts = engine_of(tiny.model("llama")), tiny.prompts([1, 5, 40, 65])
    asked = {"max_new_tokens": 30, "temperature": 0.8, "seed": 11, "stop_at_eos": False, "verifier": "coupled", **kwargs}
    out = engine.generate(prompts, config, **asked)
    assert out.tokens == engine.generate(prompts, "off", **asked).tokens
    assert out.summary.num_accepted_draft_tokens > 0


@pytest.mark.parametrize("verifier", ["rejection", "coupled"])
def test_sampled_text_of_trees_through_lists_follows_the_joint_law_of_the_target(verifier):
    tokens, accepted = sampled("self:snapkv1+2r2/2,1", samples=5_000, verifier=verifier)
    assert chi_square_p(tokens, exact_law(tiny.model("llama", **SAMPLING), Processor(0.9))) > 1e-3
    assert accepted > 0


def test_switching_between_chains_and_trees_through_lists_changes_nothing():
    prompts, cycle = tiny.prompts([1, 40, 77]), itertools.cycle((*CONFIGS, "off", "self:snapkv16+8/chain3", "model:4+8/2,1"))
    plain = [tiny.plain_greedy(tiny.model("llama"), p, 60, eos=None) for p in prompts]
    engine = sd.Engine(sd.load(tiny.model("llama"), noisy_copy(tiny.model("llama"), 0.05)))
    out = engine.generate(prompts, lambda _live, _length: next(cycle), max_new_tokens=60, stop_at_eos=False)
    assert out.tokens == plain
    assert set(CONFIGS) <= {s.config for s in out.run.rounds}


def test_chains_and_trees_of_one_view_share_one_selection():
    session = engine_of(tiny.model("llama")).open(sd.Workload("test", tiny.prompts([60, 45]), 20, stop_at_eos=False))
    indexes = []
    for config in ("self:snapkv8+4/chain3", "self:snapkv8+4/2,1"):
        list(session.steps(config))
        indexes.append(lists_of(session, "snapkv8+4").index)
    assert indexes[0] is indexes[1]


# --- each key once ---------------------------------------------------------------------------------------------------


def levels_with_lists(tree, committed, view, layers=1, heads=1, seed=0):
    """The draft forwards of a tree over rows of these lengths, with lists as a session could have chosen them."""
    layout, lengths = layout_of(tree, CPU), torch.tensor(committed)
    index = made_lists(committed, view, layers, heads, min(view.budget, 250), seed)
    for level in layout.levels:
        reads = level.reads(lengths, view, max(committed), len(set(committed)) == 1)
        yield level, replace(reads, index=index)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(RUNNABLE), committed=st.lists(st.integers(0, 200), min_size=1, max_size=3), tree=random_trees(),
    budget=st.integers(1, 220), recent=st.integers(1, 220), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_key_of_a_tree_weighs_the_same_and_is_counted(name, committed, tree, budget, recent, seed):
    """With equal scores and one-hot values the output is the weight of every slot: 1/n where read, else 0."""
    view, slots, backend = KvView.snapkv(budget, recent), 256, BACKENDS[name]
    cache = KvCache(1, len(committed), 1, slots - 1, slots, torch.float32, CPU)
    cache.kv[0, 1] = torch.eye(slots)
    for level, reads in levels_with_lists(tree, committed, view, seed=seed):
        q = torch.zeros(len(committed), reads.num_queries, 1, slots)
        weights = backend.attend(q, cache, 0, backend.plan(reads, cache, 1), 1.0)[:, :, 0]
        read = weights > 0
        for row, query in itertools.product(range(len(committed)), range(reads.num_queries)):
            keys = keys_by_definition(reads, reads.index, 0, row, 0, query)
            assert len(keys) == len(set(keys))
            assert sorted(keys) == read[row, query].nonzero().flatten().tolist()
            assert torch.allclose(weights[row, query, keys], torch.tensor(1 / len(keys)), rtol=1e-5)
        counted = level.count(committed, view)
        assert (counted.keys, counted.pairs) == (int(read.any(1).sum()), int(read.sum()))


def test_the_weight_test_catches_a_list_that_ends_at_the_window_of_the_root(monkeypatch):
    """Deeper levels begin later: a list that grows with its row must follow them."""
    monkeypatch.setattr(Reads, "num_listed", property(lambda self: (self.committed + 1 - self.view.recent).clamp(min=0)))
    level, reads = list(levels_with_lists(TreeShape.parse("2,1,1,1"), [10], KvView.snapkv(20, 4)))[-1]
    assert level.count([10], reads.view).keys != len(keys_seen(reads))


def keys_seen(reads):
    """The slots that the reference reads, by definition of Reads."""
    slots = torch.arange(reads.longest)[None]
    return (reads.visible(slots)[0].any(0) | reads.listed(0, reads.longest)[0, 0]).nonzero().flatten().tolist()


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_tree_reads_the_list_of_its_layer_and_head(name):
    g, view, committed, backend = torch.Generator().manual_seed(3), KvView.snapkv(6, 3), [7, 90, 150], BACKENDS[name]
    cache = KvCache(3, 3, 2, 200, 16, torch.float32, CPU)
    cache.kv.normal_(generator=g)
    for _, reads in levels_with_lists(TreeShape.parse("3,2,1"), committed, view, layers=3, heads=2):
        q = torch.randn(3, reads.num_queries, 4, 16, generator=g)
        plan = backend.plan(reads, cache, 2)
        for layer, row, head, t in itertools.product(range(3), range(3), range(4), range(reads.num_queries)):
            keys = keys_by_definition(reads, reads.index, layer, row, head // 2, t)
            k, v = (part[row, head // 2, keys].double() for part in cache.layer(layer))
            right = (k @ q[row, t, head].double() * 0.25).softmax(0) @ v
            assert torch.allclose(backend.attend(q, cache, layer, plan, 0.25)[row, t, head].double(), right, atol=3e-6)


def test_records_of_trees_through_lists_carry_the_bytes_that_were_read():
    engine = engine_of(tiny.model("llama"))
    run = engine.generate(tiny.prompts([90]), "self:snapkv8+4/3,2", max_new_tokens=20).run
    kv, view = engine.pair.target.shape.kv_bytes_per_token(4), KvView.parse("snapkv8+4")
    for step in run.rounds:
        context = step.context_tokens[0]
        drafted = [len(keys_seen(reads)) for _, reads in levels_with_lists(TreeShape.parse("3,2"), [context], view)]
        assert step.draft_kv_read_bytes == kv * sum(drafted)
        assert len(drafted) == 2
        assert sum(drafted) < 40 < context


def test_a_back_end_that_has_lists_for_chains_only_refuses_trees_and_says_why(monkeypatch):
    asked = Counter()
    backend = engine_of(tiny.model("llama"), "sdpa").backend

    def why_not(need):
        asked[need.index_list, need.tree] += 1
        return "lists go with chains here" if need.index_list and need.tree else None

    monkeypatch.setattr(type(backend), "why_not", lambda self, need: why_not(need))
    engine = engine_of(tiny.model("llama"), "sdpa")
    assert engine.generate([[1, 2, 3]], "self:snapkv64+8/chain2", max_new_tokens=3).tokens
    with pytest.raises(UnsupportedConfig, match=r"lists go with chains here. Use a window such as self:4\+8/2,1"):
        engine.generate([[1, 2, 3]], "self:snapkv64+8/2,1")
    assert asked[True, True] == asked[True, False] == 1
