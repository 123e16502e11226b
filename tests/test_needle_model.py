"""The shipped retrieval model: that it retrieves, which drafts collapse when it does, and how a policy steps down."""

import json
from dataclasses import replace

import pytest

import specdec_lab as sd
from specdec_lab.demo.train_needle import (
    CHECKED_LENGTHS,
    HOME,
    Haystacks,
    accuracy,
    loss,
    make_config,
    make_optimizers,
    write_circuit,
)
from specdec_lab.policy import Estimate, Policy, Row, Rules
from specdec_lab.policy.guard import reaction_rounds
from specdec_lab.records import Cell
from specdec_lab.stream import record
from specdec_lab.summary import summarize
from specdec_lab.view.notes import policy_notes
from specdec_lab.workload import asked_later, held_out, retrieved_share

WINDOW, NGRAM = "self:4+60/chain4", "ngram/chain4"
SNAPKV, REFRESHED = "self:snapkv128+32/chain4", "self:snapkv128+32r8/chain4"
BREAK_EVEN = 1.9  # made up, for the policy of the test


@pytest.fixture(scope="module")
def engine():
    return sd.Engine(sd.load("needle"))


@pytest.fixture(scope="module")
def workload(engine):
    return held_out("needle", Cell(4, 1024), engine.pair.tokenizer, max_new_tokens=48, seed=11)


@pytest.fixture(scope="module")
def runs(engine, workload):
    session = engine.open(workload)
    return {config: record(session.steps(config)) for config in ("off", WINDOW, SNAPKV, REFRESHED, NGRAM)}


def test_the_shipped_model_retrieves_as_well_as_its_record_says():
    from transformers import LlamaForCausalLM

    told = json.loads((HOME / "needle" / "TRAINING.json").read_text())["retrieved"]
    assert set(told) == {str(n) for n in CHECKED_LENGTHS}
    assert min(told.values()) > 0.95
    model = LlamaForCausalLM.from_pretrained(HOME / "needle").eval()
    tokenizer = sd.load("needle").tokenizer
    assert accuracy(model, tokenizer, 512) == pytest.approx(told["512"], abs=0.01)
    assert accuracy(model, tokenizer, 2048, prompts=2) > 0.95


def test_the_engine_retrieves_and_every_draft_gives_the_tokens_of_plain_decoding(workload, runs):
    plain = runs["off"].tokens()
    assert retrieved_share(workload, plain) > 0.95
    for config, run in runs.items():
        assert run.tokens() == plain, config


def test_a_window_collapses_on_retrieval_and_n_grams_do_not(runs):
    length = {config: summarize(run).mean_acceptance_length for config, run in runs.items()}
    assert length[WINDOW] < 1.2
    assert length[NGRAM] > 4
    # what SnapKV lists was attended to: of a value only what was copied already, and a little beyond
    assert length[WINDOW] <= length[SNAPKV] < 2
    assert length[WINDOW] + 0.1 < length[REFRESHED] < 2.5


def made_policy(identity):
    """A policy as if tuned on prose, where the window is the best and n-grams pay a little; its numbers are made up."""
    estimates = {
        WINDOW: Estimate(1.5, (1.4, 1.6), "measured", ("m-1",), BREAK_EVEN),
        NGRAM: Estimate(1.1, (1.05, 1.2), "measured", ("m-2",), 1.05),
    }
    row = Row(
        Cell(1, 512), "tuned", config=WINDOW, speedup=1.5, speedup_ci95=(1.4, 1.6), tokens_per_s=150.0,
        baseline_tokens_per_s=100.0, estimates=estimates, details={"num_trials": 2},
    )
    header = {
        "created": "2026-01-02T03:04:05Z", "device": identity.device, "versions": {}, "base": identity.base_fingerprint,
        "target": "needle", "drafters": {kind: identity.drafter_fingerprint(kind) for kind in ("self", "ngram")},
        "dtype": "float32", "workload": "prose", "labels": ["modelled"], "objective": "tokens_per_s", "evidence": [],
    }  # fmt: skip
    return Policy(header, Rules(), ("off", WINDOW, NGRAM), (row,))


def test_a_policy_made_for_prose_steps_down_to_n_grams_within_the_stated_rounds_once_a_needle_is_asked(engine):
    asked = held_out("needle", Cell(1, 1024), engine.pair.tokenizer, max_new_tokens=100, num_needles=2, seed=3)
    talk = asked_later(asked)
    run = record(engine.steps(talk, made_policy(engine.identity())))
    second = next(i for i, step in enumerate(run.steps) if i and step.kind == "prefill")
    rounds = [s for s in run.steps[second:] if s.kind == "round"]
    assert {s.config for s in run.steps[1:second]} == {WINDOW}, "prose pays"
    assert retrieved_share(talk, [row[100:] for row in run.tokens()]) > 0.9
    fell = next(i for i, s in enumerate(rounds) if s.config != WINDOW)
    assert fell <= reaction_rounds(BREAK_EVEN - 0.03, 4, 256)
    assert {s.config for s in rounds[fell:]} == {NGRAM}
    (note,) = policy_notes([run])
    assert note.words.startswith(f"fell back to {NGRAM}: {WINDOW} yields 1.0")
    assert note.words.endswith("below its break-even 1.90")
    assert rounds[fell].note == note.words
    assert run.tokens() == record(engine.steps(talk, "off")).tokens()
    assert replace(rounds[fell], note="").to_dict().keys() | {"note"} == rounds[fell].to_dict().keys()


def test_thirty_steps_lower_the_loss_and_keep_the_circuit_and_the_files_load(tmp_path, engine):
    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    from specdec_lab.demo.train_demo import Plan, init_weights, read_tokenizer, save, train

    tokenizer = read_tokenizer(HOME / "target")
    model, generator = LlamaForCausalLM(make_config()), torch.Generator().manual_seed(1)
    init_weights(model, generator)
    write_circuit(model, generator)
    assert accuracy(model, tokenizer, 512, prompts=1) == 1.0
    crops = Haystacks(np.arange(3000) % 700, 1, batch_tokens=1024)
    losses = train(
        model, lambda x, y, done, bf16: loss(model, x, y, bf16), crops, Plan(((1.0, 256, 0.5),)), 30 * 8192, bf16=False,
        report=lambda line: None, optimize=make_optimizers,
    )
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])
    save(model, tokenizer, tmp_path)
    assert sd.load(str(tmp_path)).target.shape == engine.pair.target.shape
