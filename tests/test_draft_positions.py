"""`draft_positions="cache"`: a draft trained on short texts sees, at any length, what it would see in a short one."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import specdec_lab as sd
import tiny
from reindexed import Oracle, turned
from specdec_lab.cli import main
from specdec_lab.engine import cache_positions, network
from specdec_lab.engine.attention import chain_reads, draft_step_reads
from specdec_lab.engine.backends import BackendUnavailable
from specdec_lab.engine.batch import Batch
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.cache_positions import CachePositions, MovedPlan
from specdec_lab.engine.models.rotation import FAMILIES, Rotation, turn
from specdec_lab.engine.network import Network
from specdec_lab.engine.session import Session
from specdec_lab.engine.tree_layout import layout_of
from specdec_lab.records import KvView, TreeShape
from test_lossless import noisy_copy
from test_trees_lossless import random_trees

CPU = torch.device("cpu")
TRAINED = 32  # positions of the small drafts
LONG = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": TRAINED, "factor": 8.0,
        "short_factor": [1.0 + 0.02 * i for i in range(8)], "long_factor": [4.0 + i for i in range(8)]}  # fmt: skip
SCALED = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, "longrope": LONG,
    "yarn": {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": TRAINED},
}  # fmt: skip


def draft_of(family="llama", **options):
    return noisy_copy(tiny.model(family, **{"max_position_embeddings": TRAINED, **options}), 0.05)


def target_of(family="llama"):
    return tiny.model(family, max_position_embeddings=2048)


def engine_of(family="llama", positions="cache", runner="auto", draft=None, **options):
    made = draft if draft is not None else draft_of(family, **options)
    return sd.Engine(sd.load(target_of(family), made, draft_positions=positions, runner=runner))


@pytest.fixture
def drafting(monkeypatch):
    """Runs an engine and gives, per round: the texts, what was proposed, and the logits of every draft forward."""
    logits, rounds = [], []
    score, propose = Network.score, Session._propose

    def scored(self, *given):
        scores = score(self, *given)
        logits.append(scores.logits.clone())
        return scores

    def proposed(self, config):
        batch = self._batch
        ends = [n if live else 0 for n, live in zip(batch.host_lengths, batch.host_live, strict=True)]
        texts = [batch.ids[row, :end].tolist() for row, end in enumerate(ends)]
        logits.clear()
        found = propose(self, config)
        rounds.append((texts, found[0], list(logits)))
        return found

    monkeypatch.setattr(Batch, "draft_draw", lambda self: None)  # a forward per level, so that its logits are seen
    monkeypatch.setattr(Network, "score", scored)
    monkeypatch.setattr(Session, "_propose", proposed)

    def run(engine, prompts, config, new_tokens):
        rounds.clear()
        out = engine.generate(prompts, config, max_new_tokens=new_tokens, stop_at_eos=False)
        return out, list(rounds)

    return run


def nodes_of(proposal, row, logits):
    """Of every fed node of a round: the tokens that lead to it from the root, and its logits."""
    yield [], logits[0][row, 0]
    if proposal.layout is None:
        for step, scores in enumerate(logits[1:], 1):
            yield proposal.tokens[row, :step].tolist(), scores[row, 0]
        return
    parents = proposal.layout.parents
    for level, scores in zip(proposal.layout.levels[1:], logits[1:], strict=True):
        for place, node in enumerate(level.query_nodes.tolist()):
            path = []
            while node:
                path.insert(0, int(proposal.tokens[row, node - 1]))
                node = parents[node]
            yield path, scores[row, place]


def errors(rounds, oracle):
    """Largest difference of a draft's logits from the oracle's, over all rounds, rows and nodes; and whether tokens differ."""
    lines, worst, wrong = {}, 0.0, 0
    for texts, proposal, logits in rounds:
        for row, text in enumerate(texts):
            if not text:
                continue
            line = lines.setdefault(row, oracle.line())
            roots = oracle.read(line, text[line.length :])
            for path, found in nodes_of(proposal, row, logits):
                right = oracle.read(line.copied(), path) if path else roots
                worst = max(worst, float((found.double() - right).abs().max()))
                wrong += int(found.argmax()) != int(right.argmax())
    return worst, wrong


# --- the definition --------------------------------------------------------------------------------------------------


def test_a_draft_trained_on_256_tokens_at_1100_equals_a_re_indexed_run(drafting):
    prompts = tiny.prompts([1100, 300])
    out, rounds = drafting(engine_of(max_position_embeddings=256), prompts, "model:4+252/chain4", 10)
    oracle = Oracle(draft_of(max_position_embeddings=256), 4, 252)
    worst, wrong = errors(rounds, oracle)
    assert worst < 1e-5
    assert not wrong
    assert oracle.seen == 255, "the furthest position of the cache, and the last that was trained"
    assert out.tokens == [tiny.plain_greedy(target_of(), p, 10, eos=None) for p in prompts]
    assert out.summary.num_accepted_draft_tokens > 0


def test_absolute_positions_fail_that_test(drafting):
    prompts, config = tiny.prompts([150, 90]), "model:4+28/4,2,1"
    for positions, is_right in (("cache", True), ("absolute", False)):
        _, rounds = drafting(engine_of(positions=positions), prompts, config, 5)
        worst, _ = errors(rounds, Oracle(draft_of(), 4, 28))
        assert (worst < 1e-5) == is_right, worst
        worst, _ = errors(rounds, Oracle(draft_of(), 4, 28, moves=False))
        assert (worst < 1e-4) != is_right, "and the oracle at absolute positions is what the default computes"


CONFIGS = ("model:4+20/chain3", "model:3+9/4,2,1", "model:1+1/tree:-1,0,-1,0,2", "model:0+16/2,1", "model:20+5/chain6")


PLACES = [("olmo2", "hf"), *itertools.product(("llama", "mistral", "qwen2", "qwen3"), ("fast", "hf"))]


@pytest.mark.parametrize("place", range(len(PLACES)), ids=lambda n: "-".join(PLACES[n]))
def test_every_family_drafts_chains_and_trees_at_the_positions_of_its_cache(drafting, monkeypatch, place):
    family, runner = PLACES[place]
    monkeypatch.setattr(network, "PREFILL_CHUNK", 17)  # several chunks, each of queries with gaps of their own
    target, prompts = target_of(family), tiny.prompts([64, 41, 2])
    engine = sd.Engine(sd.load(target, draft_of(family), draft_positions="cache", runner=runner))
    assert engine.pair.draft.kind == runner
    for config in (CONFIGS[place % 5], CONFIGS[(place + 2) % 5]):  # each of them in several places
        view = KvView.parse(config.partition(":")[2].partition("/")[0])
        out, rounds = drafting(engine, prompts, config, 7)
        worst, _ = errors(rounds, Oracle(draft_of(family), view.sink, view.recent))
        assert worst < 2e-5, config
        assert {s.config for s in out.run.rounds} == {config}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies_are_those_of_short_texts(drafting, kind):
    options = {"rope_parameters": SCALED[kind], **({"max_position_embeddings": 256} if kind == "longrope" else {})}
    engine = engine_of(**options)
    assert engine.pair.draft.kind == ("fast" if kind == "yarn" else "hf")
    _, rounds = drafting(engine, tiny.prompts([90, 41]), "model:4+20/3,1", 8)
    worst, _ = errors(rounds, Oracle(draft_of(**options), 4, 20))
    assert worst < 2e-5
    oracle = Oracle(draft_of(**options), 4, 20)
    oracle.model.model.rotary_emb.frequencies /= 2  # any others are seen
    assert errors(rounds, oracle)[0] > 1e-2


def test_greedy_text_with_a_moved_draft_equals_transformers_through_every_change_of_configuration():
    prompts, engine = tiny.prompts([1, 40, 150]), engine_of()
    plain = [tiny.plain_greedy(target_of(), p, 60, eos=None) for p in prompts]
    for configs in (CONFIGS, (*CONFIGS, "off", "self:4+8/chain3", "model:full/chain3", "ngram/chain3")):
        cycle = itertools.cycle(configs)
        out = engine.generate(prompts, lambda _live, _length, c=cycle: next(c), max_new_tokens=60, stop_at_eos=False)
        assert out.tokens == plain
        assert {s.config for s in out.run.rounds} == set(configs)
    for config in CONFIGS[:3]:
        assert engine.generate(prompts, config, max_new_tokens=60, stop_at_eos=False).tokens == plain


def test_within_the_window_both_modes_draft_the_same():
    engines, asked = (engine_of(positions="absolute"), engine_of()), {"config": "model:4+60/3,2", "max_new_tokens": 12}
    runs = [engine.generate(tiny.prompts([9, 3]), **asked).run for engine in engines]
    assert [s.ranks for s in runs[0].rounds] == [s.ranks for s in runs[1].rounds]


# --- mutants ---------------------------------------------------------------------------------------------------------


def gap_of_the_last(reads, view):
    """One gap for the whole forward."""
    return (reads.positions - (view.sink + view.recent - 1)).clamp(min=0).amax(1, keepdim=True).expand_as(reads.positions)


def gap_by_slot(reads, view):
    """Nodes of a tree taken for tokens in a row."""
    return (reads.slots - (view.sink + view.recent - 1)).clamp(min=0)


def gap_one_short(reads, view):
    return (reads.positions - (view.sink + view.recent)).clamp(min=0)


@pytest.mark.parametrize("gaps", [gap_of_the_last, gap_by_slot, gap_one_short])
def test_the_definition_catches_sinks_at_another_distance(drafting, monkeypatch, gaps):
    plan = CachePositions.plan

    def planned(self, reads, cache, group, sliding=None):
        made = plan(self, reads, cache, group, sliding)
        if not isinstance(made, MovedPlan):
            return made
        cos, sin = self.rotation.at(-gaps(reads, reads.view))
        return replace(made, back=(cos[:, :, None], sin[:, :, None]))

    monkeypatch.setattr(CachePositions, "plan", planned)
    _, rounds = drafting(engine_of(), tiny.prompts([90, 41]), "model:4+20/4,2,1", 8)
    assert errors(rounds, Oracle(draft_of(), 4, 20))[0] > 1e-2


# --- the back end ----------------------------------------------------------------------------------------------------


def rotation(dim=16):
    return Rotation(10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim))


def filled(committed, width, seed, dim=16, heads=2):
    """Unturned keys of every row's prefix and corner, and a cache that holds them turned to `positions`."""
    g, longest = torch.Generator().manual_seed(seed), max(committed) + width
    cache = KvCache(1, len(committed), heads, longest, dim, torch.float32, CPU)
    raw = torch.randn(2, len(committed), heads, longest, dim, generator=g)
    return raw, cache


def positions_of(reads, longest):
    """[B, slots] where keys stand: a node of the corner at its depth."""
    slots = torch.arange(longest)[None]
    node = slots - reads.committed[:, None]
    inside = node.clamp(0, reads.corner.shape[1] - 1)
    return torch.where(node < 0, slots, reads.committed[:, None] + reads.node_depths[inside])


def by_definition(reads, raw, q, scale):
    """[B, T, Hq, D] float64: the keys of every query turned to positions 0, 1, 2, ... in the order in which they stand."""
    view, places = reads.view, positions_of(reads, raw.shape[3])
    visible, group = reads.visible(torch.arange(raw.shape[3])[None].expand(len(raw[0]), -1)), q.shape[2] // raw.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        slots, mine = visible[row, t].nonzero().flatten(), int(reads.positions[row, t])
        shift = max(0, mine - (view.sink + view.recent - 1))
        at = torch.where(places[row, slots] < view.sink, places[row, slots], places[row, slots] - shift)
        assert at.tolist() == sorted(set(at.tolist())), "one key per position of the cache"
        if view.sink + view.recent <= mine:
            assert at.max() == view.sink + view.recent - 1
        angles = at[:, None].double() * rotation().frequencies
        for head in range(q.shape[2]):
            k, v = raw[0, row, head // group, slots].double(), raw[1, row, head // group, slots].double()
            mine_turned = turned(q[row, t, head].double()[None], (mine - shift) * rotation().frequencies[None])
            scores = (turned(k, angles) @ mine_turned[0]) * scale
            out[row, t, head] = scores.softmax(0) @ v
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    committed=st.lists(st.integers(0, 70), min_size=1, max_size=3), tree=random_trees(), chain=st.integers(1, 9),
    sink=st.integers(0, 9), recent=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_back_end_equals_its_definition_for_chains_trees_steps_and_ragged_rows(committed, tree, chain, sink, recent, seed):
    rows, view, longest = torch.tensor(committed), KvView.window(sink, recent), max(committed)
    uniform = min(committed) == longest
    asked = [chain_reads(rows, chain, view, longest, uniform), draft_step_reads(rows, chain, view, longest, uniform)]
    asked += [level.reads(rows, view, longest, uniform) for level in (*layout_of(tree, CPU).levels, layout_of(tree, CPU).whole)]
    backend = CachePositions(rotation())
    for reads in asked:
        raw, cache = filled(committed, reads.corner.shape[1], seed)
        places = positions_of(reads, raw.shape[3])
        cache.kv[0, 0, :, :, : raw.shape[3]] = turn(raw[0], *(x[:, None] for x in rotation().at(places)))
        cache.kv[0, 1, :, :, : raw.shape[3]] = raw[1]
        q = torch.randn(len(committed), reads.num_queries, 4, 16, generator=torch.Generator().manual_seed(seed))
        at = turn(q, *(x[:, :, None] for x in rotation().at(reads.positions)))
        out = backend.attend(at, cache, 0, backend.plan(reads, cache, 2), 0.3)
        assert torch.allclose(out.double(), by_definition(reads, raw, q, 0.3), atol=2e-6)


def test_a_far_window_reads_what_a_near_one_reads():
    """Angles of far positions are as exact as those of near ones: in float32 they are wrong by position * 6e-8."""
    view, backend, out = KvView.window(4, 30), CachePositions(rotation()), []
    g = torch.Generator().manual_seed(0)
    raw, q = torch.randn(2, 1, 1, 34, 16, generator=g), torch.randn(1, 1, 1, 16, generator=g)
    for committed in (40, 200_000):
        cache = KvCache(1, 1, 1, committed + 1, 16, torch.float32, CPU)
        slots = torch.cat([torch.arange(4), torch.arange(committed - 29, committed + 1)])
        cos, sin = rotation().at(slots)
        cache.kv[0, 0, :, :, slots], cache.kv[0, 1, :, :, slots] = turn(raw[0], cos, sin), raw[1]
        reads = draft_step_reads(torch.tensor([committed]), 0, view, committed, True)
        at = turn(q, *(x[:, :, None] for x in rotation().at(reads.positions)))
        out.append(backend.attend(at, cache, 0, backend.plan(reads, cache, 1), 1.0))
    assert torch.allclose(out[0], out[1], atol=2e-6)


def test_windows_that_reach_the_sinks_and_whole_contexts_go_to_sdpa():
    cache, backend = KvCache(1, 1, 1, 300, 16, torch.float32, CPU), CachePositions(rotation())
    for view, committed, is_moved in (("4+60", 63, False), ("4+60", 64, True), ("full", 250, False)):
        reads = draft_step_reads(torch.tensor([committed]), 0, KvView.parse(view), committed, True)
        assert isinstance(backend.plan(reads, cache, 1), MovedPlan) == is_moved, (view, committed)


def test_a_chunk_of_a_prompt_is_scored_in_parts_that_give_the_whole(monkeypatch):
    g, backend = torch.Generator().manual_seed(1), CachePositions(rotation())
    cache = KvCache(1, 2, 2, 400, 16, torch.float32, CPU)
    cache.kv.normal_(generator=g)
    reads = chain_reads(torch.tensor([100, 30]), 150, KvView.window(4, 60), 100, False)
    q = torch.randn(2, 150, 4, 16, generator=g)
    whole = backend.attend(q, cache, 0, backend.plan(reads, cache, 2), 0.25)
    monkeypatch.setattr(cache_positions, "QUERIES", 7)
    assert torch.allclose(backend.attend(q, cache, 0, backend.plan(reads, cache, 2), 0.25), whole, atol=1e-6)


def test_shorter_kv_is_read_in_float32():
    engine = sd.Engine(sd.load(tiny.model("llama"), draft_of(), draft_positions="cache", kv_dtype="bfloat16"))
    prompts = tiny.prompts([90, 30])
    plain = engine.generate(prompts, "off", max_new_tokens=12).tokens
    assert engine.generate(prompts, "model:4+20/2,1", max_new_tokens=12).tokens == plain


# --- what is said about it -------------------------------------------------------------------------------------------


def test_header_and_identity_name_the_mode_and_older_fingerprints_stay():
    absolute, cache = engine_of(positions="absolute"), engine_of()
    fields = [e.identity().drafters["model"].get("position_mode") for e in (absolute, cache)]
    assert fields == [None, "cache"], "absent where absolute: what was measured before keeps its key"
    assert absolute.identity().drafter_fingerprint("model") != cache.identity().drafter_fingerprint("model")
    workload = sd.Workload("test", tiny.prompts([20]), 4)
    said = [e.header(workload, "off").draft for e in (absolute, cache)]
    assert [d["position_mode"] for d in said] == ["absolute", "cache"]
    assert said[1]["rounds"] == "layer by layer: the cache_positions back end attends layer by layer"
    assert cache.header(workload, "off").target["position_mode"] == "absolute"


LABEL = "draft beyond trained length"


@pytest.mark.parametrize(("positions", "config", "label"), [
    ("absolute", "model:4+20/chain2", LABEL), ("absolute", "model:full/chain2", LABEL), ("cache", "model:full/chain2", LABEL),
    ("cache", "model:4+28/chain2", None), ("cache", "model:4+29/chain2", LABEL), ("absolute", "self:4+20/chain2", None),
    ("absolute", "off", None), ("absolute", lambda *_: "off", f"{LABEL}, if it drafts"),
    ("cache", lambda *_: "off", f"{LABEL}, if its window is longer than that"),
])  # fmt: skip
def test_a_run_says_when_its_draft_meets_positions_that_it_was_not_trained_on(positions, config, label):
    for length, found in ((TRAINED + 8, label), (TRAINED - 8, None)):
        labels = engine_of(positions=positions).header(sd.Workload("test", tiny.prompts([length]), 8), config).labels
        assert [x for x in labels if x.startswith(LABEL)] == ([found] if found else [])


def test_drafts_whose_keys_cannot_be_moved_are_refused_with_a_reason():
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    learned = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=64, n_layer=1, n_head=4, n_positions=64))
    unknown = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=96))
    sliding = tiny.model("mistral", sliding_window=16)
    partly = tiny.model("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    for draft, words in (
        (learned, r"GPT2LMHeadModel learned its positions one by one \(transformer.wpe\).* Use draft_positions='absolute'"),
        (unknown, "of llama, mistral, qwen2, qwen3, olmo2; how 'gpt_neox' turns its own is not known"),
        (sliding, "own sliding-window layers do not go together"), (partly, "turns 0.5 of its heads of 16"),
    ):
        attends = draft.config._attn_implementation
        with pytest.raises(ValueError, match=words):
            sd.load(tiny.model("llama"), draft, draft_positions="cache")
        assert draft.config._attn_implementation == attends, "a refused model is left as it was"


def test_a_mode_without_a_draft_or_of_another_name_is_refused():
    with pytest.raises(ValueError, match="about a draft model, and none is loaded"):
        sd.load(tiny.model("llama"), draft_positions="cache")
    with pytest.raises(ValueError, match="draft_positions must be absolute or cache, got 'relative'"):
        sd.load(tiny.model("llama"), draft_of(), draft_positions="relative")


def test_a_window_wider_than_the_models_own_is_refused_by_the_engine():
    draft = noisy_copy(tiny.model("mistral", sliding_window=2000), 0.05)  # wider than its texts, yet a sliding window
    with pytest.raises(BackendUnavailable, match="own sliding-window layers"):
        sd.Engine(sd.load(tiny.model("llama"), draft, draft_positions="cache", runner="hf"))


def test_every_known_family_is_tested():
    assert set(FAMILIES) == {family for family, _ in PLACES}


def test_the_command_line_takes_the_mode(capsys):
    assert main(["load", "--draft-positions", "cache", "--json"]) == 0
    assert '"position_mode": "cache"' in capsys.readouterr().out
    assert main(["load", "--draft-positions", "cache"]) == 0
    assert "positions of the cache, runner fast" in capsys.readouterr().out


def test_a_sampled_run_with_a_moved_draft_samples_what_plain_decoding_samples():
    engine, prompts = engine_of(), tiny.prompts([60, 90])
    asked = {"max_new_tokens": 30, "temperature": 0.8, "seed": 5, "stop_at_eos": False, "verifier": "coupled"}
    plain = engine.generate(prompts, "off", **asked).tokens
    for tree in ("chain3", str(TreeShape.parse("4,2,1"))):
        assert engine.generate(prompts, f"model:4+20/{tree}", **asked).tokens == plain
