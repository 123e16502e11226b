"""Retrieval: the needle model, prompts that ask it, drafts that collapse there, and the live fall-back from them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specdec_lab.bench.sessions import Sessions
from specdec_lab.cli import main
from specdec_lab.demo import train_needle, training
from specdec_lab.engine.loop import Engine
from specdec_lab.engine.models.loading import DEMO, load
from specdec_lab.policy import Estimate, Policy, Row, Rules
from specdec_lab.policy.guard import bound
from specdec_lab.policy.lookup import Guard
from specdec_lab.records import Cell
from specdec_lab.stream import record
from specdec_lab.summary import summarize
from specdec_lab.view.feed import Feed
from specdec_lab.view.report import write_report
from specdec_lab.workload import (
    ANSWER_TOKENS,
    Workload,
    answer,
    needle_prompts,
    needle_text,
    retrieved,
    why_not,
)
from test_policy import header

WINDOW, SNAPKV, NGRAM = "self:4+60/chain4", "self:snapkv64+32/chain4", "ngram/chain4"
TRAINING = json.loads((DEMO / "needle" / "TRAINING.json").read_text())


@cache
def engine():
    return Engine(load("needle"))


# The text.


@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_prompts_have_the_length_asked_for_and_their_answer_half_of_it_away(length):
    workload = needle_prompts(Cell(3, length), seed=5)
    assert [len(p) for p in workload.prompts] == [length] * 3
    assert len(set(workload.prompts)) == 3
    for prompt in workload.prompts:
        value = answer(prompt)
        assert len(value) == ANSWER_TOKENS
        place = prompt.index(value[0])
        assert prompt[place : place + len(value)] == value
        assert length - (place + len(value)) >= length // 2
        assert prompt.count(needle_text.MARK) == needle_text.NUM_NEEDLES + 1
        assert prompt[-2] == needle_text.MARK


def test_the_seed_decides_the_prompts():
    same, again, other = (needle_prompts(Cell(2, 512), seed=seed) for seed in (1, 1, 2))
    assert same.prompts == again.prompts != other.prompts


def test_retrieval_is_scored_by_position():
    workload = needle_prompts(Cell(1, 512))
    value = answer(workload.prompts[0])
    assert retrieved(workload, [value]) == [1.0]
    assert retrieved(workload, [(*value[:12], *[0] * 36)]) == [0.25]
    assert retrieved(workload, [()]) == [0.0]
    with pytest.raises(ValueError, match="marks no needle"):
        answer((5, 6, 7, 8))


def test_prompts_that_could_not_hide_a_needle_are_refused():
    with pytest.raises(ValueError, match="at least 512 tokens to hide 4 needles, got 511; use --cell 1x512"):
        needle_prompts(Cell(1, 511))


def test_text_and_model_that_do_not_fit_each_other_are_refused_with_what_to_do():
    assert why_not("needle", None, 256, "needle") is None
    assert "--model needle" in why_not("needle", object(), 2048, "demo-2M")
    assert "needle workload" in why_not("prose", None, 256, "needle")
    assert "must be one of prose, code, revision, conversation, needle" in why_not("poems", None, 256, "needle")


# The model.


@pytest.mark.parametrize("length", [256, 512, train_needle.CONTEXT])
def test_the_stored_accuracy_is_reproduced_by_transformers(length):
    model = LlamaForCausalLM.from_pretrained(DEMO / "needle").eval()
    assert model.dtype == torch.float32
    found = train_needle.accuracy(model, length, TRAINING["accuracy_texts"], TRAINING["seed"])
    assert found == pytest.approx(TRAINING["accuracy"][str(length)], abs=2e-3)
    assert found > 0.95


def test_thirty_steps_lower_the_loss_and_the_files_load_in_the_engine(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(train_needle.make_config())
    training.init_weights(model, torch.Generator().manual_seed(3))
    phases = (train_needle.Phase(1.0, 128, 4),)
    losses = train_needle.train(model, 30 * 512, 3, lambda line: None, phases)
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < losses[0] - 0.05
    train_needle.save(model, tmp_path)
    pair = load(str(tmp_path))
    assert (pair.target.shape.vocab, pair.tokenizer, pair.draft) == (256, None, None)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_training_text_repeats_every_needle_and_weighs_what_can_be_known():
    tokens, weights = train_needle.draw_text(512, random.Random(4))
    assert len(tokens) == len(weights) == 512
    copied = [t for t, w in zip(tokens, weights, strict=True) if w == 1]
    assert set(copied) <= {*tokens[:256]}, "only what the first half holds can be copied"
    assert not any(w == 1 for w in weights[:256])
    assert train_needle.draw_text(512, random.Random(4)) == (tokens, weights)


# What drafts make of it.


@cache
def runs(length):
    """Tokens and mean acceptance length of each draft on the same prompts, the value only."""
    workload = needle_prompts(Cell(4, length), seed=7)
    done = {config: record(engine().steps(workload, config)) for config in ("off", WINDOW, SNAPKV, NGRAM)}
    return workload, done


@pytest.mark.parametrize("length", [512, 1024])
def test_the_model_retrieves_and_every_draft_gives_the_tokens_of_plain_decoding(length):
    workload, done = runs(length)
    assert min(retrieved(workload, done["off"].tokens())) > 0.95
    for run in done.values():
        assert run.tokens() == done["off"].tokens()


@pytest.mark.parametrize("length", [512, 1024])
def test_a_window_draft_collapses_where_ngram_and_snapkv_do_not(length):
    """SnapKV lists the value because the question names every fourth symbol of it within the 32 tokens that choose."""
    _, done = runs(length)
    lengths = {config: summarize(run).mean_acceptance_length for config, run in done.items()}
    assert lengths[WINDOW] < 1.3
    assert lengths[SNAPKV] > 2.5
    assert lengths[NGRAM] > 4.0


# The live fall-back, in the real engine.


def favouring_the_window():
    """A policy that learned on other text that the window draft is best and n-gram second; both break even at 2 tokens."""
    estimates = {name: Estimate(s, (s, s), "measured", ("m-1",), 2.0) for name, s in ((WINDOW, 1.8), (NGRAM, 1.2))}
    rows = [
        Row(Cell(1, length), "tuned", config=WINDOW, speedup=1.8, speedup_ci95=(1.8, 1.8), tokens_per_s=100.0,
            baseline_tokens_per_s=55.0, estimates=estimates, details={})
        for length in (256, 2048)
    ]  # fmt: skip
    return Policy(header(), Rules(guard=Guard()), ("off", WINDOW, NGRAM), tuple(rows))


def conversation():
    """First plain filler to go on with, then a question about a needle far behind it."""
    asked = needle_prompts(Cell(1, 1024), seed=9)
    prompt = asked.prompts[0]
    cut = len(prompt) - 2 * len([t for t in prompt[-30:] if t == needle_text.ASK]) - 2
    return asked, Workload("talk", (prompt[:cut],), ANSWER_TOKENS, stop_at_eos=False, turns=((prompt[cut:],),))


@cache
def fallen_back():
    return record(engine().steps(conversation()[1], favouring_the_window().chooser()))


def test_the_engine_falls_back_within_the_bound_and_flags_the_first_round_of_what_runs_now():
    run = fallen_back()
    second = next(i for i, s in enumerate(run.steps) if s.kind == "prefill" and i > 0)
    healthy, retrieval = run.steps[1:second], run.steps[second + 1 :]
    assert {s.config for s in healthy} == {WINDOW}
    assert sum(s.num_emitted for s in healthy) / len(healthy) > 2.5
    switched = next(i for i, s in enumerate(retrieval) if s.config != WINDOW)
    assert 1 < switched <= bound(2.0, 4)
    assert retrieval[switched].config == NGRAM
    flagged = [s for s in run.steps if any(f.startswith("fell back") for f in s.flags)]
    assert flagged == [retrieval[switched]]
    assert f"fell back from {WINDOW}" in flagged[0].flags
    rest = retrieval[switched:]
    assert sum(s.num_emitted for s in rest) / len(rest) > 3


def test_a_fall_back_changes_no_token():
    _, workload = conversation()
    assert fallen_back().tokens() == record(engine().steps(workload, "off")).tokens()


def test_the_live_view_and_the_report_show_the_fall_back(tmp_path):
    run, feed = fallen_back(), Feed("run")
    for step in run.steps:
        feed.add(run.header, step)
    (words,) = feed.events
    assert words.endswith(f"fell back from {WINDOW} to {NGRAM}")
    page = write_report(tmp_path / "report.html", [run], comparisons=()).read_text()
    assert words in page
    quiet = replace(run, steps=tuple(replace(s, flags=()) for s in run.steps))
    assert "fell back" not in write_report(tmp_path / "quiet.html", [quiet], comparisons=()).read_text()


# The verbs.


def call(*words):
    """(exit code, output, errors) of a command."""
    out, err = io.StringIO(), io.StringIO()
    return main(list(words), out=out, err=err), out.getvalue(), err.getvalue()


def test_run_says_how_much_was_retrieved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("run", "--model", "needle", "--workload", "needle", "--cell", "2x512", "--config", NGRAM, "--max-new-tokens", "48")
    code, out, _ = call(*words)
    assert code == 0
    assert "said of the value asked for: 100%, 100%" in out
    code, out, _ = call(*words, "--json")
    assert (code, json.loads(out)["retrieved"]) == (0, [1.0, 1.0])


def test_acceptance_is_measured_on_needles_as_on_prose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("acceptance", "--model", "needle", "--workload", "needle", "--config", "self:4+60", "--cell", "1x512",
                          "--width", "2", "--depth", "2")  # fmt: skip
    assert code == 0, err
    assert "self:4+60" in out


@pytest.mark.parametrize(("model", "workload", "advice"), [
    ("demo", "needle", "--model needle"), ("needle", "prose", "use the needle workload"),
])
@pytest.mark.parametrize("verb", ["run --cell 1x512", "profile --cells 1x512 --configs off", "tune --batches 1 --lengths 512"])
def test_a_model_and_a_workload_that_do_not_fit_are_one_plain_error(verb, model, workload, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*verb.split(), "--model", model, "--workload", workload)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert advice in err


def test_a_profile_of_needles_generates_no_more_than_the_value():
    workload = Sessions(engine(), "needle").workload(Cell(2, 512))
    assert (workload.name, workload.max_new_tokens, workload.cell) == ("needle", ANSWER_TOKENS, Cell(2, 512))
