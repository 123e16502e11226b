"""A tree drafted in one compiled call: the tree of single level calls, bit for bit, and what the engine makes of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch

import specdec_lab as sd
import tiny
from specdec_kernels.decoder import cpu, reference
from specdec_kernels.noise import reference as noise
from specdec_lab.engine import tree_verify
from specdec_lab.engine.batch import Batch
from specdec_lab.engine.models.runner import Scores
from specdec_lab.engine.sampling import Noise, Processor
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.records import TreeShape
from test_decoder import CHAIN, NOISE, TARGETS, Case
from test_lossless import noisy_copy

pytestmark = pytest.mark.skipif(not TARGETS, reason="no compiler here")

CPU = torch.device("cpu")
TREES = ("4,2,1", "1,3", "tree:-1,-1,0,0,1", "tree:-1,0,-1,0,2,3,-1", "2,1,1,2", "chain4", ",".join(["1"] * 20 + ["5"]))
GREEDY = cpu.Draw(0.0, NOISE["sequences"], 0, 0, False)
COUPLED = cpu.Draw(0.8, NOISE["sequences"], NOISE["seed"], 3, True)
DRAWN = cpu.Draw(0.8, NOISE["sequences"], NOISE["seed"], 0, False)
VIEWS = ({}, {"sink": 4, "recent": 12}, {"sink": 0, "recent": 2}, {"recent": 9, "listed": 30})  # lists are not for a lag


def num_children(tree):
    return layout_of(TreeShape.parse(tree), CPU).num_children


def draft(case, children, draw, target="native", threads=1, rows=None):
    """What one call makes of the tree, and the cache it leaves."""
    kv = case.kv.clone()
    call, kept = case.call(kv, target, threads, rows)
    drafted = cpu.Decoder(case.weights, target).draft(case.tokens, call, kv.stride(0), children, draw)
    del kept
    return drafted, kv


def by_level(case, children, choose):
    """The tree that one forward per level drafts: reference.drafted over the compiled forward, and the cache it leaves."""
    kv, decoder = case.kv.clone(), cpu.Decoder(case.weights)

    def forward(weights, tokens, kv, committed, corner, depth, nodes, keep, **view):
        level = copy.copy(case)
        level.kv, level.tokens, level.committed = kv, tokens.contiguous(), committed
        level.corner, level.depth, level.nodes = corner, depth, nodes.to(torch.int32)
        logits, best, after = level.run(keep=keep.tolist(), decoder=decoder)
        kv.copy_(after)
        return logits, best

    with mock.patch.object(reference, "decoder", forward):
        return reference.drafted(case.weights, case.tokens, kv, case.committed, children, choose, scale=case.scale), kv


def likeliest(logits, position, number):
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :number]


def case_of(seed, lag=0, **view):
    return Case(seed, queries=lag + 1, committed=[3, 63, 100], layers=3, **CHAIN, **view)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("view", "lag"), [*((view, 0) for view in VIEWS), *((view, 1) for view in VIEWS[:3])])
def test_a_tree_drafted_in_one_call_is_bit_for_bit_the_tree_of_a_call_per_level(target, view, lag):
    for number, tree in enumerate(TREES):
        case = case_of(21 + number, lag, **view)
        drafted, kv = draft(case, num_children(tree), GREEDY, target, threads=1 + number % 3)
        expected, expected_kv = by_level(case, num_children(tree), likeliest)
        assert torch.equal(drafted.tokens, expected), tree
        assert drafted.law is None
        if target == "native":
            assert torch.equal(kv.nan_to_num(), expected_kv.nan_to_num()), tree
        assert drafted.attention_ns > 0


@pytest.mark.parametrize("view", VIEWS)
def test_a_greedy_tree_is_that_of_the_meaning_in_float64(view):
    for number, tree in enumerate(TREES[:-1]):
        case = case_of(31 + number, **view)
        sizes = {n: s for n, s in view.items() if n != "listed"}
        expected = reference.drafted(
            case.weights, case.tokens, case.kv.clone(), case.committed, num_children(tree), likeliest, scale=case.scale,
            index=case.index, **sizes,
        )
        assert torch.equal(draft(case, num_children(tree), GREEDY, threads=2)[0].tokens, expected), tree


@pytest.mark.parametrize("lag", [0, 1])
def test_coupled_children_are_the_largest_with_the_noise_of_their_position(lag):
    for number, tree in enumerate(TREES[:-1]):
        case = case_of(41 + number, lag)

        def choose(logits, position, count):
            noisy = (logits / 0.8).softmax(-1).double().log() + noise.gumbel(
                NOISE["seed"], NOISE["sequences"], position[:, None], 3, logits.shape[-1]
            )[:, 0]
            return likeliest(noisy, position, count)

        drafted, _ = draft(case, num_children(tree), COUPLED, threads=2)
        assert torch.equal(drafted.tokens, by_level(case, num_children(tree), choose)[0]), tree
        assert drafted.law is None


def test_drawn_children_come_one_after_the_other_from_what_is_left_of_the_law_that_is_returned():
    for number, tree in enumerate(TREES):
        case, given, laws = case_of(51 + number), iter(range(99)), []
        drafted, _ = draft(case, num_children(tree), DRAWN, threads=2)
        randoms = Noise(NOISE["seed"], NOISE["sequences"])

        def choose(logits, position, count, given=given, laws=laws, drafted=drafted, randoms=randoms):
            laws.append((logits / 0.8).softmax(-1))
            scores = Scores(drafted.law[:, next(given)][:, None].log())  # what was stored, as the verifier will read it
            chosen, _ = tree_verify.choose_children(scores, count, position, Processor(1.0), "rejection", randoms)
            return chosen[:, 0]

        assert torch.equal(drafted.tokens, by_level(case, num_children(tree), choose)[0]), tree
        assert drafted.law.shape[1] == len(laws) == sum(c > 0 for c in num_children(tree))
        assert (drafted.law - torch.stack(laws, 1)).abs().max() < 1e-6
        assert (drafted.law.sum(-1) - 1).abs().max() < 1e-5


def test_children_beyond_the_support_of_the_law_have_no_weight_in_it():
    cold = cpu.Draw(1e-4, NOISE["sequences"], NOISE["seed"], 0, False)
    drafted, _ = draft(case_of(61), num_children("5"), cold)
    assert (drafted.law[:, 0] > 0).sum(-1).tolist() == [1, 1, 1]
    assert torch.equal(drafted.law[:, 0].argmax(-1), drafted.tokens[:, 0])
    assert (drafted.tokens[:, 1:] == CHAIN["vocab"] - 1).all()
    noisy, _ = draft(case_of(61), num_children("5"), cpu.Draw(1e-4, NOISE["sequences"], NOISE["seed"], 3, True))
    assert torch.equal(noisy.tokens[:, 0], drafted.tokens[:, 0])
    assert all(len(set(row)) == 5 for row in noisy.tokens.tolist()), "siblings are distinct"


def test_of_equal_logits_the_lower_token_comes_first_here_and_level_by_level():
    case = case_of(62)
    flat = torch.zeros(3, 1, CHAIN["vocab"])
    flat[:, :, 70:75] = 1.0
    lower, _ = tree_verify.choose_children(
        Scores(flat), 7, case.committed, Processor(0.0), "rejection", Noise(0, NOISE["sequences"]), tree_verify.lower_of_equals
    )
    assert lower[0, 0].tolist() == [70, 71, 72, 73, 74, 0, 1]
    case.weights = replace(case.weights, head=torch.zeros(CHAIN["vocab"], 48))
    assert draft(case, num_children("7"), GREEDY)[0].tokens.tolist() == [list(range(7))] * 3


def test_rows_that_are_left_out_of_a_tree_draft_nothing():
    case = case_of(63)
    whole, _ = draft(case, num_children("3,2"), DRAWN)
    some, kv = draft(case, num_children("3,2"), DRAWN, threads=2, rows=[0, 2])
    assert torch.equal(some.tokens[[0, 2]], whole.tokens[[0, 2]])
    assert torch.equal(some.law[[0, 2]], whole.law[[0, 2]])
    assert (some.tokens[1] == 0).all()
    assert (some.law[1] == 0).all()
    assert torch.equal(kv[:, :, 1].nan_to_num(), case.kv[:, :, 1].nan_to_num())


@pytest.mark.parametrize(
    ("children", "committed"),
    [((), [3, 4, 5]), ((0,), [3, 4, 5]), ((2, 0), [3, 4, 5]), ((1, 0, 0), [3, 4, 5]), ((0, 1), [3, 4, 5]),
     ((2, -1, 2, 0), [3, 4, 5]), ((64, *[0] * 63, 1), [3, 4, 5]), ((65, *[0] * 65), [3, 4, 5]), ((*[1] * 65, 0), [3, 4, 5]),
     ((1, 1, 1, 0), [3, 4, 138])],
)  # fmt: skip
def test_what_is_no_tree_or_does_not_fit_is_refused_before_memory_is_touched(children, committed):
    case = case_of(64)
    case.committed = torch.tensor(committed)
    with pytest.raises(ValueError, match="does not fit into 64 nodes, 140 slots"):
        draft(case, children, GREEDY)


def test_more_children_than_tokens_are_refused():
    case = Case(65, queries=1, committed=[3, 63, 100], slots=140, vocab=5)
    assert sorted(draft(case, num_children("5"), GREEDY)[0].tokens[0].tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5 children per node"):
        draft(case, num_children("6"), GREEDY)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"tokens": torch.zeros(2, 1, dtype=torch.int64)}, "int64 tokens"), ({"tokens": torch.zeros(3, 1)}, "int64 tokens")],
)
def test_tokens_of_another_shape_than_the_call_reads_are_refused(change, words):
    case = case_of(66)
    call, kept = case.call(case.kv, "native", 1, None)
    with pytest.raises(ValueError, match=words):
        cpu.Decoder(case.weights).draft(change["tokens"], call, case.kv.stride(0), (1, 0), GREEDY)
    few = cpu.Draw(0.8, torch.tensor([7]), 1, 0, True)
    with pytest.raises(ValueError, match="sequences are int64"):
        cpu.Decoder(case.weights).draft(case.tokens, call, case.kv.stride(0), (1, 0), few)
    del kept


# --- in the engine ---------------------------------------------------------------------------------------------------

CONFIGS = ("self:4+12/4,2,1", "self:full/tree:-1,0,-1,0,2,3,-1", "self:snapkv16+8/3,2", "self:0+1/2,1", "model:4+12/2,1,1",
           "model:full/tree:-1,-1,0,0,1")  # fmt: skip
LAWS = ({}, {"temperature": 0.8, "verifier": "coupled"}, {"temperature": 0.8, "verifier": "rejection"})
LENGTHS = [20, 90, 41]


@pytest.fixture(scope="module")
def engine():
    made = sd.Engine(sd.load(tiny.model("llama"), noisy_copy(tiny.model("llama"), 0.05)))
    made.threads.most = 1  # thread counts are not tried out, which would be further calls
    assert made.backend.name == "cpu"
    return made


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_one_call_gives_the_rounds_of_a_call_per_level(engine, config, law, monkeypatch):
    options = {"max_new_tokens": 24, "seed": 5, **law}
    at_once = engine.generate(tiny.prompts(LENGTHS), config, **options)
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "draft_draw", lambda self: None)
        by_levels = engine.generate(tiny.prompts(LENGTHS), config, **options)
    assert at_once.tokens == by_levels.tokens
    assert len(at_once.run.rounds) == len(by_levels.run.rounds) > 4
    for one, other in zip(at_once.run.rounds, by_levels.run.rounds, strict=True):
        for name in ("drafted", "accepted", "ranks", "tokens", "context_tokens", "kv_read_bytes", "draft_kv_read_bytes",
                     "kv_write_bytes", "weight_bytes", "linear_flops", "attention_flops", "query_tokens"):  # fmt: skip
            assert getattr(one, name) == getattr(other, name), name
    assert any(any(step.accepted) for step in at_once.run.rounds)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_round_with_a_tree_is_one_call_to_draft_and_one_to_verify(engine, config, law, monkeypatch):
    calls = {"draft": 0, "forward": 0}

    def counted(name):
        real = getattr(cpu.Decoder, name)

        def count(*given):
            calls[name] += 1
            return real(*given)

        return count

    for name in calls:
        monkeypatch.setattr(cpu.Decoder, name, counted(name))
    workload = sd.Workload("calls", tiny.prompts(LENGTHS), 20, stop_at_eos=False, **law)
    run = sd.record(engine.steps(workload, config))
    assert calls == {"draft": len(run.rounds), "forward": len(run.rounds)}
    drafting = run.header.draft if config.startswith("model") else run.header.target
    assert drafting["drafts"] == "one compiled call"


def test_the_header_says_why_drafts_are_not_one_call(engine):
    def drafts(engine, **law):
        return engine.header(sd.Workload("w", [[1, 2]], 4, **law), "off").target["drafts"]

    assert drafts(engine) == "one compiled call"
    assert drafts(engine, temperature=1.0, top_p=0.9) == "level by level: a law with top-k or top-p takes a sort"
    assert drafts(engine, temperature=0.0, top_p=0.9) == "one compiled call"
    by_sdpa = sd.Engine(sd.load(tiny.model("llama")), backend="sdpa")
    assert drafts(by_sdpa) == "level by level: the sdpa back end attends layer by layer"
    moved = sd.Engine(sd.load(tiny.model("llama"), tiny.model("llama"), draft_positions="cache"))
    said = moved.header(sd.Workload("w", [[1, 2]], 4), "off")
    assert said.target["drafts"] == "one compiled call"
    assert said.draft["drafts"] == "level by level: the cache_positions back end attends layer by layer"
