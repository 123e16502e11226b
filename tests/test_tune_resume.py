"""The tuner and time: budgets, interrupts, kills, resumption, company, full disks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import optuna
import pytest

from specdec_lab.policy import policy_schema
from specdec_lab.records import Identity
from specdec_lab.tune import Database, DatabaseError, PlanChanged, tune, verify
from specdec_lab.tune.search import open_journal
from world import IDENTITY, World, identifiers, keys, run, small_plan

# Budget, progress, stopping


def test_the_budget_ends_the_run_within_a_block_and_the_policy_says_what_is_missing(tmp_path):
    world = World()
    block = 0.0
    marks = []

    def report(progress):
        marks.append(world.seconds)

    policy = run(tmp_path, world, small_plan(budget_s=6.0, batches=(1, 4), lengths=(512, 8192)), report=report)
    block = max(b - a for a, b in zip(marks, marks[1:], strict=False))
    assert world.seconds < 6.0 + 2 * block
    assert "partial" in policy.header["labels"]
    reasons = [row.reason for row in policy.table if row.state == "not_visited"]
    assert reasons
    assert all("budget ended" in reason for reason in reasons)
    jsonschema.validate(json.loads(policy.dumps()), dict(policy_schema()))


def test_no_budget_at_all_still_gives_a_policy(tmp_path):
    policy = run(tmp_path, World(), small_plan(budget_s=1e-9))
    assert {row.state for row in policy.table} == {"not_visited"}
    assert policy.lookup(2, 512).is_off


def test_progress_is_told_before_and_after_each_block(tmp_path):
    told = []
    policy = run(tmp_path, World(), small_plan(budget_s=500.0), report=told.append)
    blocks = [p for p in told if p.stage != "cell"]
    for before, after in zip(blocks[::2], blocks[1::2], strict=True):
        assert (before.config, before.block, before.status) == (after.config, after.block, None)
        assert after.status == "ok"
    assert [p.stage for p in told if p.stage == "cell"] == ["cell", "cell"]
    last = [p for p in told if p.stage == "cell"][-1]
    assert (last.done, last.total, last.status) == (2, 2, "tuned")
    assert {row.config for row in policy.table} == {p.best for p in told if p.stage == "cell"}
    assert all(0 <= p.eta_s <= 500 and p.elapsed_s >= 0 for p in told)
    assert any(p.stage == "duel" for p in told)
    assert max(p.speedup for p in told) > 1


def stop_after(calls):
    def on_call(world):
        if world.num_calls == calls:
            raise KeyboardInterrupt

    return on_call


@pytest.mark.parametrize("calls", [1, 2, 7, 20, 44])
def test_an_interrupt_loses_at_most_the_running_block_and_resume_completes(tmp_path, monkeypatch, calls):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = run(whole, World(), small_plan())
    stopped = World(on_call=stop_after(calls))
    partial = run(cut, stopped, small_plan())
    assert "interrupted" in partial.header["labels"]
    assert any("interrupted" in row.reason for row in partial.table)
    before = identifiers(cut)
    done = [m for m in Database(cut / "db", IDENTITY, "tiny") if m.design.pair_of]
    assert len(done) >= (calls - 4) // 4 - 3, "every finished block is there"
    assert stopped.closed == stopped.num_calls - 1
    world = World()
    resumed = run(cut, world, small_plan())
    assert before <= identifiers(cut) == identifiers(whole)
    assert [row.to_dict() for row in resumed.table] == [row.to_dict() for row in expected.table]
    measured = sum(count for (_, config), count in world.calls.items() if config != "off")
    assert measured < sum(2 + 1 for m in Database(cut / "db", IDENTITY, "tiny") if m.design.pair_of and m not in done) + 6
    assert verify(cut / "runs" / "run" / "policy.json", cut / "db" / "TEST_CPU_2t") == ()


def test_a_stop_is_obeyed_between_blocks(tmp_path):
    world = World()
    policy = run(tmp_path, world, small_plan(), stop=lambda: world.num_calls >= 30)
    assert 30 <= world.num_calls <= 40
    assert "interrupted" in policy.header["labels"]


def test_finished_work_is_not_measured_again(tmp_path):
    first = run(tmp_path, World(), small_plan())
    before = identifiers(tmp_path)
    same_run = World()
    assert run(tmp_path, same_run, small_plan()).table == first.table
    assert same_run.num_calls == 0
    new_run = World()
    run(tmp_path, new_run, small_plan(), name="another")
    assert {config for _, config in new_run.calls} == {"off"}, "recorded blocks serve another run of the same experiment"
    assert identifiers(tmp_path) == before


def kill(*_):
    raise SystemExit("killed")


@pytest.mark.parametrize("place", ["report", "tell", "set_user_attr"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_kill_between_append_and_tell_loses_and_doubles_nothing(tmp_path, monkeypatch, place, count):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, World(), small_plan())
    owner = optuna.Study if place == "tell" else optuna.Trial
    real, left = getattr(owner, place), [count]

    def dying(*args, **kwargs):
        left[0] -= 1
        return kill() if left[0] == 0 else real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, dying)
        with pytest.raises(SystemExit):
            run(cut, World(), small_plan())
    before = identifiers(cut)
    assert before
    run(cut, World(), small_plan())
    assert before <= identifiers(cut) == identifiers(whole)
    assert keys(cut) == sorted(set(keys(cut)))
    study = optuna.load_study(study_name="cell/2x512", storage=open_journal(cut / "runs" / "run" / "journal.log"))
    states = [trial.state.name for trial in study.trials]
    assert "RUNNING" not in states
    assert states.count("FAIL") == 1


def test_a_journal_cut_in_the_middle_of_a_line_is_still_read(tmp_path):
    run(tmp_path, World(on_call=stop_after(20)), small_plan())
    journal = tmp_path / "runs" / "run" / "journal.log"
    with journal.open("a") as stream:
        stream.write('{"op_code": 4, "worker')
    policy = run(tmp_path, World(), small_plan())
    assert {row.state for row in policy.table} == {"tuned"}


TUNER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from world import World, run, small_plan
run(Path({root!r}), World(noise=0.02, seed={seed}), small_plan(), name="run{seed}", seed={seed})
"""


def test_two_tuners_on_one_database_lose_no_line(tmp_path):
    path = [str(Path(__file__).parent), *sys.path]
    code = [TUNER.format(path=path, root=str(tmp_path), seed=seed) for seed in (1, 2)]
    running = [subprocess.Popen([sys.executable, "-c", text]) for text in code]
    assert [process.wait() for process in running] == [0, 0]
    db = Database(tmp_path / "db", IDENTITY, "tiny")
    assert not db.skipped
    by_run = {name: [m for m in db if m.run.startswith(name)] for name in ("run1", "run2")}
    for name, records in by_run.items():
        raw = {path.name.split(".")[0] for path in (tmp_path / "runs" / name / "raw").iterdir()}
        assert raw == {m.id for m in records if m.design.pair_of}
        assert verify(tmp_path / "runs" / name / "policy.json", db.folder) == ()
    assert sum(map(len, by_run.values())) == len(db)


def test_one_run_folder_belongs_to_one_tuner_and_one_plan(tmp_path):
    world = World()
    inner = []

    def report(progress):
        if not inner:
            inner.append(True)
            with pytest.raises(DatabaseError, match="another tuner is running in this run folder"):
                run(tmp_path, World(), small_plan())

    run(tmp_path, world, small_plan(), report=report)
    assert inner
    with pytest.raises(PlanChanged, match=r"another plan \(cells, configs differ\).*recorded measurements are used again"):
        run(tmp_path, World(), small_plan(lengths=(512,)))
    (tmp_path / "runs" / "run" / "plan.json").write_text("{")
    with pytest.raises(PlanChanged, match="is not the JSON of a tuning run"):
        run(tmp_path, World(), small_plan())


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_finished_block(tmp_path, monkeypatch):
    db = Database(tmp_path / "db", IDENTITY, "tiny")
    world, real, left = World(), os.fsync, [12]

    def fsync(handle):
        target = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else ""
        if "/db/" in target:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DatabaseError, match="No space left on device; [12] finished measurements are kept") as caught:
            run(tmp_path, world, small_plan(), database=db)
    kept = caught.value.measurements
    assert kept
    assert not {m.id for m in kept} & identifiers(tmp_path)
    run(tmp_path, World(), small_plan(), database=db)
    assert {m.id for m in kept} <= identifiers(tmp_path)


def test_a_read_only_database_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    world = World()
    real = os.open

    def refuse(path, *rest, **named):
        if "/db/" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DatabaseError, match="Read-only file system"):
        run(tmp_path, world, small_plan())
    assert world.num_calls == 0


def test_an_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DatabaseError, match="cannot be used: (Not a directory|File exists).*writable run folder"):
        run(tmp_path, World(), small_plan())


def test_another_model_does_not_use_these_records(tmp_path):
    run(tmp_path, World(), small_plan())
    other = Identity(IDENTITY.device, {**IDENTITY.base, "target": "e" * 12}, IDENTITY.drafters)
    world = World()
    db = Database(tmp_path / "db", other, "tiny")
    policy = tune(small_plan(), world, other, db, run_dir=tmp_path / "runs" / "other", workload="prose", clock=world.clock)
    assert world.num_calls > 40
    assert policy.mismatch(IDENTITY)
    assert policy.mismatch(other) is None
