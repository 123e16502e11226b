"""Where drafting through views went wrong in MagicDec, trap by trap: lengths, windows that stay, budgets, stale keys, rows.

One section per trap. The mechanisms have tests of their own (test_lossless, test_trees_lossless, test_snapkv, and
test_snapkv_trees, test_draft_positions); these run views, drafters and shapes through the trap itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import specdec_lab as sd
import tiny
from specdec_lab.engine import snapkv, snapkv_reference
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.drafters import ModelDrafter
from specdec_lab.engine.network import Network
from specdec_lab.engine.session import Session
from specdec_lab.records import PHASES
from test_lossless import noisy_copy

BLOCKS = (1, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 255, 256, 257)  # multiples of usual pages, and their neighbours
WHOLE = ("self:4+600/chain3", "self:snapkv600+7/chain3", "self:snapkv9+600/2,1", "self:4+600/2,1", "model:4+600/chain3",
         "model:4+600/2,1", "model:full/2,1")  # views that hold every key: what they draft is accepted  # fmt: skip
SMALL = ("self:4+12/chain3", "self:snapkv12+8r8/2,1", "self:3+9/4,2,1", "model:4+12/2,1", "model:4+12/chain3")


def long_llama(**options):
    return tiny.model("llama", **{"max_position_embeddings": 2048, **options})


def engine_of(draft=None, target=None, positions="absolute", **options):
    """The draft is the target's twin unless another is given."""
    return sd.Engine(sd.load(target or long_llama(), draft or long_llama(), draft_positions=positions), **options)


def noisy_engine(scale=0.05):
    return engine_of(noisy_copy(long_llama(), scale))


@pytest.fixture(scope="module")
def plain():
    """Greedy text of transformers after every length of BLOCKS."""
    made = long_llama()
    return {n: tiny.plain_greedy(made, p, 12, eos=None) for n, p in zip(BLOCKS, tiny.prompts(list(BLOCKS)), strict=True)}


@dataclass
class Rate:
    """Accepted over drafted depth, of rows that were not cut."""

    accepted: int = 0
    offered: int = 0

    def add(self, run, depth):
        for step in run.rounds:
            for accepted, tokens, cut in zip(step.accepted, step.tokens, step.censored, strict=True):
                if tokens and not cut:
                    self.accepted, self.offered = self.accepted + accepted, self.offered + depth
        return self

    @property
    def value(self):
        return self.accepted / self.offered


def rate_of(run, config):
    return Rate().add(run, sd.SpecConfig.parse(config).depth).value


# --- a length that is a multiple of a page: draft keys silently un-rotated, or a pool that is zero ------------------------


@pytest.mark.parametrize("config", WHOLE)
def test_lengths_at_and_around_multiples_of_a_block_lose_no_acceptance(config, plain):
    engine, prompts = engine_of(), tiny.prompts(list(BLOCKS))
    out = engine.generate(prompts, config, max_new_tokens=12, stop_at_eos=False)  # ragged: all of them at once
    assert out.tokens == [plain[n] for n in BLOCKS]
    assert rate_of(out.run, config) == 1.0
    for length in (64, 128, 256):  # and all rows alike
        alike = engine.generate([prompts[BLOCKS.index(length)]] * 2, config, max_new_tokens=12, stop_at_eos=False)
        assert alike.tokens == [plain[length]] * 2
        assert rate_of(alike.run, config) == 1.0


def test_the_acceptance_at_a_block_catches_keys_that_were_not_rotated(monkeypatch):
    """As in the trap: keys of drafts in a block that was empty when the round began are not turned as those before it."""
    append = KvCache.append

    def unrotated(self, layer, kv, index):
        is_draft_beyond = kv.shape[3] == 1 and int(self.committed.min()) >= 64
        append(self, layer, torch.stack([kv[0].roll(8, -1), kv[1]]) if is_draft_beyond else kv, index)

    monkeypatch.setattr(KvCache, "append", unrotated)
    asked = {"config": "self:4+600/chain6", "max_new_tokens": 40, "stop_at_eos": False}
    out = engine_of(backend="sdpa").generate(tiny.prompts([65, 70, 90, 100]), **asked)
    assert rate_of(out.run, "self:4+600/chain6") < 1.0


# --- SnapKV that needs a length modulo the page, and scores without 1/sqrt(head size) -------------------------------------


def test_selection_equals_the_reference_at_every_length_around_the_observed_tokens():
    for context in (*range(1, 8), *range(29, 37), *range(60, 69)):
        g = torch.Generator().manual_seed(context)
        q, k = torch.randn(min(32, context), 4, 16, generator=g), torch.randn(2, context, 16, generator=g)
        for recent in (1, 8):
            if (size := min(7, context + 1 - recent)) >= 1:
                right = snapkv_reference.select(q, k, size, recent, 0.25, snapkv.POOL)
                assert snapkv.select(q, k, size, recent, 0.25).tolist() == right, (context, recent)


def test_scores_without_the_scale_of_the_head_select_others():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(32, 4, 64, generator=g), torch.randn(2, 300, 64, generator=g)
    right = snapkv_reference.select(q, k, 40, 8, 1 / math.sqrt(64), snapkv.POOL)
    assert snapkv.select(q, k, 40, 8, 1 / math.sqrt(64)).tolist() == right
    assert snapkv.select(q, k, 40, 8, 1.0).tolist() != right


# --- a window that is frozen after the prompt -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["self:4+8/2,1", "self:snapkv16+12r24/2,2", "model:4+8/2,1"])
def test_acceptance_of_trees_does_not_drift_down_over_many_windows(config):
    made, prompts = long_llama(), tiny.prompts([20, 60])
    out = noisy_engine().generate(prompts, config, max_new_tokens=300, stop_at_eos=False)
    assert out.tokens[0][:60] == tiny.plain_greedy(made, prompts[0], 60, eos=None)
    middle, depth = len(out.run.rounds) // 2, sd.SpecConfig.parse(config).depth
    parts = out.run.rounds[:middle], out.run.rounds[middle:]
    halves = [Rate().add(sd.Run(out.run.header, part), depth).value for part in parts]
    assert halves[1] > halves[0] - 0.15, halves


# --- draft-computed keys of accepted tokens that stay ---------------------------------------------------------------------


@pytest.mark.parametrize("config", ["self:snapkv8+4r8/4,2,1", "self:4+12/2,1", "self:snapkv1+1/chain3", "model:4+12/2,1"])
def test_no_key_that_a_draft_computed_outlives_its_round(config):
    engine, prompts = noisy_engine(), tiny.prompts([20, 33])
    workload = sd.Workload("test", prompts, 30, stop_at_eos=False)
    reference, session = engine.open(workload), engine.open(workload)
    list(reference.steps("off"))
    plain, moved = reference._session._cache, 0
    for step in session.steps(config):
        cache = session._session._cache
        moved += sum(step.accepted)
        for row, length in enumerate(cache.committed.tolist()):
            length = min(length, int(plain.committed[row]))
            assert torch.allclose(cache.kv[:, :, row, :, :length], plain.kv[:, :, row, :, :length], atol=1e-5), (row, length)
    assert moved


def test_that_comparison_catches_accepted_keys_as_they_were_drafted(monkeypatch):
    """Verify scores, and the cache keeps what the draft wrote for the nodes after the root."""
    verify = Session._verify

    def keeps(self, proposal):
        before = self._cache.kv.clone()
        decision = verify(self, proposal)
        for row, committed in enumerate(self._cache.committed.tolist()):
            drafted = slice(committed + 1, committed + proposal.tokens.shape[1])
            self._cache.kv[:, :, row, :, drafted] = before[:, :, row, :, drafted]
        return decision

    monkeypatch.setattr(Session, "_verify", keeps)
    with pytest.raises(AssertionError):
        test_no_key_that_a_draft_computed_outlives_its_round("self:snapkv1+1/chain3")


# --- the round in which all drafts are accepted: the last one's key is missing --------------------------------------------


@pytest.mark.parametrize("config", ["model:full/chain4", "model:4+600/chain2", "model:4+600/2,1"])
def test_after_fully_accepted_rounds_the_draft_reads_what_it_lacks(config, monkeypatch):
    fed, score = [], Network.score

    def scored(self, tokens, reads, last, phases):
        fed.append(tokens.shape[1])
        return score(self, tokens, reads, last, phases)

    monkeypatch.setattr(Network, "score", scored)
    engine = engine_of(backend="sdpa")  # the draft is the target: everything is accepted
    session = engine.open(sd.Workload("test", tiny.prompts([20, 33]), 31, stop_at_eos=False))
    run = sd.record(session.steps(config))
    assert rate_of(run, config) == 1.0
    assert fed.count(2) >= len(run.rounds) - 1, "the root travels with the token before it"
    assert draft_cache_is_whole(session)


def draft_cache_is_whole(session):
    """Whether the cache of the target's twin holds, as far as it is known, what the target's cache holds."""
    drafter, target = session._session._model, session._session._cache
    assert min(drafter._known) > 40
    caches = [(drafter.network.cache.kv[:, :, b, :, :n], target.kv[:, :, b, :, :n]) for b, n in enumerate(drafter._known)]
    return all(torch.allclose(mine, right, atol=1e-5) for mine, right in caches)


def test_a_draft_that_takes_its_last_key_for_granted_is_caught(monkeypatch):
    monkeypatch.setattr(ModelDrafter, "lag", lambda self, batch: max(self._known) == 0)
    session = engine_of(backend="sdpa").open(sd.Workload("test", tiny.prompts([20, 33]), 31, stop_at_eos=False))
    list(session.steps("model:full/chain4"))
    assert not draft_cache_is_whole(session)


# --- one end of text, or the fastest row, that ends the batch -------------------------------------------------------------


@pytest.mark.parametrize("config", ["off", *SMALL])
def test_every_row_ends_by_the_same_rule_whatever_drafts_and_whoever_is_fastest(config):
    made, prompts = long_llama(), tiny.prompts([3, 40, 75, 33])
    free = [tiny.plain_greedy(made, p, 40, eos=None) for p in prompts]
    eos = free[1][7]
    ended = [t[: t.index(eos) + 1] if eos in t else t for t in free]
    assert len({len(t) for t in ended}) > 1
    engine = engine_of(made, long_llama(eos_token_id=eos))
    assert engine.generate(prompts, config, max_new_tokens=40).tokens == ended
    out = engine.generate(prompts, config, max_new_tokens=40, stop_at_eos=False)
    assert [len(t) for t in out.tokens] == [40] * 4, "the fastest row waits for the slowest"
    assert out.tokens == free


# --- a budget that must be 128 x + 1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [5, 6, 17, 127, 128, 129, 130])
def test_any_number_of_keys_beyond_the_sinks_is_a_budget(keys, plain):
    engine, prompts = noisy_engine(), tiny.prompts(list(BLOCKS))[-4:]
    for view, tree in ((f"4+{keys - 4}", "chain3"), (f"4+{keys - 4}", "2,1"), (f"snapkv{keys - 3}+3", "2,1")):
        for drafter in ("self", "model") if view[0] == "4" else ("self",):
            out = engine.generate(prompts, f"{drafter}:{view}/{tree}", max_new_tokens=12, stop_at_eos=False)
            assert out.tokens == [plain[n] for n in BLOCKS[-4:]], (drafter, view, tree)


def test_a_budget_as_large_as_the_context_is_full_attention_and_a_small_one_is_not():
    """Lists name committed tokens; the drafts of a round must find room in the window: 4 of them here."""
    engine, prompts = engine_of(), tiny.prompts([100, 60])
    for view in ("4+200", "snapkv200+4", "snapkv1+200"):
        for tree in ("chain4", "2,1,1,1"):
            out = engine.generate(prompts, f"self:{view}/{tree}", max_new_tokens=40, stop_at_eos=False)
            assert rate_of(out.run, f"self:{view}/{tree}") == 1.0, (view, tree)
    small = engine.generate(prompts, "self:1+8/chain4", max_new_tokens=40, stop_at_eos=False)
    assert rate_of(small.run, "self:1+8/chain4") < 1.0


# --- an arg-max that leaves no probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", SMALL)
def test_sampling_takes_the_law_of_the_target_through_every_view_with_both_verifiers(config):
    """Coupled: token for token. Rejection: none but possible tokens (that their law is the target's, test_lossless shows)."""
    engine, prompts = noisy_engine(), tiny.prompts([5, 40, 64])
    asked = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 3, "seed": 2, "stop_at_eos": False}
    plain = engine.generate(prompts, "off", **asked).tokens
    assert engine.generate(prompts, config, verifier="coupled", **asked).tokens == plain
    out = engine.generate(prompts, config, verifier="rejection", **asked)
    assert 0 < rate_of(out.run, config) < 1
    made = long_llama()
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        logits = made(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert all(token in row.topk(3).indices.tolist() for token, row in zip(tokens, logits, strict=True))


# --- a draft of short texts on long ones: test_draft_positions compares it with a re-indexed run ---------------------------


def test_a_draft_of_32_tokens_drafts_at_500_within_the_positions_that_it_was_trained_on():
    prompts, labels = tiny.prompts([20, 500]), {}
    plain = [tiny.plain_greedy(long_llama(), p, 30, eos=None) for p in prompts]
    for positions in ("absolute", "cache"):
        engine = engine_of(noisy_copy(long_llama(max_position_embeddings=32), 0.05), positions=positions)
        out = engine.generate(prompts, "model:4+28/chain3", max_new_tokens=30, stop_at_eos=False)
        assert out.tokens == plain
        assert out.run.header.draft["position_mode"] == positions
        labels[positions] = "draft beyond trained length" in out.run.header.labels
    assert labels == {"absolute": True, "cache": False}


# --- equal prompt lengths only; a family guessed from the path -------------------------------------------------------------


def test_the_family_is_that_of_the_configuration_whatever_the_folder_is_called(tmp_path):
    prompts = tiny.prompts([30, 7, 1])
    for family, called in (("qwen2", "llama-2-7b"), ("qwen3", "Mistral-7B"), ("llama", "qwen2-72b")):
        made = tiny.model(family)
        made.save_pretrained(tmp_path / called)
        plain = [tiny.plain_greedy(made, p, 20) for p in prompts]
        for runner in ("fast", "hf"):
            engine = sd.Engine(sd.load(str(tmp_path / called), runner=runner))
            assert engine.generate(prompts, "self:4+8/2,1", max_new_tokens=20).tokens == plain, (family, called)


@pytest.mark.parametrize("config", [*SMALL, *WHOLE[:3]])
def test_rows_of_very_different_lengths_draft_as_each_does_alone(config):
    engine, prompts = noisy_engine(), tiny.prompts([1, 300, 37, 2])
    together = engine.generate(prompts, config, max_new_tokens=15, stop_at_eos=False)
    for row, prompt in enumerate(prompts):
        alone = engine.generate([prompt], config, max_new_tokens=15, stop_at_eos=False)
        assert alone.tokens == [together.tokens[row]]
        mine = [s.accepted[row] for s in together.run.rounds if s.tokens[row]]
        if "r8" not in config:  # a refresh comes for all rows when it is due for one
            assert mine == [s.accepted[0] for s in alone.run.rounds]


# --- a profiling flag that synchronises; time between steps that belongs to nobody ----------------------------------------


@pytest.mark.parametrize("config", SMALL)
def test_parts_of_every_round_sum_to_its_time_and_instruments_change_nothing(config):
    pair, prompts = noisy_engine().pair, tiny.prompts([20, 64])
    engines, asked = [sd.Engine(pair, instrument=flag) for flag in (True, False)], {"max_new_tokens": 15, "stop_at_eos": False}
    runs = [engine.generate(prompts, config, **asked).run for engine in engines]
    said = [[(s.tokens, s.accepted, s.kv_read_bytes, s.draft_kv_read_bytes) for s in run.rounds] for run in runs]
    assert said[0] == said[1]
    for step in (*runs[0].rounds, *runs[1].rounds):
        assert sum(getattr(step, name) for name in PHASES) == pytest.approx(step.wall_s, rel=1e-9)
    assert all(s.draft_s > 0 for s in runs[0].rounds)
