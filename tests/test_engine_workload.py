"""`Engine.workload`: prompts of an exact length for the model at hand, or the reason why it cannot read them."""

from __future__ import annotations

import pytest

import specdec_lab as sd


@pytest.fixture(scope="module")
def engine() -> sd.Engine:
    return sd.Engine(sd.load("demo"))


@pytest.mark.parametrize("kind", ["prose", "code", "random"])
def test_prompts_have_the_length_of_their_cell(engine: sd.Engine, kind: str) -> None:
    made = engine.workload(kind, "3x65", max_new_tokens=7, temperature=0.8, verifier="coupled")
    assert [len(prompt) for prompt in made.prompts] == [65] * 3
    assert (made.max_new_tokens, made.temperature, made.verifier) == (7, 0.8, "coupled")
    assert made == engine.workload(kind, sd.Cell(3, 65), max_new_tokens=7, temperature=0.8, verifier="coupled")


def test_what_was_made_runs(engine: sd.Engine) -> None:
    run = sd.record(engine.steps(engine.workload("prose", "2x48", max_new_tokens=6), "self:4+12/chain2"))
    assert [len(row) for row in run.tokens()] == [6, 6]


@pytest.mark.parametrize(("kind", "says"), [("needle", "--model needle"), ("poetry", "got 'poetry'")])
def test_what_the_model_cannot_read_is_refused_with_the_reason(engine: sd.Engine, kind: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        engine.workload(kind, "1x64")
