"""The acceptance guard: how soon it rings when a draft collapses, and how rarely when it does not."""

import math
import random

import pytest

from builders import round_step
from specdec_lab.policy.guard import FALSE_ALARM_ROUNDS, Watch, reaction_rounds
from test_policy import FULL, NGRAM, WINDOW, feed, policy, row

FOREVER = 10**9  # a window that never fills: the sequential test alone


def draw(dice, depth, chance):
    """Accepted tokens of a chain whose every token is accepted with this chance."""
    return next((n for n in range(depth) if dice.random() >= chance), depth)


def chance_of(mean, depth):
    """The chance per token at which a chain yields `mean` tokens a round, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(depth + 1)) < mean else (low, middle)
    return low


def first_ring(watch, accepted, break_even):
    return next((i for i, a in enumerate(accepted, 1) if watch.rings(a, break_even)), None)


STEPS = [round_step((n,), config="self:4+60/chain7") for n in range(8)]


CASES = [(3, 1.5, 256), (4, 1.9, 256), (7, 2.6, 256), (4, 1.2, 64), (2, 1.6, 63)]


@pytest.mark.parametrize(("depth", "break_even", "window"), CASES)
@pytest.mark.parametrize("good_rounds", [0, 1000])
def test_a_collapse_rings_within_the_stated_rounds(depth, break_even, window, good_rounds):
    bound = reaction_rounds(break_even - 0.03, depth, window)
    dice = random.Random(1)
    watch = Watch(depth, window, 100, 0.03)
    before = [STEPS[draw(dice, depth, 0.97)] for _ in range(good_rounds)]
    assert first_ring(watch, before, break_even) is None
    found = first_ring(watch, [STEPS[0]] * window, break_even)
    assert found <= bound <= window


def test_the_stated_rounds_are_few():
    assert reaction_rounds(1.87, 4, 256) == math.ceil(math.log(FALSE_ALARM_ROUNDS) / math.log(4 / 3.13)) == 38
    assert reaction_rounds(2.0, 1, 256) == 1
    with pytest.raises(ValueError, match="always pays"):
        reaction_rounds(1.0, 4, 256)


@pytest.mark.parametrize(("depth", "needed"), [(3, 1.5), (4, 1.9), (7, 2.6)])
def test_at_break_even_itself_false_alarms_are_as_rare_as_stated(depth, needed):
    dice, chance = random.Random(2), chance_of(needed, depth)
    watch, rounds, alarms = Watch(depth, FOREVER, 1, 0.0), 6 * FALSE_ALARM_ROUNDS, 0
    for _ in range(rounds):
        alarms += watch.rings(STEPS[draw(dice, depth, chance)], needed)
    assert alarms <= rounds / FALSE_ALARM_ROUNDS


def test_prose_that_pays_is_left_alone_by_both_tests():
    dice = random.Random(3)
    watch = Watch(4, 256, 100, 0.03)
    assert first_ring(watch, [STEPS[draw(dice, 4, 0.75)] for _ in range(30_000)], 1.9) is None


def test_the_way_down_is_another_drafter_a_shorter_chain_that_would_pay_or_off():
    rows = (row("1x4096", WINDOW, window=1.3, full=1.1, ngram=1.2),)
    assert feed(policy(*rows).chooser(), 0, 100)[-1] == NGRAM, "the best of the others"
    assert list(dict.fromkeys(feed(policy(*rows).chooser(), 0, 400))) == [WINDOW, NGRAM, FULL, "off"]
    made = policy(*rows).chooser()
    notes = []
    for _ in range(400):
        config = made(1, 4096)
        notes.append(made.take_note())
        made.observe(round_step((0,), config=str(config)) if not config.is_off else round_step((0,), 0, config="off"))
    said = [n for n in notes if n]
    assert said[0] == f"fell back to {NGRAM}: {WINDOW} yields 1.00 tokens per row and round here, below its break-even 1.50"
    assert len(said) == 3
