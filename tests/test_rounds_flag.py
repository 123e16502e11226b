"""`--rounds`: where it is offered, what it does, how headers show it, and what is refused in one sentence."""

from __future__ import annotations

import io
import json

import pytest

import letters
import specdec_lab as sd
import tiny
from specdec_lab.cli import main
from specdec_lab.commands.parser import NOTEBOOK, ROUNDS, SHELL, build_parser, options_of
from specdec_lab.engine.device.choice import CHOICES

VERBS = ("load", "run", "profile", "tune", "doctor", "acceptance", "demo", "bench race", "bench scaling", "bench overhead",
         "bench lossless", "bench trees")  # fmt: skip


def call(*words, load=None):
    out, err = io.StringIO(), io.StringIO()
    return main([str(word) for word in words], load=load or letters.loader(), out=out, err=err), out.getvalue(), err.getvalue()


@pytest.mark.parametrize("prog", [SHELL, NOTEBOOK])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_opens_an_engine_offers_it(verb, prog):
    parser = build_parser(prog)
    assert "--rounds" in options_of(parser, verb.split())
    assert options_of(parser, [*verb.split(), "--rounds"]) == list(ROUNDS)


def test_the_parser_offers_what_the_engine_takes():
    assert sorted(ROUNDS) == sorted(CHOICES)


@pytest.mark.parametrize(("asked", "shown"), [("eager", "eager, reference operations: no CUDA"), ("host", "one compiled call"),
                                              ("device", "eager, reference operations: no CUDA")])  # fmt: skip
def test_rounds_run_where_it_says_and_the_header_says_so(asked, shown):
    words = ("--prompt", "hello", "--max-new-tokens", 8, "--config", "self:4+28/chain3", "--json")
    code, out, err = call("run", *words, "--rounds", asked)
    assert code == 0, err
    assert shown in (found := json.loads(out))["header"]["target"]["rounds"] or (
        asked == "host" and "layer by layer" in found["header"]["target"]["rounds"]
    )
    assert found["tokens"] == json.loads(call("run", *words)[1])["tokens"]


def test_load_says_where_rounds_run():
    code, out, _ = call("load", "--rounds", "eager")
    assert code == 0
    assert "rounds: eager, reference operations: no CUDA" in out.splitlines()[0]


def test_what_cannot_be_is_refused_in_one_sentence():
    code, _, err = call("run", "--prompt", "hello", "--rounds", "gpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "argument --rounds: invalid choice: 'gpu'" in err
    foreign = lambda *names, **options: sd.load(tiny.model("olmo2"))  # noqa: E731
    code, _, err = call("run", "--prompt", "hello", "--rounds", "device", load=foreign)
    assert (code, err.count("\n")) == (2, 1)
    assert "rounds='device': " in err
    assert "runs through transformers" in err


@pytest.mark.parametrize(("words", "reason"), [
    (("bench", "overhead", "--tensor-parallel", 2), "--tensor-parallel is for run, profile, tune, not for bench"),
    (("tune", "--tensor-parallel", 2, "--devices", "cpu"), "leave out --devices or --tensor-parallel"),
    (("run", "--prompt", "hello", "--tensor-parallel", 2), "torchrun --nproc-per-node 2"),
])  # fmt: skip
def test_ranks_where_they_cannot_be_are_refused(words, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = None if words[0] != "run" else sd.load
    code, _, err = call(*words, load=load)
    assert code == 2
    assert reason in err
