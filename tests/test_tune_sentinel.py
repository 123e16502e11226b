"""The sentinel: a machine that becomes another one while it is measured makes no winner; one that is unsteady claims less."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

import pytest

from specdec_lab.records import Cell
from specdec_lab.tune import Database, Design, Measurement, Protocol, tune, verify
from specdec_lab.tune import watch as watching
from specdec_lab.tune.assemble import CellEvidence
from specdec_lab.tune.sentinel import is_shifted, standing, variation
from specdec_lab.tune.workers import Executor, Instrument, measure_item
from world import IDENTITY, OFF, World, run, small_plan, spec

SLOW = 20  # rounds of this world are so much longer: five minutes are few of them
PLAN = Protocol(race_run_s=3.0, duel_run_s=6.0, race_blocks=2, pilot_blocks=2, max_trials=4)


@dataclass
class Drifting(World):
    """A machine on which plain decoding, and nothing else, takes `factor` times as long between `start` and `end` seconds."""

    factor: float = 1.0
    start: float = 0.0
    end: float = 0.0
    bursts: dict[int, float] = field(default_factory=dict)  # call -> factor of this run of plain decoding alone
    rates: dict[str, float] = field(default_factory=lambda: {"self": 0.9, "model": 0.8, "ngram": 0.05})

    def step_s(self, cell, config):
        draft, verify = super().step_s(cell, config)
        slower = self.factor if config.is_off and self.start <= self.seconds < self.end else 1.0
        slower *= self.bursts.get(self.num_calls, 1.0) if config.is_off else 1.0
        return SLOW * draft, SLOW * verify * slower


def plan(budget_s=1e6, lengths=(512,)):
    return small_plan(budget_s, lengths=lengths, drafters=("ngram",), protocol=PLAN)


def records(tmp_path):
    return list(Database(tmp_path / "db", IDENTITY, "tiny"))


def sentinels(tmp_path):
    return [m for m in records(tmp_path) if m.kind == "sentinel"]


def drifts(**changes):
    """Plain decoding takes half as long again for a while that begins after the first sentinel: drafts then seem to pay."""
    return Drifting(**{"factor": 1.5, "start": 20.0, "end": 400.0, "is_even": True, **changes})


# What a drift does


def test_a_drift_that_would_have_made_a_wrong_winner_does_not(tmp_path, monkeypatch):
    truth = run(tmp_path / "steady", drifts(factor=1.0), plan())
    assert [row.config for row in truth.table] == ["off"]
    with monkeypatch.context() as patch:
        patch.setattr(watching, "PERIOD_S", math.inf)
        fooled = run(tmp_path / "blind", drifts(), plan())
    assert [row.config for row in fooled.table] != ["off"], "otherwise this proves nothing"
    world = drifts()
    policy = run(tmp_path / "watched", world, plan())
    assert [row.config for row in policy.table] == ["off"]
    assert world.seconds > 400
    assert "drift" not in policy.header["labels"]
    path = tmp_path / "watched" / "runs" / "run" / "policy.json"
    assert verify(path, tmp_path / "watched" / "db" / "TEST_CPU_2t") == ()


def test_what_was_measured_since_the_last_good_sentinel_is_measured_again_and_nothing_is_lost(tmp_path):
    told = []
    run(tmp_path, drifts(), plan(), report=told.append)
    shifted = [m for m in sentinels(tmp_path) if m.status == "throttled"]
    assert shifted
    assert all("measured again since then" in m.reason for m in shifted)
    everything = records(tmp_path)
    stand = {m.id for m in standing(everything)}
    gone = [m for m in everything if m.id not in stand]
    assert gone
    assert {m.env["sentinel"] for m in gone} == {m.design.pair_of for m in shifted}
    assert {m.status for m in gone} == {"ok"}, "they stay on disk as they were measured"
    pairs = [m for m in everything if m.id in stand and m.design.pair_of and m.kind in ("race", "duel")]
    assert len({m.key for m in pairs}) == len(pairs), "nothing that stands was measured twice"
    assert [p.status for p in told if p.stage == "cell"].count("reopened") == len(shifted)


def test_blocks_before_the_last_good_sentinel_are_not_measured_again(tmp_path):
    world = Drifting(factor=1.5, start=330.0, end=700.0, is_even=True)
    run(tmp_path, world, plan(lengths=(512, 1024, 2048, 4096)))
    everything = records(tmp_path)
    stand = standing(everything)
    first = [m for m in everything if m.env.get("sentinel") == sentinels(tmp_path)[0].id and m.design.pair_of]
    assert len(first) > 10
    assert all(m in stand for m in first)
    assert any(m.status == "throttled" for m in sentinels(tmp_path))


def test_a_burst_of_other_work_during_a_sentinel_is_no_drift(tmp_path, monkeypatch):
    run(tmp_path / "calm", Drifting(is_even=True), plan(lengths=(512, 1024, 2048)))
    repeats = [m for m in sentinels(tmp_path / "calm") if "shift" in m.summary]
    assert repeats, "the sentinel was measured again"
    assert all(m.summary["shift"] == pytest.approx(0) for m in repeats)
    noisy, real = Drifting(is_even=True), watching.Watch._compare

    def with_burst(watch, worker, post):
        noisy.bursts[noisy.num_calls + 1] = 1.5
        return real(watch, worker, post)

    monkeypatch.setattr(watching.Watch, "_compare", with_burst)
    policy = run(tmp_path / "noisy", noisy, plan(lengths=(512, 1024, 2048)))
    assert noisy.bursts
    assert not [m for m in sentinels(tmp_path / "noisy") if m.status != "ok"]
    assert "drift" not in policy.header["labels"]


def test_without_time_to_measure_again_the_cell_is_flagged_and_claims_no_more_than_the_shift(tmp_path):
    policy = run(tmp_path, drifts(end=math.inf), plan(budget_s=330.0))
    flagged = [m for m in sentinels(tmp_path) if m.summary.get("is_drift")]
    assert flagged
    assert "what was measured in between stays" in flagged[0].reason
    assert "drift" in policy.header["labels"]
    (row,) = policy.table
    assert row.details["sentinel"]["drift"] == pytest.approx(math.log(1.5), rel=1e-6)
    assert row.details["sentinel"]["least_speedup"] == pytest.approx(1.5, rel=1e-6)
    assert row.config == "off", "1.3x across a shift of 1.5x is no evidence"


def test_a_machine_that_never_settles_is_taken_as_it_is_after_three_times(tmp_path):
    world = Drifting(is_even=True)
    world.on_call = lambda w: setattr(w, "factor", 1.0 + 0.3 * (int(w.seconds / 290) % 2))
    world.end = math.inf
    policy = run(tmp_path, world, plan(lengths=(512, 1024, 2048)))
    statuses = [m.status for m in sentinels(tmp_path) if m.design.pair_of]
    assert statuses.count("throttled") == watching.MAX_REOPENINGS
    assert {"drift"} <= set(policy.header["labels"])


@pytest.mark.parametrize("calls", [20, 60, 140])
def test_an_interrupt_around_a_drift_loses_nothing_and_resuming_finds_the_truth(tmp_path, calls):
    def interrupt(world):
        if world.num_calls == calls:
            raise KeyboardInterrupt

    world = drifts(on_call=interrupt)
    partial = run(tmp_path, world, plan())
    assert "interrupted" in partial.header["labels"]
    before = {m.id for m in records(tmp_path)}
    world.on_call = None
    policy = run(tmp_path, world, plan())
    assert before <= {m.id for m in records(tmp_path)}
    assert [row.config for row in policy.table] == ["off"]
    assert {row.state for row in policy.table} == {"tuned"}


# How steady a machine is


def sentinel(number, step_s, **changes):
    step = {"p05": step_s, "p50": step_s, "p95": step_s, "mean": step_s, "sd": 0.0}
    summary = {"step_s": step, "num_rounds": 50, "tokens_per_s": 1 / step_s, **changes.pop("summary", {})}
    design = Design(number, pair_of=f"m-{number - 1}" if number else None)
    return Measurement(f"m-{number}", "sentinel", "r", IDENTITY.of(OFF), "prose", 0.0, Cell(2, 512), "off", design,
                       summary=summary, **changes)  # fmt: skip


def series(*shifts):
    return [sentinel(0, 0.01), *(sentinel(i + 1, 0.01, summary={"shift": s}) for i, s in enumerate(shifts))]


def block(number, value, config="ngram/chain3"):
    summary = {"log_speedup": value, "tokens_per_s": 100.0, "tokens_per_round": {"mean": 1.5, "sd": 0.0, "count": 10**6},
               "acceptance_histogram": [], "drafted_at": [], "num_spec_steps": 1}  # fmt: skip
    return Measurement(f"b-{number}", "duel", "r", IDENTITY.of(spec(config)), "prose", 0.0, Cell(2, 512), config,
                       Design(number, pair_of=f"p-{number}"), summary=summary, env={"sentinel": "m-0"})  # fmt: skip


def winner(speedup, *shifts):
    blocks = [block(i, math.log(speedup)) for i in range(6)]
    return CellEvidence.of(Cell(2, 512), [*blocks, *series(*shifts)]).winner(Protocol())


def test_the_variation_of_the_sentinel_sets_the_smallest_difference_that_is_published():
    assert winner(1.05) == winner(1.05, 0.001, -0.001, 0.001) == "ngram/chain3"
    assert winner(1.038, 0.029, -0.028, 0.029) == winner(1.034, 0.025, -0.025) == "off", "a repeat of nothing differs so much"
    assert winner(1.1, 0.029, -0.028, 0.029) == "ngram/chain3"
    assert winner(1.02, 0.0, 0.0, 0.0) == "off", "min_speedup stays what it was"
    evidence = CellEvidence.of(Cell(2, 512), [*(block(i, 0.2) for i in range(6)), *series(0.02, -0.02)])
    assert evidence.machine.to_dict()["sentinel"] == {
        "repeats": 3, "cv": pytest.approx(0.02 / math.sqrt(2)), "least_speedup": pytest.approx(1 + 0.02 * math.sqrt(2))
    }  # fmt: skip


def test_too_few_repeats_say_nothing_of_the_variation():
    assert variation(series(0.02)) is None
    assert variation(series(0.02, 0.02)) == pytest.approx(0.02 / math.sqrt(2))
    assert CellEvidence.of(Cell(2, 512), [block(0, 0.1), *series(0.02)]).machine.to_dict() == {}


def test_a_shift_is_more_than_three_percent_and_more_than_the_noise():
    before = sentinel(0, 0.01).summary
    for step_s, cv, expected in [(0.01029, None, False), (0.01032, None, True), (0.0096, None, True), (0.0105, 0.03, False)]:
        assert is_shifted(sentinel(1, step_s).summary, before, cv) is expected, step_s
    noisy = {**before, "step_s": {**before["step_s"], "sd": 0.002}}
    assert not is_shifted(sentinel(1, 0.0105).summary, noisy, None)


# Alone, and with company


class Pair(Executor):
    """Two workers in one process, each with its own world; company makes rounds `cost` slower, as far as it is really there."""

    def __init__(self, cost):
        super().__init__(["w0", "w1"])
        self.busy, self.cost, self.lock = 0, cost, threading.Lock()
        self.worlds = [World(), World()]

    def _run(self, worker, item, predicted_s):
        world = self.worlds[worker]

        def measure(cell, config):
            for step in world(cell, config):
                time.sleep(0.002)
                slower = 1 + self.cost * (self.busy > 1)
                yield step if slower == 1 else slowed(step, slower)

        with self.lock:
            self.busy += 1
        try:
            return measure_item(Instrument(measure, "", time.perf_counter), item)
        finally:
            with self.lock:
                self.busy -= 1


def slowed(step, factor):
    from dataclasses import replace

    walls = ("wall_s", "draft_s", "linear_s", "attention_s", "accept_s", "commit_s", "host_s")
    return replace(step, **{name: getattr(step, name) * factor for name in walls})


@pytest.mark.parametrize(("cost", "labels"), [(0.05, ["2 workers at once"]), (0.0, [])])
def test_numbers_that_company_slows_are_published_with_the_concurrency(tmp_path, cost, labels):
    crowd = small_plan(batches=(1, 2), lengths=(512,), drafters=("ngram",), lanes=2, protocol=Protocol(
        race_run_s=0.02, duel_run_s=0.02, race_blocks=2, pilot_blocks=2, max_trials=2))  # fmt: skip
    database = Database(tmp_path / "db", IDENTITY, "tiny")
    policy = tune(crowd, Pair(cost), IDENTITY, database, run_dir=tmp_path / "run", workload="prose")
    assert policy.header["labels"] == labels
    found = [m for m in database if m.kind == "sentinel"]
    alone = [m for m in found if m.env["concurrency"] == 1]
    together = [m for m in found if "slowdown" in m.summary]
    assert {m.worker for m in alone} == {m.worker for m in together} == {"w0", "w1"}
    assert all(m.summary["slowdown"] == pytest.approx(math.log1p(cost), abs=0.01) for m in together)
    assert {m.env["concurrency"] for m in database if m.config != "off"} == {2}
