"""Trees do not change what is said: greedy token for token, sampling in law, coupled sample for sample; mutants are caught."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import specdec_lab as sd
import tiny
from specdec_kernels.tree_attention import cpu
from specdec_lab.engine import tree_draft, tree_verify
from specdec_lab.engine.batch import Batch
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.sampling import Noise, Processor, Purpose
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.engine.tree_verify import choose_children
from specdec_lab.engine.verify import Proposal
from specdec_lab.records import TreeShape
from test_lossless import SAMPLING, chi_square_p, exact_law, noisy_copy, sampled

TREES = ("2,1", "4,2,1", "tree:-1,-1,0,0,1", "tree:-1,0,-1,0,2,3,-1")  # the last one is not breadth-first
DRAFTS = ("self:4+12", "self:0+1", "model:4+12", "model:full", "ngram")
CONFIGS = [f"{draft}/{tree}" for draft, tree in zip(DRAFTS * 4, itertools.chain(*([t] * 5 for t in TREES)), strict=True)]
LENGTHS = [1, 2, 37, 64, 65, 130]


def pair_of(family="llama", runner="auto", scale=0.05, **options):
    return sd.load(tiny.model(family, **options), noisy_copy(tiny.model(family, **options), scale), runner=runner)


@pytest.fixture(scope="module")
def expected():
    """Plain greedy text of transformers, per family, made once."""
    prompts = tiny.prompts(LENGTHS)
    return {f: [tiny.plain_greedy(tiny.model(f), p, 30) for p in prompts] for f in tiny.FAMILIES}


PLACES = (("auto", "auto"), ("hf", "sdpa"), ("auto", "reference"), ("hf", "auto"))


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_trees_equal_transformers_for_every_drafter(family, place, expected):
    runner, backend = PLACES[place]
    engine = sd.Engine(pair_of(family, runner), backend=backend)
    prompts, accepted = tiny.prompts(LENGTHS), {}
    for config in CONFIGS[(place + list(tiny.FAMILIES).index(family)) % 4 :: 4]:  # all of them in every place and family group
        out = engine.generate(prompts, config, max_new_tokens=30)
        assert out.tokens == expected[family], config
        rounds = out.run.rounds
        assert all(len(r) == a for s in rounds if s.ranks for r, a in zip(s.ranks, s.accepted, strict=True))
        assert any(s.ranks for s in rounds), "the tree's path was taken"
        accepted[config] = [rank for s in rounds for row in s.ranks for rank in row]
    assert all(ranks for config, ranks in accepted.items() if ":0+1" not in config), "every tree was worth something"
    assert any(max(ranks, default=0) > 1 for ranks in accepted.values()), "second children were accepted too"


@pytest.mark.parametrize("config", ["self:full/4,2,1", "model:4+8/tree:-1,0,-1,0,2", "ngram/3,2,1"])
def test_rows_with_a_tree_end_at_their_own_end_of_text(config):
    made, prompts = tiny.model("llama"), tiny.prompts([3, 9, 20, 33])
    free = [tiny.plain_greedy(made, p, 40, eos=None) for p in prompts]
    eos = free[0][7]
    ended = [t[: t.index(eos) + 1] if eos in t else t for t in free]
    pair = sd.load(tiny.model("llama", eos_token_id=eos), noisy_copy(tiny.model("llama"), 0.05))
    out = sd.Engine(pair).generate(prompts, config, max_new_tokens=40)
    assert out.tokens == ended
    assert any(any(s.censored) for s in out.run.rounds)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("config", ["self:4+12/4,2,1", "model:full/tree:-1,-1,0,0,1,2,4", "model:full/3,2", "ngram/3,2,1,1"])
def test_the_caches_after_every_round_are_those_of_plain_reading(config, backend, monkeypatch):
    moves, compact = [], KvCache.compact

    def counting(self, paths, counts):
        moves.extend(v for path, n in zip(paths, counts, strict=True) for i, v in enumerate(path[:n], 1) if v != i)
        compact(self, paths, counts)

    monkeypatch.setattr(KvCache, "compact", counting)
    pair = pair_of(scale=0.3 if config.startswith("model") else 0.05)
    engine, prompts = sd.Engine(pair, backend=backend), tiny.prompts([20, 26])
    plain = engine.open(sd.Workload("test", prompts, 60, stop_at_eos=False))
    tokens = sd.record(plain.steps("off")).tokens()
    reference, session = plain._session._cache, engine.open(sd.Workload("test", prompts, 60, stop_at_eos=False))
    model = draft_cache([p + t for p, t in zip(prompts, tokens, strict=True)])
    for _ in session.steps(config):
        cache = session._session._cache
        for row, length in enumerate(cache.committed.tolist()):
            length = min(length, int(reference.committed[row]))
            mine, theirs = cache.kv[:, :, row, :, :length], reference.kv[:, :, row, :, :length]
            assert torch.allclose(mine, theirs, atol=1e-5), (row, length)
        drafter = session._session._model
        for row, known in enumerate(drafter._known if drafter is not None else []):
            mine, theirs = drafter.network.cache.kv[:, :, row, :, :known], model.kv[:, :, row, :, :known]
            assert torch.allclose(mine, theirs, atol=1e-5), (row, known)
    assert moves, "accepted nodes had to move"
    if config.startswith("model"):
        assert min(drafter._known) > 70, "what was accepted was kept"


def draft_cache(texts):
    """The cache of the draft model of `pair_of(scale=0.3)` after reading whole texts by itself."""
    alone = sd.Engine(sd.load(noisy_copy(tiny.model("llama"), 0.3)))
    opened = alone.open(sd.Workload("alone", texts, 1, stop_at_eos=False))
    list(opened.steps("off"))
    return opened._session._cache


def test_switching_between_trees_chains_and_plain_decoding_changes_nothing():
    prompts = tiny.prompts([1, 40, 77])
    expected = [tiny.plain_greedy(tiny.model("llama"), p, 80, eos=None) for p in prompts]
    mixed = ["off", "self:4+12/4,2,1", "self:4+12/chain3", "model:full/3,2", "model:full/chain4", "ngram/2,1,1", "off",
             "ngram/chain5", "model:4+8/2,2,1", "model:0+1/tree:-1,0,-1,0,2"]  # fmt: skip
    engine = sd.Engine(pair_of())
    for order in (mixed, mixed[::-1], mixed[::3] + mixed[1::3] + mixed[2::3]):
        cycle = itertools.cycle(order)
        out = engine.generate(prompts, lambda _live, _length, c=cycle: next(c), max_new_tokens=80, stop_at_eos=False)
        assert out.tokens == expected
        assert {s.config for s in out.run.rounds} == set(mixed)
    session = engine.open(sd.Workload("again", prompts, 80, stop_at_eos=False))
    for config in (*mixed, *mixed[::-1]):
        assert sd.record(session.steps(config)).tokens() == expected, config


@pytest.mark.parametrize("config", ["self:0+1/2,1", "self:4+8/4,2,1", "model:4+8/tree:-1,0,-1,0,2", "ngram/3,2,1"])
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}, {"top_p": 0.7}])
def test_coupled_trees_equal_plain_sampling_token_for_token(config, kwargs):
    engine, prompts = sd.Engine(pair_of(scale=0.1)), tiny.prompts([1, 5, 40, 64, 65])

    def texts(order, how):
        workload = sd.Workload("order", [prompts[i] for i in order], 40, temperature=0.8, seed=11, verifier="coupled",
                               sequence_ids=tuple(order), stop_at_eos=False, **kwargs)  # fmt: skip
        run = sd.record(engine.steps(workload, how))
        return dict(zip(order, run.tokens(), strict=True)), run

    plain, _ = texts([0, 1, 2, 3, 4], "off")
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2], [2]):
        found, run = texts(order, config)
        assert found == {i: plain[i] for i in order}
    assert any(s.ranks for s in run.rounds)


def test_ngram_trees_are_point_masses_and_sample_what_plain_decoding_samples():
    engine, prompts = sd.Engine(pair_of()), tiny.prompts([30, 41])
    asked = {"max_new_tokens": 50, "temperature": 0.3, "seed": 4, "stop_at_eos": False}
    out = engine.generate(prompts, "ngram/3,1,1", **asked)
    assert out.tokens == engine.generate(prompts, "off", **asked).tokens
    assert out.summary.num_accepted_draft_tokens > 0


@st.composite
def random_trees(draw):
    parents = [-1]
    for node in range(1, draw(st.integers(2, 14))):
        parents.append(draw(st.integers(-1, node - 1)))
    return TreeShape(tuple(parents))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(tree=random_trees(), draft=st.sampled_from(DRAFTS), temperature=st.sampled_from([0.0, 0.7]))
def test_any_tree_says_what_plain_decoding_says(engine, tree, draft, temperature):
    prompts, asked = tiny.prompts([7, 25]), {"max_new_tokens": 14, "temperature": temperature, "stop_at_eos": False}
    plain = engine.generate(prompts, "off", **asked)
    assert engine.generate(prompts, f"{draft}/{tree}", verifier="coupled", **asked).tokens == plain.tokens


@pytest.fixture(scope="module")
def engine():
    return sd.Engine(pair_of(scale=0.1))


# --- the law of several tokens ---------------------------------------------------------------------------------------

ASKED = [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.3}]


def p_value(config, samples=12_000, **kwargs):
    tokens, accepted = sampled(config, samples=samples, **kwargs)
    processor = Processor(kwargs.get("temperature", 0.9), kwargs.get("top_p", 1.0), kwargs.get("top_k", 0))
    assert accepted > 0
    return chi_square_p(tokens, exact_law(tiny.model("llama", **SAMPLING), processor))


@pytest.mark.parametrize("kwargs", ASKED)
@pytest.mark.parametrize(
    ("config", "verifier"),
    [("self:0+1/2,1", "rejection"), ("model:0+2/4,2", "rejection"), ("model:full/tree:-1,0,-1,0,2,-1,5", "rejection"),
     ("model:0+2/3,2", "coupled"), ("ngram/2,1", "rejection")],
)  # fmt: skip
def test_text_from_trees_follows_the_joint_law_of_the_target(config, verifier, kwargs):
    assert p_value(config, verifier=verifier, **kwargs) > 1e-3


def in_torch(monkeypatch):
    """Let torch draft and decide, level by level, where mutants can live; nothing is compiled but the forwards."""
    monkeypatch.setattr(Batch, "draft_draw", lambda self: None)
    monkeypatch.setattr(tree_verify, "_is_compiled", lambda scores, drawn_from: False)


@pytest.mark.parametrize(
    ("config", "verifier"), [("self:0+1/2,1", "rejection"), ("model:0+2/4,2", "rejection"), ("model:0+2/3,2", "coupled")]
)
def test_text_from_trees_follows_the_joint_law_where_torch_drafts_and_decides(config, verifier, monkeypatch):
    in_torch(monkeypatch)
    assert p_value(config, verifier=verifier) > 1e-3


def likeliest_first(scores, most, position, processor, verifier, noise, take):
    """The right children, put in order of probability rather than of their draw."""
    tokens, law = choose_children(scores, most, position, processor, verifier, noise, take)
    order = law.gather(-1, tokens).argsort(-1, descending=True)
    return tokens.gather(-1, order), law


def rewritten(function, old, new):
    """The function with one expression replaced in its source."""
    source = inspect.getsource(function)
    assert source.count(old) == 1, (old, source.count(old))
    scope = dict(vars(tree_verify))
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


# what is replaced in accept_children
REWRITES = {
    "the residual is not renormalised": (" / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None]", ""),
    "the residual is the target's law": ("(refused[:, None], rest /", "(refused[:, None], left * mass[:, None] /"),
    "refused tokens stay in the draft's law": ("offered = offered.scatter(1, token, 0.0)", "pass"),
    "the draft's law is not renormalised": (" / offered.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)", ""),
    "dead children are tested": (" & (d > 0)", ""),
}
FEW_TO_DRAW = "dead children are tested"  # shows where the draft's support is smaller than a node's children


@pytest.mark.parametrize("rewrite", [rewrite for rewrite in REWRITES if rewrite != FEW_TO_DRAW])
def test_the_joint_law_catches_a_wrong_verifier(rewrite, monkeypatch):
    in_torch(monkeypatch)
    monkeypatch.setattr(tree_verify, "accept_children", rewritten(tree_verify.accept_children, *REWRITES[rewrite]))
    assert p_value("model:0+2/4,2") < 1e-6


NOISES = {
    "draft noise is made once per prompt": ("uniform", lambda original: (
        lambda self, positions, purpose, lanes=0: original(
            self, torch.full_like(positions, 3) if purpose == Purpose.DRAFT else positions, purpose, lanes)
    )),
    "siblings are drawn with one number": ("uniform", lambda original: (
        lambda self, positions, purpose, lanes=0: original(self, positions, purpose, 0 if purpose == Purpose.DRAFT else lanes)
    )),
    "test noise is made once per prompt": ("uniform", lambda original: (
        lambda self, positions, purpose, lanes=0: original(self, torch.full_like(positions, 3), purpose, lanes)
    )),
    "a test reuses the noise that drew its child": ("uniform", lambda original: (
        lambda self, positions, purpose, lanes=0: original(
            self, positions, Purpose.DRAFT if purpose == Purpose.ACCEPT else purpose, lanes)
    )),
}  # fmt: skip


@pytest.mark.parametrize("mutant", NOISES)
def test_the_joint_law_catches_reused_noise(mutant, monkeypatch):
    method, change = NOISES[mutant]
    in_torch(monkeypatch)
    monkeypatch.setattr(Noise, method, change(getattr(Noise, method)))
    assert p_value("model:0+2/3,2") < 1e-6


def test_the_joint_law_catches_children_in_another_order_than_drawn(monkeypatch):
    in_torch(monkeypatch)
    monkeypatch.setattr(tree_draft, "choose_children", likeliest_first)
    assert p_value("model:0+2/4,2") < 1e-6


# --- the first token of a tree, from the engine's own draws -----------------------------------------------------------


def first_token_p_value(p, q, tree, rows=60_000):
    """p-value of the first emitted token's counts, for children drawn by choose_children and tested by decide_tree."""
    layout, noise = layout_of(TreeShape.parse(tree), torch.device("cpu")), Noise(3, torch.arange(rows))
    processor = Processor(1.0)
    (level,), position = layout.levels, torch.full((rows,), 9)
    draft, target = (torch.tensor(law).log().expand(rows, 1, -1) for law in (q, p))
    tokens, law = choose_children(tree_verify.Scores(draft), level.most, position, processor, "rejection", noise)
    proposal = Proposal(tokens[:, 0], torch.full((rows,), layout.num_nodes), law, layout)
    scores = tree_verify.Scores(target.expand(-1, layout.num_nodes + 1, -1))
    decision = tree_verify.decide_tree(proposal, scores, position, processor, "rejection", noise)
    observed = torch.bincount(decision.tokens[:, 0], minlength=len(p))
    kept = [i for i, chance in enumerate(p) if chance > 0]
    assert int(observed.sum()) == int(observed[kept].sum())
    return float(stats.chisquare(observed[kept], [p[i] * rows for i in kept]).pvalue)


RANK_NOISES = {
    "all ranks are tested with one number": lambda original: (
        lambda self, positions, purpose, lanes=0: original(self, positions, purpose)
    ),
    "the last draw reuses a test's number": lambda original: (
        lambda self, positions, purpose, lanes=0: original(
            self, positions, Purpose.ACCEPT if purpose == Purpose.RESIDUAL else purpose, lanes)
    ),
}  # fmt: skip
TESTED_TWICE = ((0.1, 0.45, 0.45), (0.5, 0.4, 0.1))  # the second child's threshold lies below the first one's
MUCH_LEFT = ((0.05, 0.05, 0.3, 0.3, 0.3), (0.5, 0.4, 0.04, 0.03, 0.03))  # several tokens are left after two refusals


@pytest.mark.parametrize("tree", ["tree:-1,-1", "tree:-1,-1,-1"])
@pytest.mark.parametrize(("p", "q"), [TESTED_TWICE, MUCH_LEFT, ((0.25, 0.25, 0.5, 0.0), (0.6, 0.1, 0.1, 0.2))])
def test_the_first_token_of_a_tree_follows_the_target(p, q, tree):
    assert first_token_p_value(p, q, tree) > 1e-3


def test_the_first_token_follows_the_target_where_the_draft_has_fewer_tokens_than_children(monkeypatch):
    p, q = (0.1, 0.1, 0.3, 0.5), (0.6, 0.4, 0.0, 0.0)
    assert first_token_p_value(p, q, "tree:-1,-1,-1") > 1e-3
    in_torch(monkeypatch)
    monkeypatch.setattr(tree_verify, "accept_children", rewritten(tree_verify.accept_children, *REWRITES[FEW_TO_DRAW]))
    assert first_token_p_value(p, q, "tree:-1,-1,-1") < 1e-6


@pytest.mark.parametrize("mutant", RANK_NOISES)
def test_the_first_token_catches_noise_shared_between_decisions(mutant, monkeypatch):
    in_torch(monkeypatch)
    monkeypatch.setattr(Noise, "uniform", RANK_NOISES[mutant](Noise.uniform))
    assert min(first_token_p_value(*laws, "tree:-1,-1") for laws in (TESTED_TWICE, MUCH_LEFT)) < 1e-6


# --- the verifier by itself, exactly --------------------------------------------------------------------------------

LAST = 1 - 2.0**-53


def draw_orders(q, k, *, replace=False):
    """Every order in which k children can be drawn from q, with its probability; beyond the support any other tokens."""
    found = []

    def extend(order, chance, left):
        if len(order) == k:
            found.append((order, chance))
            return
        total = sum(left)
        for token, weight in enumerate(left):
            if weight > 0:
                rest = left if replace else [0.0 if t == token else w for t, w in enumerate(left)]
                extend([*order, token], chance * weight / total, rest)
        if total == 0:
            extend([*order, next(t for t in range(len(q)) if t not in order)], chance, left)

    extend([], 1.0, list(q))
    return found


def emitted_law(p, q, k, accept=None, *, replace=False):
    """The exact law of the token that `accept_children` emits: its thresholds are found by bisection, nothing is sampled."""
    accept = accept or tree_verify.accept_children
    orders = draw_orders(q, k, replace=replace)
    tokens, chance = torch.tensor([o for o, _ in orders]), torch.tensor([c for _, c in orders], dtype=torch.float64)
    laws = [torch.tensor(law, dtype=torch.float64).expand(len(orders), -1) for law in (p, q)]
    exists, uniforms = torch.ones_like(tokens, dtype=torch.bool), torch.full(tokens.shape, LAST, dtype=torch.float64)
    out, alive = torch.zeros(len(p), dtype=torch.float64), chance
    for place in range(k):
        low, high = torch.zeros(len(orders), dtype=torch.float64), torch.ones(len(orders), dtype=torch.float64)

        def taken(u, place=place):
            given = uniforms.clone()
            given[:, place] = u
            return accept(*laws, tokens, exists, given)[0] == place + 1

        for _ in range(50):
            middle = (low + high) / 2
            yes = taken(middle)
            low, high = torch.where(yes, middle, low), torch.where(yes, high, middle)
        threshold = torch.where(taken(torch.full_like(low, LAST)), 1.0, torch.where(taken(torch.zeros_like(low)), low, 0.0))
        out.index_add_(0, tokens[:, place], alive * threshold)
        alive = alive * (1 - threshold)
    _, left = accept(*laws, tokens, exists, uniforms)
    return out + (alive[:, None] * left / left.sum(-1, keepdim=True)).sum(0)


LAWS = [
    ((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)),
    ((0.0, 0.4, 0.6), (0.7, 0.0, 0.3)),  # zeros in both
    ((0.25, 0.25, 0.5, 0.0), (0.25, 0.25, 0.5, 0.0)),  # equal
    ((1.0, 0.0, 0.0, 0.0), (0.0, 0.3, 0.3, 0.4)),  # nothing in common
    ((0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 1.0, 0.0)),  # a draft that is sure
    ((0.1, 0.2, 0.3, 0.4), (0.6, 0.0, 0.4, 0.0)),
    ((0.97, 0.01, 0.01, 0.01), (0.01, 0.01, 0.01, 0.97)),
]


@pytest.mark.parametrize(("p", "q"), LAWS)
def test_what_is_emitted_has_exactly_the_targets_law_for_any_number_of_children(p, q):
    for k in range(1, len(p) + 1):
        assert torch.allclose(emitted_law(p, q, k), torch.tensor(p, dtype=torch.float64), atol=1e-12), k


def normalised(weights):
    total = sum(weights)
    return tuple(w / total for w in weights)


weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=4, max_size=4).filter(any).map(normalised)


@settings(max_examples=60, deadline=None)
@given(p=weights, q=weights, k=st.integers(1, 4))
def test_what_is_emitted_has_exactly_the_targets_law_for_random_laws(p, q, k):
    assert torch.allclose(emitted_law(p, q, k), torch.tensor(p, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("rewrite", REWRITES)
def test_exact_enumeration_catches_a_wrong_verifier(rewrite):
    wrong = rewritten(tree_verify.accept_children, *REWRITES[rewrite])
    off = [float((emitted_law(p, q, k, wrong) - torch.tensor(p)).abs().sum()) for p, q in LAWS for k in range(1, len(p) + 1)]
    assert max(off) > 0.01


def test_siblings_drawn_with_replacement_keep_the_law_only_because_an_equal_one_is_dead():
    p, q = TESTED_TWICE
    for k in (2, 3):
        assert torch.allclose(emitted_law(p, q, k, replace=True), torch.tensor(p, dtype=torch.float64), atol=1e-12)
    tested = rewritten(tree_verify.accept_children, " & (d > 0)", "")
    assert float((emitted_law(p, q, 3, tested, replace=True) - torch.tensor(p)).abs().sum()) > 0.01


def test_all_children_of_the_support_leave_nothing_to_refuse():
    for p, q in (((0.2, 0.3, 0.5), (0.5, 0.3, 0.2)), ((0.9, 0.05, 0.05), (0.1, 0.1, 0.8))):
        for order, _ in draw_orders(q, 3):
            uniforms = torch.full((1, 3), LAST, dtype=torch.float64)
            args = (torch.tensor([law], dtype=torch.float64) for law in (p, q))
            rank, _ = tree_verify.accept_children(*args, torch.tensor([order]), torch.ones(1, 3, dtype=torch.bool), uniforms)
            assert int(rank) > 0, "children that cover the target's support: one is accepted"


def test_one_child_is_accepted_with_one_minus_total_variation():
    p, q = (0.5, 0.3, 0.2), (0.1, 0.2, 0.7)
    u = torch.linspace(0, LAST, 10_001, dtype=torch.float64)[:, None]
    share = 0.0
    for token, chance in enumerate(q):
        laws = (torch.tensor(law, dtype=torch.float64).expand(len(u), -1) for law in (p, q))
        tokens = torch.full(u.shape, token)
        rank, _ = tree_verify.accept_children(*laws, tokens, torch.ones_like(tokens, dtype=torch.bool), u)
        share += chance * float((rank > 0).double().mean())
    assert abs(share - (1 - 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True)))) < 1e-3


def test_children_are_drawn_without_replacement_from_the_drafts_law():
    q = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    scores = tree_verify.Scores(q.log().expand(30_000, 1, -1))
    noise, position = Noise(5, torch.arange(30_000)), torch.full((30_000,), 7)
    tokens, law = tree_verify.choose_children(scores, 3, position, Processor(1.0), "rejection", noise)
    assert torch.allclose(law[0, 0], q)
    expected = {tuple(order): chance for order, chance in draw_orders(q.tolist(), 3)}
    seen = dict.fromkeys(expected, 0)
    for order in map(tuple, tokens[:, 0].tolist()):
        seen[order] += 1
    total = sum(expected.values())
    assert stats.chisquare(list(seen.values()), [c / total * 30_000 for c in expected.values()]).pvalue > 1e-3
    same, nothing = tree_verify.choose_children(scores, 3, position, Processor(1.0), "coupled", noise)
    assert nothing is None
    plain = noise.draw(q.expand(30_000, 1, -1), position[:, None], Purpose.TARGET)[:, 0]
    assert torch.equal(same[:, 0, 0], plain), "the first coupled child is what plain sampling from Q takes"


def test_the_compiled_kernel_is_what_ran_these_tests_where_it_can():
    name = "sdpa" if cpu.why_not(16, torch.float32) else "cpu"
    assert sd.Engine(pair_of()).backend.name == name
