"""Ray's workers: the policy of one process; an actor that is killed, hangs or is full is a record, and the work goes on.

Only with Ray: `pip install "specdec_lab[ray]"`. What is told without it, and that nobody loads it unasked, is tested anyway.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from specdec_lab.records import Cell, SpecConfig
from specdec_lab.tune import RayActors, WorkerCannotStart
from specdec_lab.tune.workers import WorkerLost, WorkItem
from worker_world import (
    BASE,
    SHORT,
    VICTIM,
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


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with cores for two actors."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'specdec_lab[ray]'")
    with pytest.MonkeyPatch.context() as patch:  # actors find these tests' worlds
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


@pytest.fixture(autouse=True)
def _same_names(monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)


def by_ray(plan, tmp_path, recipe, num_workers=1, name="ray"):
    with RayActors(recipe, num_workers, "cpu", BASE, SHORT) as workers:
        return tuned(tmp_path, workers, plan, name)


@pytest.mark.usefixtures("cluster")
def test_inline_two_processes_and_two_actors_give_one_policy(tmp_path):
    plan = small_plan(batches=(1, 2), lengths=(512, 2048), protocol=QUICK, lanes=2)
    expected, expected_records = inline(plan, tmp_path)
    processes, _ = by_processes(plan, tmp_path, Synthetic(), ("cpu:0", "cpu:1"))
    policy, records = by_ray(plan, tmp_path, Synthetic(), 2)
    assert decisions(policy) == decisions(processes) == decisions(expected)
    assert len(expected.portfolio) > 1, "otherwise equal policies say little"
    assert results(records) == results(expected_records)
    assert policy.header["workers"] == ["w0@ray:cpu", "w1@ray:cpu"]
    assert {m.worker for m in records} == {"w0@ray:cpu", "w1@ray:cpu"}, "both actors measured"


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("trouble", "status", "words"), [
    ("kill", "crashed", "w0@ray:cpu is gone"), ("hang", "timeout", "within its lease"),
    ("error", "crashed", "an illegal address was read"),
])  # fmt: skip
def test_a_lost_actor_is_a_record_and_its_item_is_done_again(tmp_path, trouble, status, words):
    expected, expected_records = inline(one_cell(), tmp_path)
    policy, records = by_ray(one_cell(), tmp_path, troubled(tmp_path, trouble, times=1))
    assert decisions(policy) == decisions(expected)
    (lost,) = [m for m in records if m.status == status]
    assert lost.config == VICTIM
    assert words in lost.reason
    assert [m.status for m in records if m.design.retry_of == lost.id and m.config == VICTIM] == ["ok"]
    assert results(records) - results([lost]) == results(expected_records)


@pytest.mark.usefixtures("cluster")
def test_a_configuration_that_kills_three_actors_is_left_alone_and_the_cell_goes_on(tmp_path):
    policy, records = by_ray(one_cell(), tmp_path, troubled(tmp_path, "kill", times=10**6))
    lost = [m for m in records if m.status == "crashed"]
    assert [m.config for m in lost] == [VICTIM] * 3
    assert [m.design.retry_of for m in lost] == [None, lost[0].id, lost[1].id]
    assert [row.state for row in policy.table] == ["tuned"]


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_runs_out_of_memory_says_so_once_and_closes_what_needs_as_much(tmp_path):
    policy, records = by_ray(one_cell(max_trials=8), tmp_path, troubled(tmp_path, "memory", times=10**6))
    assert [(m.config, m.reason) for m in records if m.status == "oom"] == [(VICTIM, "the cache needs 123 bytes")]
    assert {m.config for m in records if m.status == "ok" and m.config != "off"} == {"ngram/chain1", "ngram/chain2"}


@pytest.mark.usefixtures("cluster")
def test_an_actor_keeps_the_order_of_an_item_and_a_dead_one_is_replaced_by_the_next_item():
    cell, config = Cell(2, 512), spec("ngram/chain2")
    item = WorkItem(cell, (OFF, config, config, OFF), 0.01, QUICK)
    with RayActors(Synthetic(), 1, "cpu", BASE, SHORT) as workers, workers.turn:
        workers.assign(cell, 0)
        first = workers.run(item, 1.0)
        assert [SpecConfig.parse(run.config) for run in first] == list(item.configs)
        (pid,) = workers.pids()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="w0@ray:cpu is gone") as lost:
            workers.run(item, 1.0)
        assert lost.value.status == "crashed"
        assert (workers.pids(), workers.life(cell)) == ((None,), 1)
        assert workers.run(item, 1.0) == first
    assert workers.pids() == (None,)


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_cannot_start_says_why():
    with (
        pytest.raises(WorkerCannotStart, match=f"base fingerprint 123, the plan was made for {BASE}"),
        RayActors(Synthetic(base="123"), 1, "cpu", BASE, SHORT),
    ):
        pass
    with (
        pytest.raises(WorkerCannotStart, match=r"w0@ray:cpu cannot start: .*no device.*The cluster has 0 GPUs and 2 CPU cores"),
        RayActors(no_device, 1, "cpu", BASE, SHORT),
    ):
        pass


def no_device(device):
    raise RuntimeError("no device of that name")


def test_without_ray_its_executor_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerCannotStart, match=r'not installed here: pip install "specdec_lab\[ray\]"'):
        RayActors(Synthetic(), 1, "cpu", BASE)


def test_nobody_loads_ray_unasked():
    code = "import sys, specdec_lab.tune.ray_workers, specdec_lab.commands.tuning; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
