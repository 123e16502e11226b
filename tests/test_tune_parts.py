"""The parts of the tuner: plans, blocks, intervals, the choice among equals, the search."""

from __future__ import annotations

import math

import optuna
import pytest

from builders import off_step, prefill_step, round_step
from specdec_lab.records import Cell, UnsupportedConfig
from specdec_lab.tune import Plan, Protocol, candidates, make_plan
from specdec_lab.tune.assemble import CellEvidence
from specdec_lab.tune.blocks import Block, first_difference, log_speedup, order_of, run_once, sides, summarize_runs
from specdec_lab.tune.db import Design, Measurement
from specdec_lab.tune.duel import finalist, verdict
from specdec_lab.tune.grid import starting_points
from specdec_lab.tune.search import CellSearch, SearchSpace, open_journal
from world import OFF, World, spec

# Plans


def test_a_plan_drops_what_does_not_fit_before_anything_runs():
    def fits(cell):
        return f"KV {cell.batch * cell.length} bytes > 9,000 free" if cell.batch * cell.length > 9000 else None

    plan = make_plan([4, 1], [4096, 512], 60, ["self", "ngram"], fits=fits)
    assert [str(cell) for cell in plan.cells] == ["1x512", "4x512", "1x4096"]
    assert {str(cell): reason for cell, reason in plan.infeasible.items()} == {"4x4096": "KV 16384 bytes > 9,000 free"}
    words = plan.describe()
    assert "3 cells in at most 60 s" in words
    assert "4x4096: left out, KV 16384 bytes" in words
    assert "1x512: 56 candidates (48 self, 8 ngram)" in words


def test_candidates_are_windows_of_powers_of_two_not_above_the_length():
    found = candidates(Cell(1, 100), ["self"])
    assert {str(c.view) for c in found} == {"4+12", "4+28", "4+60"}
    assert {c.num_nodes for c in found} == set(range(1, 9))
    assert [str(c) for c in candidates(Cell(1, 100), ["ngram"], chains=(2, 4))] == ["ngram/chain2", "ngram/chain4"]


def test_starting_points_are_one_good_guess_per_drafter():
    cell = Cell(4, 4096)
    guesses = starting_points(candidates(cell, ["self", "model", "ngram"]), cell)
    assert [str(g) for g in guesses] == ["self:4+252/chain3", "model:4+252/chain3", "ngram/chain3"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_plan([], [512], 1, ["self"]), "at least one batch"),
        (lambda: make_plan([1], [512], 0, ["self"]), "budget_s must be above 0"),
        (lambda: make_plan([1], [8], 1, ["self"]), "no candidate for 1x8"),
        (lambda: Plan((Cell(1, 1), Cell(1, 1)), {Cell(1, 1): (spec("ngram/chain1"),)}, 1.0), "a cell twice"),
        (lambda: Protocol(duel_blocks=5), "at least 6"),
        (lambda: Protocol(min_rounds=1), "at least 2 rounds"),
        (lambda: Protocol(min_speedup=0.9), "slower is never chosen"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Blocks


def test_a_run_scores_rounds_after_warm_up_while_all_rows_are_live_and_closes_the_stream():
    closed = []

    def measure(cell, config):
        try:
            yield prefill_step()
            yield off_step(scale=100.0)
            yield from (off_step() for _ in range(5))
            yield off_step(frozen=(1,))
            yield off_step()
        finally:
            closed.append(True)

    sample = run_once(measure, Cell(2, 512), OFF, 1e9, Protocol(), lambda: 0.0)
    assert (len(sample.scored), closed) == (5, [True])
    assert {step.wall_s for step in sample.scored} == {off_step().wall_s}
    assert [len(row) for row in sample.tokens] == [7, 6]


def test_a_run_ends_when_its_time_is_over_but_not_before_its_least_rounds():
    world = World()
    cell = Cell(1, 512)
    least = run_once(world, cell, OFF, 0.0, Protocol(), world.clock)
    long = run_once(world, cell, OFF, 1.0, Protocol(), world.clock)
    assert len(least.scored) == Protocol().min_rounds
    assert sum(step.wall_s for step in long.scored) == pytest.approx(1.0, rel=0.02)


def test_the_statistic_is_tokens_over_time_of_the_scored_rounds():
    def measure(cell, config):
        if config.is_off:
            return (off_step() for _ in range(20))
        return (round_step((1, 3), config=str(config), scale=2.0) for _ in range(20))

    order, cell = order_of(0), Cell(2, 512)
    configs = sides(order, spec("self:4+60/chain3"))
    block = Block.of(order, [run_once(measure, cell, config, 0.0, Protocol(), lambda: 0.0) for config in configs])
    plain, round_s = off_step().wall_s, round_step(scale=2.0).wall_s
    value, error = log_speedup(block)
    assert value == pytest.approx(math.log(6 / round_s / (2 / plain)))
    assert error == 0
    summary = summarize_runs(block.candidate)
    assert summary["acceptance_histogram"] == [0, 8, 0, 8]
    assert summary["mean_acceptance_length"] == summary["tokens_per_round"]["mean"] == 3
    assert summary["tokens_per_round"]["count"] == 8, "of one run: the other repeats its text"


def test_tokens_are_compared_over_the_common_prefix():
    world, cell = World(), Cell(2, 512)
    plain = [run_once(world, cell, OFF, 0.1, Protocol(), world.clock)]
    good = [run_once(world, cell, spec("ngram/chain3"), 0.3, Protocol(), world.clock)]
    assert len(good[0].tokens[0]) != len(plain[0].tokens[0])
    assert first_difference(plain, good) is None
    world.liars.add("ngram/chain3")
    bad = [run_once(world, cell, spec("ngram/chain3"), 0.0, Protocol(), world.clock)]
    assert "row 0 emits token" in first_difference(plain, bad)


def test_a_stream_too_short_to_score_is_unsupported():
    with pytest.raises(UnsupportedConfig, match="more new tokens"):
        run_once(lambda cell, config: iter([off_step()]), Cell(2, 512), OFF, 0.0, Protocol(), lambda: 0.0)


# Intervals and choices


def block(value, config="model:4+60/chain3", sd=0.0, count=100, kind="duel", index=0):
    summary = {"log_speedup": value, "tokens_per_round": {"mean": 2.0, "sd": sd, "count": count}}
    return Measurement(f"m-{value}-{index}", kind, "r", "f.f", "w", 0.0, Cell(1, 512), config, Design(index), summary=summary)


def test_an_interval_adds_spread_over_blocks_and_text():
    values = [0.10, 0.12, 0.11, 0.13, 0.09, 0.11]
    steady = verdict([block(v) for v in values])
    t5 = 2.5706
    assert steady.mean - steady.low == pytest.approx(t5 * 0.0141421 / math.sqrt(6), rel=1e-4)
    text = verdict([block(v, sd=1.0, count=100 + i) for i, v in enumerate(values)])
    assert text.num_row_rounds == 105
    assert (text.mean - text.low) ** 2 - (steady.mean - steady.low) ** 2 == pytest.approx((1.96 * 0.5) ** 2 / 105)
    assert verdict([block(0.1)]) is None


def test_only_a_complete_duel_above_the_gate_wins():
    protocol = Protocol()

    def winner(values, kind="duel"):
        blocks = [block(v, kind=kind, index=i) for i, v in enumerate(values)]
        return CellEvidence.of(Cell(1, 512), blocks).winner(protocol)

    assert winner([0.2] * 6) == "model:4+60/chain3"
    assert winner([0.2] * 5) == "off"
    assert winner([0.2] * 9, kind="race") == "off"
    assert winner([0.029] * 6) == "off", "faster, by less than min_speedup"
    assert winner([0.2, 0.0, 0.2, 0.0, 0.2, 0.0]) == "off", "faster on average, but not significantly"


def races(**means):
    """name__chain -> block values around a mean."""
    names = {"short": "model:4+60/chain2", "long": "model:4+60/chain5", "wide": "model:4+124/chain2", "few": "ngram/chain1"}
    around = {name: (0.0,) if name == "few" else (-0.01, 0.0, 0.01) for name in names}
    return {spec(names[name]): [block(mean + d, names[name]) for d in around[name]] for name, mean in means.items()}


def test_near_equals_go_to_the_plainer_configuration():
    assert str(finalist(races(long=0.305, short=0.30), set(), 0.02)) == "model:4+60/chain2"
    assert str(finalist(races(long=0.35, short=0.30), set(), 0.02)) == "model:4+60/chain5"
    assert str(finalist(races(short=0.30, wide=0.30), set(), 0.02)) == "model:4+124/chain2"
    assert str(finalist(races(short=0.30, few=0.9), set(), 0.02)) == "model:4+60/chain2", "one block is no evidence"


# Search


def search_in(tmp_path, configs, priors=()):
    tmp_path.mkdir(exist_ok=True)
    return CellSearch(open_journal(tmp_path / "journal.log"), Cell(1, 512), configs, priors, 0, Protocol())


def test_a_search_proposes_each_configuration_once_until_none_is_left(tmp_path):
    configs = candidates(Cell(1, 64), ["self", "ngram"], windows=(16, 32), chains=(1, 2, 3))
    search = search_in(tmp_path, configs, priors=(configs[4], spec("ngram/chain8"), configs[0]))
    asked = []
    while (trial := search.ask()) is not None:
        asked.append(trial.config)
        if trial.config == configs[5]:
            trial.fail("oom")
            continue
        for _ in range(2):
            trial.report(-0.1 * trial.config.num_nodes)
        trial.finish()
    assert asked[:2] == [configs[4], configs[0]], "starting points first; what is no candidate here is left out"
    assert sorted(map(str, asked)) == sorted(map(str, configs))
    assert search.best == (OFF, 0.0)
    assert search.known[configs[5]] == []


def test_a_resumed_search_asks_what_the_uninterrupted_one_would(tmp_path):
    configs = candidates(Cell(1, 4096), ["self", "model"])

    def step(search):
        trial = search.ask()
        trial.report(trial.config.num_nodes / 10)
        trial.finish()
        return str(trial.config)

    whole = search_in(tmp_path / "a", configs)
    expected = [step(whole) for _ in range(20)]
    got = []
    for _ in range(10):
        search = search_in(tmp_path / "b", configs)
        got += [step(search), step(search)]
        search.ask()  # killed while it ran
    assert got == expected


def test_a_hopeless_race_ends_after_one_block_and_a_close_one_goes_on(tmp_path):
    configs = candidates(Cell(1, 4096), ["self"])
    search = search_in(tmp_path, configs)
    leader = search.ask()
    assert not any(leader.report(value) for value in (0.40, 0.42, 0.41, 0.39, 0.40, 0.41))
    leader.finish()
    assert search.best[0] == leader.config
    assert search.ask().report(0.1)
    close = search.ask()
    assert not close.report(0.395)
    assert close.report(0.30), "behind by far more than the spread of this cell's blocks"


def test_parameters_mean_configurations_and_holes_snap_to_the_nearest():
    texts = ("self:4+12/chain1", "self:4+28/chain1", "self:4+28/chain4", "model:full/2,1", "ngram/chain3")
    configs = [spec(text) for text in texts]
    space = SearchSpace(configs)
    for config in configs:
        assert space.suggest(optuna.trial.FixedTrial(space.params(config))) == config
    hole = optuna.trial.FixedTrial({"drafter": "self", "self.view": 0, "self.tree": 1})
    assert space.suggest(hole) in configs
