"""SnapKV draft views: what is selected, that every back end reads it once, when it is chosen again, and what it costs."""

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
from specdec_kernels.build import load_library
from specdec_kernels.decoder.cpu import Decoder
from specdec_lab.engine import snapkv, snapkv_reference
from specdec_lab.engine.attention import Need, Reads, SdpaBackend, chain_reads, draft_step_reads
from specdec_lab.engine.backends import BACKENDS
from specdec_lab.engine.batch import count_forward
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.sampling import Processor
from specdec_lab.records import KvView, UnsupportedConfig
from test_lossless import SAMPLING, chi_square_p, exact_law, noisy_copy, sampled

RUNNABLE = [name for name, b in BACKENDS.items() if b.why_not(Need("cpu", torch.float32, 16, 2, index_list=True)) is None]
NEEDS_KERNEL = pytest.mark.skipif("cpu" not in RUNNABLE, reason="no compiled kernel here")
CONFIGS = ("self:snapkv16+8/chain3", "self:snapkv16+8r8/chain3", "self:snapkv1+1/chain2", "self:snapkv40+3r20/chain5")
LENGTHS = [1, 2, 33, 34, 64, 65, 130]  # ragged; one token; observation windows of 0, 1, 32 and 32 tokens with more before


def engine_of(made, backend="auto", runner="auto"):
    return sd.Engine(sd.load(made, runner=runner), backend=backend)


def lists_of(session, view):
    return session._session._self.snapkv._now[KvView.parse(view)]


def from_attention_weights(made, tokens, budget, recent):
    """[layer][KV head] positions, from transformers' own attention weights over the committed tokens."""
    made.set_attn_implementation("eager")
    with torch.no_grad():
        weights = made(torch.tensor([tokens]), output_attentions=True).attentions
    group = made.config.num_attention_heads // made.config.num_key_value_heads
    chosen = []
    for layer in weights:
        observed = layer[0, :, -32:].double().sum(1)  # [Hq, C]
        pooled = torch.nn.functional.avg_pool1d(observed, 5, 1, 2).view(-1, group, len(tokens)).sum(1)
        candidates = pooled[:, : max(0, len(tokens) + 1 - recent)]
        chosen.append([sorted(row.argsort(descending=True, stable=True)[:budget].tolist()) for row in candidates])
    return chosen


# --- selection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("context", [1, 2, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
def test_the_fast_selection_equals_the_float64_reference(context, group):
    generator = torch.Generator().manual_seed(context)
    q = torch.randn(min(32, context), 2 * group, 16, generator=generator)
    k = torch.randn(2, context, 16, generator=generator)
    mass = snapkv_reference.importance(q, k, 0.25, snapkv.POOL)
    assert torch.allclose(snapkv.importance(q, k, 0.25).double(), mass, atol=1e-5)
    # pooling keeps the mass that does not fall off the ends: every query of every head hands out 1
    assert mass.sum() <= q.shape[0] * q.shape[1] + 1e-9
    for recent in (1, 2, 30):
        for size in (1, 7, context + 1 - recent):
            if 1 <= size <= context + 1 - recent:
                expected = snapkv_reference.select(q, k, size, recent, 0.25, snapkv.POOL)
                assert snapkv.select(q, k, size, recent, 0.25).tolist() == expected, (recent, size)


def test_of_equally_important_positions_the_lower_are_kept():
    q, k = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 60, 16)
    assert snapkv.select(q, k, 9, 8, 0.25).tolist() == [list(range(2, 11))]  # 0 and 1 share their window with nothing
    assert snapkv_reference.select(q, k, 9, 8, 0.25, 5) == [list(range(2, 11))]


@pytest.mark.parametrize("runner", ["fast", "hf"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_the_engine_selects_what_the_attention_weights_of_transformers_say(backend, runner):
    made = tiny.model("llama")
    prompts = tiny.prompts([1, 2, 12, 32, 33, 34, 66, 130])
    workload = sd.Workload("test", prompts, 1, stop_at_eos=False)
    session = engine_of(tiny.model("llama"), backend, "hf" if runner == "hf" else "auto").open(workload)
    for budget, recent in ((9, 3), (1, 1), (30, 32)):
        list(session.steps(f"self:snapkv{budget}+{recent}/chain1"))
        lists = lists_of(session, f"snapkv{budget}+{recent}")
        for row, prompt in enumerate(prompts):
            committed = len(prompt) - 1
            count = min(budget, max(0, committed + 1 - recent))
            assert lists.at[row] == committed
            if count:
                expected = from_attention_weights(made, prompt[:-1], budget, recent)
                assert lists.index[:, row, :, :count].tolist() == expected, (budget, recent, committed)


def test_selecting_leaves_the_cache_as_it_was():
    workload = sd.Workload("test", tiny.prompts([70, 40]), 1, stop_at_eos=False)
    session = engine_of(tiny.model("llama")).open(workload)
    list(session.steps("off"))
    cache = session._session._cache
    before = cache.kv[..., : cache.scratch_slot, :].clone()
    inner = session._session
    inner.rewind()
    inner.prefill(sd.SpecConfig.parse("self:snapkv8+4/chain1"))
    assert lists_of(session, "snapkv8+4").at == (69, 39)
    assert torch.equal(cache.kv[..., : cache.scratch_slot, :], before)


# --- reading --------------------------------------------------------------------------------------------------------


def tree_reads(committed, view):
    corner = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    depths = torch.tensor([0, 1, 1, 2])
    return Reads(committed, corner, depths, torch.arange(4), view, int(committed.max()) + 4, False)


def made_lists(committed, view, layers, heads, size, seed=0):
    """Random ascending positions before the window, or all positions where there are no more than `size`."""
    g, index = torch.Generator().manual_seed(seed), torch.empty(layers, len(committed), heads, size, dtype=torch.int32)
    for layer, row, head in itertools.product(range(layers), range(len(committed)), range(heads)):
        before = committed[row] + 1 - view.recent
        some = torch.randperm(max(before, size), generator=g)[:size].sort().values
        index[layer, row, head] = some if before > size else torch.arange(size)
    return index


def all_reads(committed, view):
    rows, longest = torch.tensor(committed), max(committed)
    uniform = min(committed) == longest
    yield chain_reads(rows, 1, view, longest, uniform)
    yield chain_reads(rows, 4, view, longest, uniform)
    yield from (draft_step_reads(rows, step, view, longest, uniform) for step in (1, 5))
    yield tree_reads(rows, view)


def keys_by_definition(reads, index, layer, row, head, query):
    """Every slot that a query reads, once: the list before the window of the call, then the window and the corner."""
    committed, view = int(reads.committed[row]), reads.view
    depth, node = reads.node_depths.tolist(), int(reads.query_nodes[query])
    shallow = min(depth[int(n)] for n in reads.query_nodes)
    before = min(max(committed + shallow + 1 - view.recent, 0), committed)
    listed = index[layer, row, head, :before].tolist()
    place = committed + depth[node]
    near = [s for s in range(committed) if place - s < view.recent]
    seen = [c for c in range(reads.corner.shape[1]) if reads.corner[query, c] and depth[node] - depth[c] < view.recent]
    return listed + near + [committed + c for c in seen]


CASES = [([0, 1], 6, 1), ([7, 90], 6, 3), ([64, 64], 20, 8), ([65, 150], 64, 2), ([150, 3], 200, 9), ([128, 149], 1, 100)]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("committed", "budget", "recent"), CASES)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_back_end_reads_exactly_the_listed_keys_and_the_window(name, committed, budget, recent, group):
    g, view, backend = torch.Generator().manual_seed(budget), KvView.snapkv(budget, recent), BACKENDS[name]
    cache = KvCache(3, 2, 2, 200, 16, torch.float32, torch.device("cpu"))
    cache.kv.normal_(generator=g)
    for row, length in enumerate(committed):  # sdpa masks scores and not loads
        cache.kv[:, :, row, :, length + 6 :] = 3.0 if name == "sdpa" else float("nan")
    index = made_lists(committed, view, 3, 2, min(budget, cache.capacity))
    for without in all_reads(committed, view):
        reads = replace(without, index=index)
        q = torch.randn(2, reads.num_queries, 2 * group, 16, generator=g)
        plan = backend.plan(reads, cache, group)
        for layer in range(3):
            out = backend.attend(q, cache, layer, plan, 0.25)
            for row, head, t in itertools.product(range(2), range(2 * group), range(reads.num_queries)):
                keys = keys_by_definition(reads, index, layer, row, head // group, t)
                assert len(keys) == len(set(keys))
                k, v = (part[row, head // group, keys].double() for part in cache.layer(layer))
                expected = (k @ q[row, t, head].double() * 0.25).softmax(0) @ v
                assert torch.allclose(out[row, t, head].double(), expected, atol=3e-6), (layer, row, head, t)


def read_weights(name, committed, budget, recent, step, seed=0):
    """[B, slots] the weight of every slot in a draft step whose scores are all equal."""
    view, slots = KvView.snapkv(budget, recent), 256
    cache = KvCache(1, len(committed), 1, slots - 1, slots, torch.float32, torch.device("cpu"))
    cache.kv[0, 1] = torch.eye(slots)
    reads = draft_step_reads(torch.tensor(committed), step, view, max(committed), False)
    reads = replace(reads, index=made_lists(committed, view, 1, 1, min(budget, cache.capacity), seed))
    backend = BACKENDS[name]
    return backend.attend(torch.zeros(len(committed), 1, 1, slots), cache, 0, backend.plan(reads, cache, 1), 1.0)[:, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(RUNNABLE), committed=st.lists(st.integers(0, 240), min_size=1, max_size=3),
    budget=st.integers(1, 300), recent=st.integers(1, 300), step=st.integers(0, 6), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_key_has_the_same_weight(name, committed, budget, recent, step, seed):
    for row, weights in zip(committed, read_weights(name, committed, budget, recent, step, seed), strict=True):
        read = weights > 0
        listed = min(budget, max(0, row + step + 1 - recent), row)
        assert int(read.sum()) == listed + min(recent, row + step + 1)
        assert torch.allclose(weights[read], 1 / read.sum(), rtol=1e-5)
        assert int(read.sum()) == count_forward([row], 1, KvView.snapkv(budget, recent), step).keys


def test_the_weight_test_catches_a_key_that_is_listed_and_in_the_window(monkeypatch):
    monkeypatch.setattr(Reads, "num_listed", property(lambda self: torch.full_like(self.committed, self.index.shape[-1])))
    weights = read_weights("sdpa", [10], 8, 6, 0)[0]
    assert weights[weights > 0].max() > 1.5 * weights[weights > 0].min()


@NEEDS_KERNEL
@pytest.mark.parametrize(
    ("lists", "words"),
    [([3, 2, 9], "not above the one before"), ([3, 3, 9], "not above"), ([-1, 2, 9], "row 0"), ([3, 9, 60], "window of 8")],
)
def test_lists_that_would_read_a_key_twice_or_none_are_refused_before_memory_is_touched(lists, words):
    cache = KvCache(2, 1, 1, 100, 16, torch.float32, torch.device("cpu"))
    index = torch.tensor([[[[3, 4, 9]]], [[lists]]], dtype=torch.int32)  # of the last layer only
    reads = replace(draft_step_reads(torch.tensor([60]), 0, KvView.snapkv(3, 8), 60, True), index=index)
    if words != "window of 8":  # which depends on the length, and is checked before each forward
        with pytest.raises(ValueError, match=words):
            BACKENDS["cpu"].plan(reads, cache, 1)
        return
    plan = BACKENDS["cpu"].plan(reads, cache, 1)
    with pytest.raises(ValueError, match=words):
        BACKENDS["cpu"].attend(torch.zeros(1, 1, 1, 16), cache, 1, plan, 1.0)


@NEEDS_KERNEL
def test_lists_are_checked_whole_when_chosen_and_not_before_every_forward(monkeypatch):
    calls = Counter()

    class Counted:
        def __getattr__(self, name):
            calls[name] += 1
            return getattr(load_library(), name)

    monkeypatch.setattr("specdec_lab.engine.cpu_backend.load_library", Counted)
    workload = sd.Workload("test", tiny.prompts([90]), 30, stop_at_eos=False)
    steps = list(engine_of(tiny.model("llama"), "cpu").steps(workload, "self:snapkv8+8/chain3"))
    assert len(steps) > 5
    assert calls["tree_attention_check_index"] == 1
    assert calls["tree_attention_check"] > len(steps)


@NEEDS_KERNEL
def test_lists_of_another_shape_are_refused():
    cache = KvCache(2, 1, 1, 100, 16, torch.float32, torch.device("cpu"))
    index = torch.zeros(1, 1, 1, 3, dtype=torch.int32)
    reads = replace(draft_step_reads(torch.tensor([60]), 0, KvView.snapkv(3, 8), 60, True), index=index)
    with pytest.raises(ValueError, match=r"here \[2, 1, 1, N\]; got torch.int32 \[1, 1, 1, 3\]"):
        BACKENDS["cpu"].plan(reads, cache, 1)


# --- drafting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected():
    return [tiny.plain_greedy(tiny.model("llama"), p, 50) for p in tiny.prompts(LENGTHS)]


@pytest.mark.parametrize("runner", ["fast", "hf"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_greedy_text_through_snapkv_drafts_equals_transformers(backend, runner, expected):
    engine = engine_of(tiny.model("llama"), backend, "hf" if runner == "hf" else "auto")
    assert (engine.backend.name, engine.pair.target.kind) == (backend, runner)
    for config in CONFIGS:
        out = engine.generate(tiny.prompts(LENGTHS), config, max_new_tokens=50)
        assert out.tokens == expected, config
        assert {s.config for s in out.run.rounds} == {config}
        assert out.summary.num_accepted_draft_tokens > 0


@NEEDS_KERNEL
def test_chains_drafted_in_one_call_are_those_drafted_step_by_step(monkeypatch):
    calls, draft = [], Decoder.draft
    monkeypatch.setattr(Decoder, "draft", lambda self, *arguments: calls.append(1) or draft(self, *arguments))
    accepted = {}
    for backend in ("cpu", "sdpa"):
        # recent 1: in every step of the chain the window moves over keys that a short row lists
        for config in (*CONFIGS, "self:snapkv20+1/chain6"):
            run = engine_of(tiny.model("llama"), backend).generate(tiny.prompts(LENGTHS), config, max_new_tokens=50).run
            accepted[backend, config] = [(s.drafted, s.accepted) for s in run.rounds]
            assert len(calls) >= len(run.rounds) if backend == "cpu" else not calls
        calls.clear()
    assert all(accepted["cpu", c] == accepted["sdpa", c] for b, c in accepted)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_that_end_early_change_nothing(config):
    made, prompts = tiny.model("llama"), tiny.prompts([3, 40, 75, 33])
    free = [tiny.plain_greedy(made, p, 40, eos=None) for p in prompts]
    eos = free[1][7]
    texts = [t[: t.index(eos) + 1] if eos in t else t for t in free]
    assert len({len(t) for t in texts}) > 1
    out = engine_of(tiny.model("llama", eos_token_id=eos)).generate(prompts, config, max_new_tokens=40)
    assert out.tokens == texts


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_lengths_around_every_block_and_the_observation_window_are_accepted_alike(length):
    made, prompts = tiny.model("llama"), tiny.prompts([length, length + 1])
    plain = [tiny.plain_greedy(made, p, 12, eos=None) for p in prompts]
    engine = engine_of(tiny.model("llama"))
    for view, worst in (("snapkv2000+40", 1.0), ("snapkv100+32", 0.5), ("snapkv24+8r5", 0.2)):
        out = engine.generate(prompts, f"self:{view}/chain3", max_new_tokens=12, stop_at_eos=False)
        assert out.tokens == plain
        offered = sum(sum(s.drafted) for s in out.run.rounds if not any(s.censored))
        accepted = sum(sum(s.accepted) for s in out.run.rounds if not any(s.censored))
        assert accepted >= worst * offered, (view, accepted, offered)


@pytest.mark.parametrize("view", ["4+400", "0+400", "399+7", "snapkv400+7", "snapkv1+400", "snapkv3000+7r16", "snapkv160+300"])
@pytest.mark.parametrize("backend", RUNNABLE)
def test_a_view_as_large_as_the_context_equals_full_attention(backend, view):
    out = engine_of(tiny.model("llama"), backend).generate(
        tiny.prompts([1, 64, 300]), f"self:{view}/chain6", max_new_tokens=40, stop_at_eos=False
    )
    for step in out.run.rounds:
        assert all(a == d for a, d, cut in zip(step.accepted, step.drafted, step.censored, strict=True) if not cut), view
    assert out.summary.num_accepted_draft_tokens > 60


def acceptance_by_half(config, new_tokens=500):
    made = tiny.model("llama", max_position_embeddings=2048)
    prompts = tiny.prompts([60, 90])
    out = engine_of(made, "sdpa").generate(prompts, config, max_new_tokens=new_tokens, stop_at_eos=False)
    middle = len(out.run.rounds) // 2
    halves = out.run.rounds[:middle], out.run.rounds[middle:]
    return [sum(map(sum, (s.accepted for s in h))) / sum(map(sum, (s.drafted for s in h))) for h in halves], out


def does_not_drift(rates):
    return min(rates) > 0.5 and rates[1] > rates[0] - 0.1


@pytest.mark.parametrize("config", ["self:snapkv16+12/chain3", "self:snapkv16+12r24/chain3"])
def test_acceptance_does_not_drift_down_over_many_windows(config):
    rates, out = acceptance_by_half(config)
    assert does_not_drift(rates), rates
    made = tiny.model("llama", max_position_embeddings=2048)
    assert out.tokens[0][:80] == tiny.plain_greedy(made, tiny.prompts([60, 90])[0], 80, eos=None)


def test_the_drift_test_catches_a_window_that_is_frozen_after_the_prompt(monkeypatch):
    window, visible, first = SdpaBackend.window_slots, Reads.visible, {}

    def frozen(reads, width):
        slots, valid = window(reads, width)
        if reads.view.kind != "snapkv":
            return slots, valid
        stay = first.setdefault(width, slots)
        return torch.where(slots >= reads.committed[:, None], slots, stay), valid

    def sees(self, keys, sliding=None):
        seen = visible(self, keys, sliding)
        return torch.ones_like(seen) if self.view.kind == "snapkv" else seen

    monkeypatch.setattr(SdpaBackend, "window_slots", staticmethod(frozen))
    monkeypatch.setattr(Reads, "visible", sees)
    rates, _ = acceptance_by_half("self:snapkv16+12/chain3")
    assert not does_not_drift(rates)


def test_switching_views_between_rounds_changes_nothing():
    prompts = tiny.prompts([1, 40, 77])
    made = tiny.model("llama")
    plain = [tiny.plain_greedy(made, p, 60, eos=None) for p in prompts]
    cycle = itertools.cycle((*CONFIGS, "off", "self:4+8/chain2", "ngram/chain3", "model:4+8/chain2"))
    engine = sd.Engine(sd.load(tiny.model("llama"), noisy_copy(tiny.model("llama"), 0.05)))
    out = engine.generate(prompts, lambda _live, _length: next(cycle), max_new_tokens=60, stop_at_eos=False)
    assert out.tokens == plain
    assert set(CONFIGS) <= {s.config for s in out.run.rounds}


def test_a_drafts_law_through_lists_leaves_the_samples_of_plain_decoding():
    engine, prompts = engine_of(tiny.model("llama")), tiny.prompts([1, 5, 40, 65])
    asked = {"max_new_tokens": 40, "temperature": 0.8, "seed": 11, "stop_at_eos": False}
    plain = engine.generate(prompts, "off", **asked)
    out = engine.generate(prompts, "self:snapkv12+6r16/chain3", verifier="coupled", **asked)
    assert out.tokens == plain.tokens
    assert out.summary.num_accepted_draft_tokens > 0


def test_sampled_text_follows_the_joint_law_of_the_target():
    tokens, accepted = sampled("self:snapkv1+2r2/chain3")
    assert chi_square_p(tokens, exact_law(tiny.model("llama", **SAMPLING), Processor(0.9))) > 1e-3
    assert accepted > 0


# --- when and at what cost ------------------------------------------------------------------------------------------


def spied(monkeypatch):
    """Committed lengths of every choice made."""
    choices, original = [], snapkv.SnapKv._choose

    def choose(self, batch, view, at):
        choices.append(at)
        return original(self, batch, view, at)

    monkeypatch.setattr(snapkv.SnapKv, "_choose", choose)
    return choices


def test_lists_are_chosen_again_when_a_row_has_committed_refresh_tokens(monkeypatch):
    choices = spied(monkeypatch)
    made, prompts = tiny.model("llama"), tiny.prompts([50, 80])
    session = engine_of(tiny.model("llama")).open(sd.Workload("test", prompts, 60, stop_at_eos=False))
    texts = [list(p) for p in prompts]
    for step in session.steps("self:snapkv9+4r16/chain3"):
        now = lists_of(session, "snapkv9+4r16")
        if step.kind == "round":
            expected = [from_attention_weights(made, t[:at], 9, 4) for t, at in zip(texts, now.at, strict=True)]
            found = [now.index[:, row].tolist() for row in range(2)]
            assert found == expected, "chosen by the last 32 committed tokens of that moment"
            before = tuple(len(t) - 1 for t in texts)
            live = [bool(t) for t in step.tokens]
            assert max(b - a for b, a, alive in zip(before, now.at, live, strict=True) if alive) < 16
        for text, tokens in zip(texts, step.tokens, strict=True):
            text.extend(tokens)
    assert choices[0] == (49, 79)
    assert len(choices) >= 4
    assert all(max(b - a for a, b in zip(x, y, strict=True)) >= 16 for x, y in itertools.pairwise(choices))


def test_a_refresh_is_booked_to_drafting_and_only_to_the_rounds_that_made_it(monkeypatch):
    choices, engine = spied(monkeypatch), engine_of(tiny.model("llama"))
    session = engine.open(sd.Workload("test", tiny.prompts([90]), 40, stop_at_eos=False))
    shape, view = engine.pair.target.shape, KvView.parse("snapkv8+4r12")
    kv = shape.kv_bytes_per_token(4)
    known = None
    for step in session.steps("self:snapkv8+4r12/chain2"):
        context = step.context_tokens[0]
        drafting = [count_forward([context], 1, view, i).keys for i in range(2)] if step.kind == "round" else []
        chose, known = known != choices[-1], choices[-1]
        at = known[0]
        scanned = [at, at // 2] if chose else []  # the forward reads keys and values, scoring keys alone
        assert step.draft_kv_read_bytes == kv * sum(drafting + scanned) + (kv // 2) * (chose and at % 2)
        if step.kind == "prefill":
            assert chose
            assert step.draft_s > step.draft_attention_s > 0
    assert len(choices) >= 3


def test_a_session_keeps_the_selection_of_its_prompts_and_returns_to_it(monkeypatch):
    choices = spied(monkeypatch)
    session = engine_of(tiny.model("llama")).open(sd.Workload("test", tiny.prompts([60, 45]), 40, stop_at_eos=False))
    configs = ("off", "self:snapkv8+4r8/chain3", "self:snapkv8+4r8/chain3", "self:snapkv8+4/chain2")
    runs = [sd.record(session.steps(config)) for config in configs]
    kinds = [[s.kind for s in run.steps].count("prefill") for run in runs]
    assert kinds == [1, 1, 0, 0], "reading the prompt, then choosing, then neither"
    assert choices.count((59, 44)) == 1
    assert [s.accepted for s in runs[1].rounds] == [s.accepted for s in runs[2].rounds]
    assert runs[1].steps[0].draft_s > 0
    assert runs[1].steps[0].kv_read_bytes == 0
    assert all(run.tokens() == runs[0].tokens() for run in runs)


def test_a_growing_conversation_selects_again_after_each_text(monkeypatch):
    choices, made = spied(monkeypatch), tiny.model("llama")
    first, second = tiny.prompts([40, 60], seed=1), tiny.prompts([25, 3], seed=2)
    workload = sd.Workload("talk", first, 8, turns=(second,), stop_at_eos=False)
    session = engine_of(tiny.model("llama")).open(workload)
    for _ in range(2):
        choices.clear()
        run = sd.record(session.steps("self:snapkv9+4/chain3"))
        assert choices == [(39, 59), (39 + 8 + 25, 59 + 8 + 3)]
        for row, tokens in enumerate(run.tokens()):
            reply = tiny.plain_greedy(made, first[row], 8, eos=None)
            assert tokens == reply + tiny.plain_greedy(made, first[row] + reply + second[row], 8, eos=None)


def test_a_context_that_fits_is_listed_without_a_forward():
    session = engine_of(tiny.model("llama")).open(sd.Workload("test", tiny.prompts([20, 30]), 10, stop_at_eos=False))
    prefill, *_ = list(session.steps("self:snapkv32+4/chain2"))
    assert prefill.kind == "prefill"
    assert prefill.draft_kv_read_bytes == 0
    assert lists_of(session, "snapkv32+4").index[0, 0, 0].tolist() == list(range(32))


@given(
    committed=st.lists(st.integers(0, 60), min_size=1, max_size=4), queries=st.integers(1, 5), before=st.integers(0, 5),
    budget=st.integers(1, 70), recent=st.integers(1, 70),
)  # fmt: skip
def test_counts_equal_counting_one_by_one(committed, queries, before, budget, recent):
    view, keys, pairs = KvView.snapkv(budget, recent), 0, 0
    for length in committed:
        first = length + before
        listed = set(range(min(budget, max(0, first + 1 - recent), length)))  # which ones makes no difference
        windows = [set(range(max(0, first + t + 1 - recent), first + t + 1)) for t in range(queries)]
        assert not any(listed & w for w in windows)
        pairs += sum(len(listed | w) for w in windows)
        keys += len(listed.union(*windows))
    counted = count_forward(committed, queries, view, before)
    assert (counted.keys, counted.pairs) == (keys, pairs)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_second_network_refuses_lists_and_says_why():
    engine = sd.Engine(sd.load(tiny.model("llama"), tiny.model("llama")))
    with pytest.raises(UnsupportedConfig, match=r"SnapKV chooses among the target's own keys.* such as model:4\+8/chain3"):
        engine.generate([[1, 2, 3]], "model:snapkv64+8/chain3")


def test_sliding_window_layers_refuse_lists_and_say_why():
    made = tiny.model("mistral", sliding_window=16)
    engine = engine_of(made, runner="hf")
    with pytest.raises(UnsupportedConfig, match="sliding-window layers"):
        engine.generate([[1, 2, 3]], "self:snapkv64+8/chain3")
    for name in ("sdpa", "reference"):
        assert "sliding-window" in BACKENDS[name].why_not(Need("cpu", torch.float32, 16, 1, index_list=True, sliding=True))
