"""Workers: the policy does not depend on who measured or who was done first; lost workers, hangs and full memories are records.

All worlds are synthetic (world.py). A worker's world runs in its process, with one thread.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from specdec_lab import cli
from specdec_lab.commands.tuning import worker_words
from specdec_lab.policy import Policy
from specdec_lab.records import Cell, SpecConfig
from specdec_lab.tune import WorkerCannotStart, read_file, verify
from specdec_lab.tune.workers import Inline, Lease, Processes, WorkerLost, WorkItem
from worker_world import (
    BASE,
    SHORT,
    VICTIM,
    SteadyWorld,
    Synthetic,
    by_processes,
    decisions,
    inline,
    one_cell,
    results,
    troubled,
    tuned,
)
from world import OFF, QUICK, small_plan, spec


@pytest.fixture(autouse=True)
def _same_names(monkeypatch):
    """Records are ordered by their ids, which hold the name of the run."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)


# The policy


def test_two_processes_give_the_policy_of_one_whichever_is_done_first(tmp_path):
    plan = small_plan(batches=(1, 2), lengths=(512, 2048), protocol=QUICK, lanes=2)
    expected, expected_records = inline(plan, tmp_path)
    for slow in ("cpu:0", "cpu:1"):
        policy, records = by_processes(plan, tmp_path, Synthetic(slow=slow), ("cpu:0", "cpu:1"), slow.replace(":", ""))
        assert decisions(policy) == decisions(expected)
        assert results(records) == results(expected_records)
        assert policy.header["workers"] == ["w0@cpu:0", "w1@cpu:1"]
        homes = {cell: {m.worker for m in records if m.cell == cell} for cell in plan.cells}
        assert all(len(workers) == 1 for workers in homes.values()), "a cell stays with its worker"
        assert set.union(*homes.values()) == {"w0@cpu:0", "w1@cpu:1"}, "both workers were used"
    assert len(expected.portfolio) > 1, "otherwise equal policies say little"


def test_a_cell_starts_from_cells_that_are_finished_in_any_order_of_completion():
    plan = small_plan(batches=(1, 2), lengths=(512, 2048), lanes=2)
    cells = plan.cells
    assert [plan.before(cell) for cell in cells] == [(), (), cells[:1], cells[:2]]
    assert small_plan(batches=(1, 2)).before(cells[0]) == ()
    assert plan.share_s(100.0, 4) == 50.0, "two at a time: each may take twice as long"
    assert "lanes" not in small_plan().to_dict(), "run folders of older plans go on"
    with pytest.raises(ValueError, match="lanes"):
        small_plan(lanes=0)


def test_a_stop_ends_all_workers_between_blocks_and_the_run_can_be_resumed(tmp_path):
    plan = small_plan(batches=(1, 2), lengths=(512, 2048), drafters=("ngram",), protocol=QUICK, lanes=2)
    expected, _ = inline(plan, tmp_path)
    asked = iter(range(10**9))
    with Processes(Synthetic(), ("cpu:0", "cpu:1"), BASE, tmp_path, SHORT) as workers:
        partial, before = tuned(tmp_path, workers, plan, stop=lambda: next(asked) > 20)
        assert "interrupted" in partial.header["labels"]
        resumed, after = tuned(tmp_path, workers, plan)
    assert decisions(resumed) == decisions(expected)
    assert {m.id for m in before} < {m.id for m in after}
    assert len({m.key for m in after if m.config != "off"}) == len([m for m in after if m.config != "off"]), "nothing twice"


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also in a process that a shell started in the background and so told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_all_workers_after_their_blocks_and_keeps_what_they_measured(tmp_path):
    plan = small_plan(batches=(1, 2), lengths=(512, 2048), drafters=("ngram",), protocol=QUICK, lanes=2)
    told = []

    def report(progress):
        told.append(progress)
        if len(told) == 15:
            os.kill(os.getpid(), signal.SIGINT)

    with Processes(Synthetic(), ("cpu:0", "cpu:1"), BASE, tmp_path, SHORT) as workers:
        policy, records = tuned(tmp_path, workers, plan, report=report)
    assert "interrupted" in policy.header["labels"]
    assert {m.status for m in records} == {"ok"}
    finished = [p for p in told if p.status == "ok"]
    assert len(finished) == len([m for m in records if m.design.pair_of]), "every finished block is there"
    assert len(told) < 40
    assert verify(tmp_path / "run" / "run" / "policy.json", tmp_path / "run" / "db" / "TEST_CPU_2t") == ()


def test_a_fault_of_one_worker_ends_the_run_and_is_raised(tmp_path):
    plan = small_plan(batches=(1, 2), lengths=(512, 2048), drafters=("ngram",), protocol=QUICK, lanes=2)
    with Processes(Synthetic(), ("cpu:0", "cpu:1"), BASE, tmp_path, SHORT) as workers:

        def report(progress):
            assert progress.cell != plan.cells[1] or progress.block == 0, "a fault of the program"

        with pytest.raises(AssertionError, match="a fault of the program"):
            tuned(tmp_path, workers, plan, report=report)
        expected, _ = inline(plan, tmp_path)
        resumed, _ = tuned(tmp_path, workers, plan)
    assert decisions(resumed) == decisions(expected), "no cell was closed too early"


# Trouble


@pytest.mark.parametrize(("trouble", "status", "words"), [
    ("kill", "crashed", "killed by signal 9"), ("hang", "timeout", "within its lease"),
    ("error", "crashed", "an illegal address was read"),
])  # fmt: skip
def test_a_lost_worker_is_a_record_and_its_item_is_done_again(tmp_path, trouble, status, words):
    expected, expected_records = inline(one_cell(), tmp_path)
    policy, records = by_processes(one_cell(), tmp_path, troubled(tmp_path, trouble, times=1))
    assert decisions(policy) == decisions(expected)
    (lost,) = [m for m in records if m.status == status]
    assert lost.config == VICTIM
    assert words in lost.reason
    again = [m for m in records if m.design.retry_of == lost.id and m.config == VICTIM]
    assert [m.status for m in again] == ["ok"]
    assert results(records) - results([lost]) == results(expected_records)


def test_a_configuration_that_loses_three_workers_is_left_alone_and_the_cell_goes_on(tmp_path):
    policy, records = by_processes(one_cell(), tmp_path, troubled(tmp_path, "kill", times=10**6))
    lost = [m for m in records if m.status == "crashed"]
    assert [m.config for m in lost] == [VICTIM] * 3
    assert [m.design.retry_of for m in lost] == [None, lost[0].id, lost[1].id]
    assert [row.state for row in policy.table] == ["tuned"]
    assert any(m.config not in ("off", VICTIM) and m.status == "ok" for m in records)
    world = SteadyWorld()
    world.calls.clear()
    tuned(tmp_path, Inline(world, world.clock), one_cell(max_trials=4), "processes")
    assert not any(config == VICTIM for _, config in world.calls), "the resumed run leaves it alone as well"


def test_out_of_memory_is_recorded_once_and_closes_what_needs_as_much(tmp_path):
    policy, records = by_processes(one_cell(max_trials=8), tmp_path, troubled(tmp_path, "memory", times=10**6))
    failed = [m for m in records if m.status == "oom"]
    assert [(m.config, m.reason) for m in failed] == [(VICTIM, "the cache needs 123 bytes")]
    measured = {m.config for m in records if m.status == "ok" and m.config != "off"}
    assert measured == {"ngram/chain1", "ngram/chain2"}, "longer chains were closed unmeasured, shorter ones raced"
    assert [row.state for row in policy.table] == ["tuned"]


# Starting and asking


def test_a_worker_that_cannot_start_says_why_and_where_its_output_is(tmp_path):
    with (
        pytest.raises(WorkerCannotStart, match=r"w0@absent cannot start: .*no device named absent.*w0@absent.log"),
        Processes(Synthetic(), ["absent"], BASE, tmp_path, SHORT),
    ):
        pass
    with (
        pytest.raises(WorkerCannotStart, match=f"base fingerprint 123, the plan was made for {BASE}"),
        Processes(Synthetic(base="123"), ["cpu"], BASE, tmp_path, SHORT),
    ):
        pass


def test_an_item_keeps_its_order_and_a_dead_worker_is_replaced_by_the_next_item(tmp_path):
    cell, config = Cell(2, 512), spec("ngram/chain2")
    item = WorkItem(cell, (OFF, config, config, OFF), 0.01, QUICK)
    with Processes(Synthetic(), ["cpu"], BASE, tmp_path, SHORT) as workers, workers.turn:
        workers.assign(cell, 0)
        first = workers.run(item, 1.0)
        assert [SpecConfig.parse(run.config) for run in first] == list(item.configs)
        (pid,) = workers.pids()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="signal 9") as lost:
            workers.run(item, 1.0)
        assert lost.value.status == "crashed"
        assert (workers.pids(), workers.life(cell)) == ((None,), 1)
        assert workers.run(item, 1.0) == first
    assert workers.pids() == (None,)


def test_a_worker_starts_below_a_shell_whose_main_module_has_no_spec(tmp_path, monkeypatch):
    shell = ModuleType("__main__")
    del shell.__spec__
    monkeypatch.setitem(sys.modules, "__main__", shell)
    item = WorkItem(Cell(2, 512), (OFF,), 0.01, QUICK)
    with Processes(Synthetic(), ["cpu"], BASE, tmp_path, SHORT) as workers, workers.turn:
        workers.assign(item.cell, 0)
        assert [run.config for run in workers.run(item, 1.0)] == ["off"]


def test_a_lease_is_three_times_the_prediction_and_half_a_minute():
    assert Lease().seconds(10.0) == 60.0
    assert Lease().seconds(None) > 600, "nothing is known of a first run: prompts are read, kernels compiled"


# The command


def test_tune_measures_the_shipped_pair_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "tune --batches 1 --lengths 64 --budget 2s --db db --run first --devices cpu"
    assert cli.main(words.split()) in (0, 3, 4)
    assert Policy.load("policy.json").header["workers"] == ["w0@cpu"]
    records = [m for path in Path("db").rglob("*.jsonl") for m in read_file(path).measurements]
    assert {m.worker for m in records} == {"w0@cpu"}
    assert any(m.status == "ok" and m.config != "off" for m in records)
    assert not [m for m in records if m.status in ("crashed", "timeout")]
    assert "policy: policy.json" in capsys.readouterr().out


@pytest.mark.parametrize(("devices", "why"), [
    ("cpu,cpu", "needs different names"), ("", "needs different names"), ("cpu:0,cpu:1", "would disturb each other's timings"),
    ("cuda:77", "torch sees .* here, not cuda:77"), ("tpu", "cannot start: .*tpu"),
])  # fmt: skip
def test_devices_that_cannot_measure_are_refused_with_a_reason(tmp_path, monkeypatch, capsys, devices, why):
    monkeypatch.chdir(tmp_path)
    words = "tune --batches 1 --lengths 64 --budget 1s --db db --run first"
    assert cli.main([*words.split(), "--devices", devices]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(why, error)


def test_the_plan_says_how_many_workers_it_will_use():
    assert worker_words((), 0) == worker_words((), 1) == "workers: 1, this process"
    assert "2 GPUs are attached: --devices cuda:0,cuda:1 measures 2 cells at a time" in worker_words((), 2)
    assert worker_words(("cuda:0", "cuda:1"), 2).startswith("workers: 2, one process each on cuda:0, cuda:1")
