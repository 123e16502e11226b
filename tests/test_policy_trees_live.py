"""`config=policy` on a real engine: trees, chains, SnapKV views and plain decoding take turns while the text grows."""

from __future__ import annotations

from dataclasses import replace

import pytest

import specdec_lab as sd
import tiny
from made_policies import policy
from specdec_lab.policy import Policy
from specdec_lab.policy.lookup import Guard, Hysteresis
from specdec_lab.records import SpecConfig

CHAIN, TREE, LISTED, WIDE = "model:4+28/chain3", "self:4+60/2,2", "self:snapkv16+32/chain3", "model:4+60/tree:-1,-1,-1,0,0,1"
TURNS = {40: "off", 80: CHAIN, 120: TREE, 160: LISTED, 200: WIDE}  # from this length on


def growing(dwell=3, recheck=4):
    """A policy whose winner changes with the length: off, chain, tree, SnapKV, tree."""
    table = {
        f"{batch}x{length}": {c: (1.5 if c == best else 0.9) for c in (CHAIN, TREE, LISTED, WIDE)}
        for batch in (1, 4) for length, best in TURNS.items()
    }  # fmt: skip
    made = policy(table)
    rules = replace(
        made.rules, method="floor", hysteresis=Hysteresis(0.02, dwell, recheck), guard=Guard(window_steps=10_000)
    )
    return Policy(made.header, rules, made.portfolio, made.table)


@pytest.fixture(scope="module")
def engine():
    return sd.Engine(sd.load(tiny.model("llama"), tiny.model("llama", seed=1)))


def unchecked(made):
    """A chooser that does not ask for whom the policy was made."""
    return made.chooser()


@pytest.mark.parametrize("lengths", [[41], [41, 47, 38]])
def test_a_policy_switches_between_trees_chains_snapkv_and_off_and_the_text_stays(engine, lengths):
    prompts, asked = tiny.prompts(lengths), {"max_new_tokens": 200, "stop_at_eos": False}
    plain = engine.generate(prompts, "off", **asked)
    out = engine.generate(prompts, unchecked(growing()), **asked)
    assert out.tokens == plain.tokens, "greedy text is plain decoding's, whatever drafts"
    ran = list(dict.fromkeys(step.config for step in out.run.rounds))
    assert ran == [str(SpecConfig.parse(c)) for c in TURNS.values()], "each record says which tree ran, in the order of lengths"
    trees = [step for step in out.run.rounds if step.config in (TREE, WIDE)]
    assert any(len(ranks) for step in trees for ranks in step.ranks), "trees were walked, not only named"


def test_every_configuration_stays_for_its_dwell_time(engine):
    dwell = 7
    out = engine.generate(tiny.prompts([41]), unchecked(growing(dwell)), max_new_tokens=200, stop_at_eos=False)
    names = [step.config for step in out.run.rounds]
    starts = [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1])]
    stays = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert len(stays) == len(TURNS) - 1, "no way back and forth"
    assert min(stays) >= dwell


@pytest.mark.parametrize("border", [80, 120, 160, 200])
def test_a_length_that_wavers_by_a_token_does_not_make_trees_waver(border):
    chooser = unchecked(growing(dwell=0, recheck=4))
    answers = [str(chooser(1, border + (-1) ** i)) for i in range(40)]
    assert len(set(answers)) == 1
    assert str(chooser(1, border + 8)) == TURNS[border]


def test_a_batch_that_shrinks_and_grows_switches_at_most_once_per_dwell_time():
    table = {"1x64": {TREE: 1.6, CHAIN: 1.1}, "4x64": {CHAIN: 1.5, TREE: 1.0}}
    made = policy(table)
    chooser = made.chooser()
    answers = [str(chooser(1 if i % 2 else 4, 64)) for i in range(200)]
    switches = sum(a != b for a, b in zip(answers, answers[1:], strict=False))
    assert switches <= 200 / made.rules.hysteresis.min_dwell_steps
    assert set(answers) == {TREE, CHAIN}
