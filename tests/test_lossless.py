"""Speculation does not change what is said: greedy token for token, sampling in law, coupled sample for sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

import specdec_lab as sd
import tiny
from specdec_kernels.tree_attention import cpu
from specdec_lab.engine import sampling, verify
from specdec_lab.engine.sampling import Noise, Processor, Purpose
from specdec_lab.engine.verify import Proposal

CONFIGS = (
    "off", "self:4+12/chain3", "self:0+1/chain2", "self:3+2/chain7", "self:full/chain5", "model:4+12/chain4",
    "model:0+1/chain1", "model:full/chain3", "ngram/chain6", "model:2+600/chain2",
)  # fmt: skip
AUTOMATIC = "sdpa" if cpu.why_not(16, torch.float32) else "cpu"
LENGTHS = [1, 2, 37, 64, 65, 130]  # ragged, one token, around multiples of a block


def noisy_copy(made, scale):
    """A draft that mostly agrees with `made`."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale * weight.std())
    return made


@pytest.fixture(scope="module")
def expected():
    """Plain greedy text of transformers, per family, made once."""
    prompts = tiny.prompts(LENGTHS)
    return {f: [tiny.plain_greedy(tiny.model(f), p, 50) for p in prompts] for f in tiny.FAMILIES}


@pytest.mark.parametrize("runner", ["auto", "hf"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_speculation_equals_transformers_for_every_drafter(family, runner, expected):
    pair = sd.load(tiny.model(family), noisy_copy(tiny.model(family), 0.05), runner=runner)
    assert pair.target.kind == ("hf" if runner == "hf" or family == "olmo2" else "fast")
    engine = sd.Engine(pair, backend="sdpa" if runner == "hf" else "auto")
    assert engine.backend.name == ("sdpa" if runner == "hf" else AUTOMATIC)
    prompts = tiny.prompts(LENGTHS)
    accepted = {}
    for config in CONFIGS:
        out = engine.generate(prompts, config, max_new_tokens=50)
        assert out.tokens == expected[family], config
        accepted[config] = out.summary.num_accepted_draft_tokens
        assert {s.config for s in out.run.rounds} == {config}
    # every drafter's path was taken and was worth something
    assert all(accepted[c] > 0 for c in CONFIGS if c not in ("off", "self:0+1/chain2", "model:0+1/chain1")), accepted
    for step in engine.generate(prompts, "self:full/chain5", max_new_tokens=50).run.rounds:
        assert all(a == d for a, d, cut in zip(step.accepted, step.drafted, step.censored, strict=True) if not cut)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_end_at_their_own_end_of_text(config):
    made = tiny.model("llama")
    prompts = tiny.prompts([3, 9, 20, 33])
    free = [tiny.plain_greedy(made, p, 40, eos=None) for p in prompts]
    eos = free[0][7]  # ends the first row early, others elsewhere or never
    expected = [t[: t.index(eos) + 1] if eos in t else t for t in free]
    assert len({len(t) for t in expected}) > 1
    target = tiny.model("llama", eos_token_id=eos)
    pair = sd.load(target, noisy_copy(tiny.model("llama"), 0.05))
    out = sd.Engine(pair).generate(prompts, config, max_new_tokens=40)
    assert out.tokens == expected
    ignoring = sd.Engine(pair).generate(prompts, config, max_new_tokens=40, stop_at_eos=False)
    assert ignoring.tokens == free


@pytest.mark.parametrize("config", ["self:4+8/chain3", "self:1+1/chain4", "model:4+8/chain3"])
def test_many_times_more_new_tokens_than_the_window(config):
    made = tiny.model("llama", max_position_embeddings=4096)
    prompts = tiny.prompts([5, 30])
    expected = [tiny.plain_greedy(made, p, 700, eos=None) for p in prompts]
    pair = sd.load(made, noisy_copy(tiny.model("llama", max_position_embeddings=4096), 0.05))
    out = sd.Engine(pair).generate(prompts, config, max_new_tokens=700, stop_at_eos=False)
    assert out.tokens == expected
    halves = [out.run.rounds[: len(out.run.rounds) // 2], out.run.rounds[len(out.run.rounds) // 2 :]]
    rates = [sum(map(sum, (s.accepted for s in h))) / sum(map(sum, (s.drafted for s in h))) for h in halves]
    assert rates[1] > rates[0] - 0.15, "acceptance must not drift down as the window slides"


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("config", ["self:4+16/chain3", "model:full/chain3"])
def test_prompts_around_block_sizes(length, config):
    made = tiny.model("llama")
    prompts = tiny.prompts([length, length - 1])
    expected = [tiny.plain_greedy(made, p, 12, eos=None) for p in prompts]
    out = sd.Engine(sd.load(made, tiny.model("llama"))).generate(prompts, config, max_new_tokens=12, stop_at_eos=False)
    assert out.tokens == expected
    if config == "model:full/chain3":  # the draft is the target: everything is accepted, and its cache lags by one token
        assert out.summary.draft_acceptance_rate == 1.0


@pytest.mark.parametrize("config", ["self:4+12/chain3", "self:snapkv8+4r8/chain3", "model:4+12/chain4", "ngram/chain6"])
def test_the_cache_after_every_round_is_that_of_plain_decoding(config):
    made = tiny.model("llama")
    pair = sd.load(made, noisy_copy(tiny.model("llama"), 0.05))
    engine = sd.Engine(pair)
    prompts = tiny.prompts([20, 20])
    workload = sd.Workload("test", prompts, 40, stop_at_eos=False)
    plain, spec = engine.open(workload), engine.open(workload)
    list(plain.steps("off"))
    reference = plain._session._cache
    for _ in spec.steps(config):
        cache = spec._session._cache
        for row, length in enumerate(cache.committed.tolist()):
            length = min(length, int(reference.committed[row]))
            mine, theirs = cache.kv[:, :, row, :, :length], reference.kv[:, :, row, :, :length]
            assert torch.allclose(mine, theirs, atol=1e-5), (config, row, length)


def test_a_rewound_session_repeats_itself_for_every_configuration():
    pair = sd.load(tiny.model("llama"), noisy_copy(tiny.model("llama"), 0.05))
    session = sd.Engine(pair).open(sd.Workload("test", tiny.prompts([30, 44]), 30, stop_at_eos=False))
    runs = [sd.record(session.steps(c)) for c in (*CONFIGS, *reversed(CONFIGS))]
    assert all(r.tokens() == runs[0].tokens() for r in runs)
    by_config = {}
    for run in runs:
        by_config.setdefault(run.header.config, []).append([s.accepted for s in run.rounds])
    assert all(first == second for first, second in by_config.values()), "same acceptance both times"


def test_switching_configurations_between_rounds_changes_nothing():
    made = tiny.model("llama")
    prompts = tiny.prompts([1, 40, 77])
    expected = [tiny.plain_greedy(made, p, 60, eos=None) for p in prompts]
    cycle = itertools.cycle(CONFIGS)
    engine = sd.Engine(sd.load(made, noisy_copy(tiny.model("llama"), 0.05)))
    out = engine.generate(prompts, lambda _live, _length: next(cycle), max_new_tokens=60, stop_at_eos=False)
    assert out.tokens == expected
    assert {s.config for s in out.run.rounds} == set(CONFIGS)


def test_a_growing_conversation_equals_decoding_each_turn_from_scratch():
    made = tiny.model("llama")
    first, second = tiny.prompts([10, 30], seed=1), tiny.prompts([25, 3], seed=2)
    workload = sd.Workload("talk", first, 8, turns=(second,), stop_at_eos=False)
    pair = sd.load(made, noisy_copy(tiny.model("llama"), 0.05))
    for config in ("off", "self:4+8/chain3", "model:4+8/chain3", "ngram/chain4"):
        run = sd.record(sd.Engine(pair).steps(workload, config))
        for row, tokens in enumerate(run.tokens()):
            reply = tiny.plain_greedy(made, first[row], 8, eos=None)
            again = tiny.plain_greedy(made, first[row] + reply + second[row], 8, eos=None)
            assert tokens == reply + again, config
        assert [s.kind for s in run.steps].count("prefill") == 2


# --- sampling -------------------------------------------------------------------------------------------------------

VOCABULARY, JOINT = 5, 4
SAMPLING = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "eos_token_id": 0}
PROMPT = [1, 4, 2, 3, 3, 1]


def exact_law(made, processor):
    """Probability of every sequence of JOINT tokens after PROMPT, by enumeration."""
    made.set_attn_implementation("sdpa")
    sequences = list(itertools.product(range(VOCABULARY), repeat=JOINT))
    with torch.no_grad():
        logits = made(torch.tensor([PROMPT + list(s) for s in sequences])).logits[:, len(PROMPT) - 1 : -1]
    laws = processor.law(logits.double())
    chosen = laws.gather(-1, torch.tensor(sequences)[..., None])[..., 0]
    return chosen.prod(-1).numpy()


def chi_square_p(tokens, law):
    """p-value of the observed joint counts against the law, cells with fewer than 5 expected pooled."""
    index = (torch.tensor(tokens) * torch.tensor([VOCABULARY**i for i in reversed(range(JOINT))])).sum(-1)
    observed = torch.bincount(index, minlength=VOCABULARY**JOINT).double().numpy()
    expected = law * len(tokens)
    small = expected < 5
    observed = [*observed[~small], observed[small].sum()]
    expected = [*expected[~small], expected[small].sum()]
    if expected[-1] == 0:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    return float(stats.chisquare(observed, expected).pvalue)


def sampled(config, *, temperature=0.9, samples=12_000, seed=3, verifier="rejection", rows=3000, **kwargs):
    """Tokens of `samples` sequences, and acceptance, drawn with independent noise."""
    pair = sd.load(tiny.model("llama", **SAMPLING), noisy_copy(tiny.model("llama", **SAMPLING), 0.4))
    engine, tokens, accepted = sd.Engine(pair), [], 0
    for first in range(0, samples, rows):
        workload = sd.Workload(
            "law", [PROMPT] * rows, JOINT, temperature=temperature, seed=seed, verifier=verifier, stop_at_eos=False,
            sequence_ids=tuple(range(first, first + rows)), **kwargs,
        )
        run = sd.record(engine.steps(workload, config))
        tokens += run.tokens()
        accepted += sum(sum(s.accepted) for s in run.rounds)
    return tokens, accepted


@pytest.mark.parametrize(
    "config", ["off", "self:0+1/chain2", "self:1+2/chain3", "model:full/chain1", "model:0+2/chain3", "ngram/chain2"]
)
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.3}])
def test_sampled_text_follows_the_joint_law_of_the_target(config, kwargs):
    tokens, accepted = sampled(config, **kwargs)
    processor = Processor(kwargs.get("temperature", 0.9), kwargs.get("top_p", 1.0), kwargs.get("top_k", 0))
    assert chi_square_p(tokens, exact_law(tiny.model("llama", **SAMPLING), processor)) > 1e-3
    assert config == "off" or accepted > 0


MUTANTS = {
    "noise is made once per prompt and reused at every position": lambda original: (
        lambda self, positions, purpose: original(self, torch.full_like(positions, 3), purpose)
    ),
    "one number both draws the token and tests it": lambda original: (
        lambda self, positions, purpose: original(self, positions, Purpose.DRAFT if purpose == Purpose.ACCEPT else purpose)
    ),
    "the residual reuses the number of the rejected test": lambda original: (
        lambda self, positions, purpose: original(self, positions, Purpose.ACCEPT if purpose == Purpose.RESIDUAL else purpose)
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_test_catches_reused_noise(mutant, monkeypatch):
    monkeypatch.setattr(Noise, "uniform", MUTANTS[mutant](Noise.uniform))
    tokens, _ = sampled("model:0+2/chain3")
    assert chi_square_p(tokens, exact_law(tiny.model("llama", **SAMPLING), Processor(0.9))) < 1e-6


def test_the_law_test_catches_a_correction_drawn_from_the_target_instead_of_the_residual(monkeypatch):
    def wrong(proposal, target_law, accept_u, residual_u, forced=None):
        right = original(proposal, target_law, accept_u, residual_u, forced)
        rows = torch.arange(target_law.shape[0])
        following = sampling.draw(target_law[rows, right.num_accepted], residual_u[rows, right.num_accepted])
        return verify.Decision(right.num_accepted, right.tokens.scatter(1, right.num_accepted[:, None], following[:, None]))

    original = verify.accept_rejection
    monkeypatch.setattr(verify, "accept_rejection", wrong)
    tokens, _ = sampled("model:0+2/chain3")
    assert chi_square_p(tokens, exact_law(tiny.model("llama", **SAMPLING), Processor(0.9))) < 1e-6


@pytest.mark.parametrize(
    "config", ["self:0+1/chain2", "self:4+8/chain5", "model:4+8/chain3", "model:full/chain1", "ngram/chain4"]
)
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 5}, {"top_p": 0.7}])
def test_coupled_speculation_equals_plain_sampling_token_for_token(config, kwargs):
    pair = sd.load(tiny.model("llama"), noisy_copy(tiny.model("llama"), 0.1))
    engine, prompts = sd.Engine(pair), tiny.prompts([1, 5, 40, 64, 65])
    asked = {"max_new_tokens": 40, "temperature": 0.8, "seed": 11, "stop_at_eos": False, **kwargs}
    plain = engine.generate(prompts, "off", **asked)
    out = engine.generate(prompts, config, verifier="coupled", **asked)
    assert out.tokens == plain.tokens
    assert out.summary.num_accepted_draft_tokens > 0 or config == "ngram/chain4"
    assert engine.generate(prompts, "off", **{**asked, "seed": 12}).tokens != plain.tokens


def test_a_sequence_keeps_its_text_in_any_batch_order():
    engine, prompts = sd.Engine(sd.load(tiny.model("llama"))), tiny.prompts([9, 30, 17])

    def texts(order, config):
        workload = sd.Workload(
            "order", [prompts[i] for i in order], 30, temperature=1.0, seed=5, sequence_ids=tuple(order), stop_at_eos=False
        )
        return dict(zip(order, sd.record(engine.steps(workload, config)).tokens(), strict=True))

    for config in ("off", "self:2+6/chain3"):
        assert texts([0, 1, 2], config) == texts([2, 0, 1], config)
    assert texts([0, 1, 2], "off")[1] == texts([1], "off")[1]


def test_acceptance_is_one_minus_total_variation_for_one_draft():
    generator = torch.Generator().manual_seed(2)
    p, q = torch.rand(2, 6, generator=generator).softmax(-1)
    rows, noise = 60_000, Noise(9, torch.arange(60_000))
    one = torch.zeros(rows, 1, dtype=torch.int64)
    drafts = sampling.draw(q.expand(rows, -1), noise.uniform(one, Purpose.DRAFT)[:, 0])[:, None]
    proposal = Proposal(drafts, torch.ones(rows, dtype=torch.int64), q.expand(rows, 1, -1))
    decision = verify.accept_rejection(
        proposal, p.expand(rows, 2, -1), noise.uniform(one, Purpose.ACCEPT),
        noise.uniform(torch.tensor([[0, 1]]).expand(rows, -1), Purpose.RESIDUAL),
    )
    total_variation = float((p - q).abs().sum() / 2)
    assert abs(float(decision.num_accepted.double().mean()) - (1 - total_variation)) < 0.005
    share = torch.bincount(decision.tokens[:, 0], minlength=6) / rows
    assert torch.allclose(share, p, atol=0.008)
