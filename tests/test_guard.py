"""The live fall-back: how soon a collapse is found, how rarely a draft that pays is put aside, and what runs instead."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from builders import off_step, round_step
from specdec_lab.policy import Estimate, Policy, Row, Rules
from specdec_lab.policy.guard import EVIDENCE, AcceptanceGuard, bound
from specdec_lab.policy.lookup import Guard
from specdec_lab.records import Cell
from test_policy import header

SELF, SHORT, NGRAM, MODEL = "self:4+60/chain4", "self:4+60/chain1", "ngram/chain4", "model:4+60/chain4"
BET_ALONE = Guard(window_steps=10**9)  # the window never fills


def chance_for(mean, depth):
    """Acceptance of every token with which a chain yields this many tokens a round."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(depth + 1)) < mean else (low, middle)
    return low


def yields(rng, mean, depth, batch=1):
    """Accepted tokens of one round."""
    alpha, counts = chance_for(mean, depth), []
    for _ in range(batch):
        count = 0
        while count < depth and rng.random() < alpha:
            count += 1
        counts.append(count)
    return tuple(counts)


def rounds_to_alarm(guard, needed, depth, rounds):
    """How many of these rounds pass until the guard raises an alarm; None when it does not."""
    for number, accepted in enumerate(rounds, start=1):
        if guard.observe(round_step(accepted, config=f"self:4+60/chain{depth}"), needed, depth):
            return number
    return None


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("needed", "depth"), [(1.5, 3), (2.0, 4), (2.6, 4), (1.2, 8)])
def test_a_collapse_is_found_within_the_stated_bound_whatever_came_before(needed, depth, batch):
    for seed in range(10):
        rng, guard = random.Random(seed), AcceptanceGuard(BET_ALONE)
        healthy = [yields(rng, 1.3 * needed, depth, batch) for _ in range(rng.randrange(200))]
        assert rounds_to_alarm(guard, needed, depth, healthy) is None
        reaction = rounds_to_alarm(guard, needed, depth, [(0,) * batch] * 1000)
        assert reaction is not None
        assert reaction <= bound(needed, depth)


def test_the_bound_is_far_below_a_window_of_rounds():
    assert bound(2.0, 4) == 24
    assert bound(2.6, 4) == 13
    assert Guard().window_steps == 256
    assert bound(1.0, 4) == bound(5.0, 4) == float("inf"), "no bet where nothing could be won: the window alone decides"


def test_a_partial_collapse_is_found_early_too():
    """A quarter of what break-even needs is still accepted."""
    reactions = []
    for seed in range(40):
        rng = random.Random(seed)
        rounds = [yields(rng, 1.25, 4) for _ in range(1000)]
        reactions.append(rounds_to_alarm(AcceptanceGuard(BET_ALONE), 2.0, 4, rounds))
    assert sorted(reactions)[36] <= 4 * bound(2.0, 4)


def test_a_draft_that_pays_is_not_put_aside():
    """20 streams of 1,000 rounds, a fifth above break-even, as alone as rounds get (batch 1)."""
    for seed in range(20):
        rng = random.Random(seed)
        rounds = [yields(rng, 2.4, 4) for _ in range(1000)]
        assert rounds_to_alarm(AcceptanceGuard(BET_ALONE), 2.0, 4, rounds) is None, seed


@pytest.mark.parametrize("law", ["geometric", "bursts"])
def test_alarms_at_break_even_itself_are_as_far_apart_as_promised(law):
    """Even for a draft that finds nothing in nine rounds of ten and everything in one."""
    needed, depth = (2.0, 4) if law == "geometric" else (1.4, 4)
    waits = []
    for seed in range(30):
        rng = random.Random(seed)
        rounds = (yields(rng, needed, depth) if law == "geometric" else (4 * (rng.random() < 0.1),) for _ in range(1500))
        waits.append(rounds_to_alarm(AcceptanceGuard(BET_ALONE), needed, depth, rounds) or 1500)
    assert sum(waits) / len(waits) >= EVIDENCE


# What runs instead.


def chooser(**speedups):
    """Break-even 2 tokens a round, 1.3 for the shorter chain."""
    names = {"self": SELF, "short": SHORT, "ngram": NGRAM, "model": MODEL}
    estimates = {
        names[n]: Estimate(s, (s, s), "measured", ("m-1",), 1.3 if n == "short" else 2.0) for n, s in speedups.items()
    }
    row = Row(Cell(1, 4096), "tuned", config=SELF, speedup=speedups["self"], speedup_ci95=(speedups["self"],) * 2,
              tokens_per_s=100.0, baseline_tokens_per_s=60.0, estimates=estimates, details={})  # fmt: skip
    rules = Rules(guard=Guard(window_steps=256, cooldown_steps=100, margin=0.03))
    return Policy(header(), rules, ("off", SELF, SHORT, NGRAM, MODEL), (row,)).chooser()


def play(choose, accepted, rounds):
    """(configuration, note) of every round while each draft has so many tokens accepted, by name; 0 for the others."""
    seen = []
    for _ in range(rounds):
        config = choose(1, 4096)
        seen.append((str(config), choose.take_note()))
        counts = (accepted.get(str(config), 0),)
        choose.observe(off_step(1) if config.is_off else round_step(counts, config=str(config)))
    return seen


def stretches(seen):
    return [(name, len(list(group))) for name, group in groupby(name for name, _ in seen)]


def test_a_collapse_hands_over_to_ngram_at_once_and_says_so_once():
    choose = chooser(self=1.8, model=1.6, ngram=1.1)
    assert {name for name, _ in play(choose, {SELF: 3}, 300)} == {SELF}
    seen = play(choose, {NGRAM: 4}, 60)
    (first, reaction), (second, _) = stretches(seen)
    assert (first, second) == (SELF, NGRAM)
    assert reaction <= bound(2.0, 4)
    assert [note for _, note in seen if note] == [f"fell back from {SELF}"]
    assert seen[reaction] == (NGRAM, f"fell back from {SELF}"), "on the first round of what runs now"


def test_without_ngram_the_best_other_drafter_runs():
    seen = play(chooser(self=1.8, model=1.2, ngram=1.01), {MODEL: 3}, 60)
    assert [name for name, _ in stretches(seen)] == [SELF, MODEL], "n-gram is not expected to gain there"


def test_a_second_collapse_goes_on_to_the_next_and_then_to_plain_decoding():
    seen = play(chooser(self=1.8, model=1.2, ngram=1.1), {}, 100)
    assert [name for name, _ in stretches(seen)] == [SELF, NGRAM, MODEL, "off"]
    assert len([note for _, note in seen if note]) == 3


def test_a_shorter_chain_runs_only_if_what_is_still_accepted_would_pay_it():
    decline = play(chooser(self=1.8, short=1.2), {SELF: 0, SHORT: 1}, 60)
    assert [name for name, _ in stretches(decline)] == [SELF, "off"], "nothing is accepted: one token is not either"
    choose = chooser(self=1.8, short=1.2)
    mild = []
    for accepted in [0, 1, 0, 1, 1] * 60:
        mild += play(choose, {SELF: accepted, SHORT: 1}, 1)
    assert [name for name, _ in stretches(mild)][:2] == [SELF, SHORT], "1.6 tokens a round: below 2, above 1.3"


def test_the_policys_own_answer_is_probed_again_and_comes_back_when_it_pays():
    choose = chooser(self=1.8, ngram=1.1)
    play(choose, {NGRAM: 4}, 60)
    back = play(choose, {NGRAM: 4, SELF: 3}, 400)
    assert back[-1][0] == SELF
    assert not any(note for _, note in back)
