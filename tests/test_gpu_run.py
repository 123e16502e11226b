"""The GPU run without a GPU: what is kept and resumed, what is refused, and every stage rehearsed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec_lab.bench.gpu import plan, readiness, run, session, table
from specdec_lab.bench.gpu.context import Context, OutOfTime, Skipped
from specdec_lab.bench.gpu.ledger import (
    AIM,
    CUT,
    FAILED,
    FILE,
    MISS,
    OK,
    PASS,
    RED,
    SKIPPED,
    Ledger,
    Row,
    bar_verdict,
    header_of,
)
from specdec_lab.bench.gpu.readiness import Machine
from specdec_lab.bench.gpu.sizes import TINY
from specdec_lab.cli import main
from specdec_lab.sensors import Absent

CPU = torch.device("cpu")


# What is kept.


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "a" / "gpu.jsonl", "r1", header_of("a", "580.1", {"torch": "2"}))


def test_a_row_says_on_what_it_was_measured_and_comes_back(ledger):
    values = {"plain_s": 0.00123456789, "text": "absent", "endless": float("inf")}
    row = Row("rounds", "8x4096", values, PASS, "bar", ("forced",), ("f",))
    ledger.write("rounds", row)
    (kept,) = ledger.rows()
    assert {"schema", "device", "driver", "versions", "commit", "sources", "created", "run", "stage"} <= kept.keys()
    assert kept["values"] == {"plain_s": 0.00123457, "text": "absent", "endless": "inf"}
    assert Row.from_dict(kept) == replace(row, values=kept["values"])
    assert list(kept["values"]) == list(values)  # the most telling one first, as it was given


def test_every_row_of_a_rehearsal_is_labelled(tmp_path):
    ledger = Ledger(tmp_path / "gpu.jsonl", "r1", {}, (session.REHEARSAL,))
    ledger.write("rounds", Row("rounds", "x", labels=("forced",)))
    ledger.end("rounds", OK, 1.0)
    assert [row["labels"] for row in ledger.rows()] == [["rehearsal", "forced"], ["rehearsal"]]


def test_a_stage_is_done_only_if_it_ended_well_with_these_sources_versions_and_device(ledger):
    ledger.end("kernels", CUT, 1.0)
    assert ledger.last_run_of("kernels") is None
    ledger.end("kernels", OK, 1.0)
    assert ledger.last_run_of("kernels") == "r1"
    for changed in ({"sources": "other"}, {"versions": {}}, {"device": "b"}):
        assert replace(ledger, header={**ledger.header, **changed}).last_run_of("kernels") is None
    assert replace(ledger, header={**ledger.header, "commit": "other"}).last_run_of("kernels") == "r1"


def test_half_a_line_and_lines_of_others_are_passed_over(ledger):
    ledger.end("kernels", OK, 1.0)
    with ledger.path.open("a") as file:
        file.write('{"schema": "else/1"}\n[1]\n{"schema": "specdec')
    ledger.end("rounds", OK, 1.0)
    assert [row["stage"] for row in ledger.rows()] == ["kernels", "rounds"]


def test_a_bar_is_reached_missed_or_even_aimed_at():
    assert [bar_verdict(value, 0.8, 0.9) for value in (0.79, 0.8, 0.9)] == [MISS, PASS, AIM]


# Running.


def stages(**functions):
    """Stages by name, and where their functions are found."""
    return [plan.Stage(name, 60.0, "words") for name in functions], lambda name: functions[name]


def context(ledger, seconds=60.0, **more):
    return Context(CPU, TINY, ledger, seconds, quiet, **more)


def quiet(line):
    """Says nothing."""


def ends(ledger):
    return {row["stage"]: (row["values"]["status"], row.get("reason", "")) for row in ledger.rows() if row["kind"] == "stage"}


def test_a_failing_stage_is_recorded_with_its_reason_and_the_next_one_goes_on(ledger):
    class TheirOwnError(Exception):
        """As of a compiler: none of the usual classes."""

    def bad(context):
        yield Row("before", "it failed")
        raise TheirOwnError("no\n  registers left")

    def good(context):
        yield Row("fine", "here", {"x_s": 1.0})

    def absent(context):
        raise Skipped("nothing to do")
        yield

    given, find = stages(bad=bad, good=good, absent=absent)
    run.run(given, ledger, lambda stage, book, t: run.here(stage, context(book, t), find), minutes=10, say=quiet)
    assert ends(ledger) == {
        "bad": (FAILED, "TheirOwnError: no registers left"), "good": (OK, ""), "absent": (SKIPPED, "nothing to do")
    }
    assert [row["what"] for row in ledger.rows() if row["kind"] != "stage"] == ["it failed", "here"]


def test_a_stage_that_is_out_of_time_keeps_what_it_found_and_is_not_done(ledger):
    moments = iter([0.0, 0.0, 1.0, 1.0, 99.0, 99.0, 99.0, 99.0])

    def slow(context):
        for cell in ("a", "b", "c"):
            context.checkpoint(cell)
            yield Row("cell", cell)

    given, find = stages(slow=slow)
    run.here(given[0], context(ledger, 10.0, now=lambda: next(moments)), find)
    assert ends(ledger)["slow"][0] == CUT
    assert "its 10 s were over before c" in ends(ledger)["slow"][1]
    assert [row["what"] for row in ledger.rows() if row["kind"] == "cell"] == ["a", "b"]
    assert ledger.last_run_of("slow") is None
    with pytest.raises(OutOfTime):
        context(ledger, 0.0).checkpoint("anything")


def test_a_run_resumes_and_again_begins_anew(ledger):
    calls = []

    def stage(context):
        calls.append(1)
        yield Row("x", "y")

    given, find = stages(kernels=stage)

    def go(ledger, **more):
        return run.run(given, ledger, lambda s, book, t: run.here(s, context(book, t), find), minutes=10, say=quiet, **more)

    assert go(ledger) == {"kernels": "r1"}
    assert go(replace(ledger, run="r2")) == {"kernels": "r1"}
    assert go(replace(ledger, run="r3"), again=True) == {"kernels": "r3"}
    assert len(calls) == 2


def test_stages_share_the_minutes_and_what_is_left_when_they_are_over_is_recorded(ledger):
    given, moments, seconds = [plan.Stage(n, 120.0, "words") for n in "abc"], iter([0.0, 0.0, 50.0, 58.0]), []
    run.run(given, ledger, lambda s, book, t: seconds.append(t), minutes=1.0, say=quiet, now=lambda: next(moments))
    assert seconds == [12.0, 10.0]  # a tenth of a run of ten minutes, then what is left
    assert ends(ledger)["c"][0] == SKIPPED
    assert "the 1 minutes of this run are over" in ends(ledger)["c"][1]


def test_a_stage_without_a_module_that_it_needs_is_skipped_by_name(ledger):
    stage = plan.Stage("tune", 1.0, "words", ("no_such_module_here", "json"))
    run.here(stage, context(ledger), lambda name: pytest.fail("it was started"))
    assert ends(ledger)["tune"] == (SKIPPED, "no_such_module_here is not installed in this Python")


def test_a_process_that_dies_or_hangs_is_a_failed_stage_and_one_that_said_its_end_is_not(ledger, tmp_path):
    stage, commands = plan.Stage("kernels", 10.0, "words"), []

    def spawn(how):
        def start(command, check, timeout):
            commands.append((command, timeout))
            if how == "hangs":
                raise subprocess.TimeoutExpired(command, timeout)
            if how == "ends":
                ledger.end("kernels", OK, 2.0)
            return SimpleNamespace(returncode=-11 if how == "dies" else 3 if how == "quits" else 0)

        return start

    run.apart(stage, replace(ledger, run="ok"), 10.0, tmp_path, spawn("nothing"))
    for how in ("dies", "hangs", "quits"):
        run.apart(stage, replace(ledger, run=how), 10.0, tmp_path, spawn(how))
    reasons = {row["run"]: row["reason"] for row in ledger.rows()}
    assert reasons["dies"] == "its process was ended by SIGSEGV"
    assert reasons["hangs"] == "its process still ran after 75 s and was ended"
    assert reasons["quits"] == "its process ended with code 3 before the stage did"
    before = len(list(ledger.rows()))
    run.apart(stage, ledger, 10.0, tmp_path, spawn("ends"))
    assert len(list(ledger.rows())) == before + 1
    command, timeout = commands[0]
    assert command[1:4] == ["-m", "specdec_lab.bench.gpu", "kernels"]
    assert timeout == 75.0


def test_the_process_of_a_stage_reads_the_words_that_it_is_started_with(ledger, tmp_path):
    found = []

    def spawn(command, **_):
        found.append(command)
        return SimpleNamespace(returncode=0)

    run.apart(plan.STAGES[0], ledger, 10.0, tmp_path, spawn)
    done = subprocess.run([*found[0], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--seconds" in done.stdout


def test_stages_have_names_modules_and_functions_and_fit_into_the_minutes():
    assert sum(stage.seconds + plan.STARTS_S for stage in plan.chosen(())) <= 60 * plan.MINUTES
    for stage in plan.STAGES:
        assert callable(run.stage_of(stage.name))
    assert plan.chosen(("rounds", "calibrate")) == tuple(s for s in plan.STAGES if s.name in ("calibrate", "rounds"))
    with pytest.raises(ValueError, match="no stage 'round'; the stages are calibrate"):
        plan.chosen(("round",))


def test_the_table_holds_every_bar_and_a_missed_speed_is_not_red():
    rows = [
        {"kind": "attention", "what": "8x4096", "bar": "87%", "verdict": MISS, "values": {}, "flags": ["KV in L2"]},
        {"kind": "stage", "what": "kernels", "values": {"status": OK, "seconds": 3.0}},
    ]
    words = table.summary({"kernels": rows}, "file")
    assert "kernels      ok" in words
    assert "attention 8x4096  87%  miss     KV in L2" in words
    assert not table.is_red([rows])
    assert table.is_red([[{**rows[0], "verdict": RED}]])
    assert table.is_red([[{"kind": "stage", "what": "x", "values": {"status": FAILED, "seconds": 0.0}}]])
    assert "nothing with a bar" in table.summary({"kernels": rows[1:]}, "file")
    headline = {"kind": "headline", "what": "8x16384", "values": {"speedup": 1.5}, "reason": "self:4+512/chain4"}
    assert "headline 8x16384 | speedup 1.5 | self:4+512/chain4" in table.summary({"headline": [headline, *rows[1:]]}, "file")


def test_numbers_carry_the_unit_that_their_name_ends_in():
    shown = {"x_s": (2.5e-5, "25 us"), "y_bytes_per_s": (4.3e12, "4300 GB/s"), "n": (1200, "1,200"), "ratio": (0.5, "0.5")}
    assert {name: table.quantity(name, value) for name, (value, _) in shown.items()} == {n: w for n, (_, w) in shown.items()}


# The machine.

H200 = Machine("2.11.0+cu130", "13.0", "NVIDIA H200", (9, 0), 150 << 30)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (replace(H200, cuda=None), "needs a CUDA build of torch"),
        (replace(H200, name=None, capability=None), "sees no GPU"),
        (replace(H200, name="Tesla T4", capability=(7, 5)), "Tesla T4 is sm_75; the kernels need sm_80"),
    ],
)
def test_a_machine_that_cannot_says_why_and_what_it_can_do(found, says, tmp_path):
    reason = readiness.why_not(found)
    assert says in reason
    assert "specdec-lab gpu --rehearse" in reason
    with pytest.raises(session.CannotRun, match=says):
        session.measure(tmp_path, plan.STAGES, minutes=1, again=False, say=print, look=lambda: found)
    assert readiness.why_not(H200) is None


def test_what_is_missing_is_said_with_what_it_costs():
    words = list(readiness.notes(lambda name: name == "pynvml", lambda name: False, lambda: Absent("NVML: Driver Not Loaded")))
    assert any(line.startswith("triton is not installed: our GPU kernels cannot run") for line in words)
    assert any("optuna is not installed: the stage tune is skipped" in line for line in words)
    assert any("compute-sanitizer is not on PATH" in line for line in words)
    assert any("NVML says nothing (NVML: Driver Not Loaded)" in line for line in words)
    assert list(readiness.notes(lambda name: True, lambda name: True, lambda: None)) == []


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    return main(["gpu", *words], out=out, err=err), out.getvalue(), err.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_command_ends_with_one_plain_line_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    code, out, err = call()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--rehearse" in err
    assert list(tmp_path.rglob("*")) == []
    assert call("round")[0] == 2


def test_a_rehearsal_is_never_written_into_the_tuning_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuning_db").mkdir()
    code, _, err = call("calibrate", "--rehearse", "--out", "tuning_db")
    assert code == 2
    assert "not written into a tuning database" in err
    assert list((tmp_path / "tuning_db").iterdir()) == []


# Rehearsal.


def test_every_stage_runs_through_with_tiny_shapes_and_leaves_labelled_rows_outside_any_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuning_db").mkdir()
    code, out, err = call("--rehearse", "--out", "rehearsal", "--json", "--minutes", "60")
    told = json.loads(out)
    found = {name: rows[-1]["values"]["status"] for name, rows in told["stages"].items()}
    standard = [stage.name for stage in plan.chosen(())]
    assert found == dict.fromkeys(standard, OK), {n: r[-1].get("reason") for n, r in told["stages"].items()}
    assert "a GPU run of these stages:\nplan, modelled and not measured: " in err
    assert code == 0
    assert not told["is_red"]
    lines = Path(told["path"]).read_text().splitlines()
    assert all("rehearsal" in json.loads(line)["labels"] for line in lines)
    headlines = [row for row in map(json.loads, lines) if row.get("kind") == "headline"]
    assert headlines
    assert all("acceptance: forced alpha 0.8" in row["labels"] for row in headlines)
    assert Path(told["path"]).name == FILE
    assert list((tmp_path / "tuning_db").iterdir()) == []
    assert max(map(len, lines)) < 2500
    assert not [row for row in map(json.loads, lines) if row["kind"] == "failed"]


def test_the_module_of_a_stage_says_no_gpu_in_a_process_of_its_own(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    given = ("--out", str(tmp_path), "--seconds", "5", "--run", "x")
    command = [sys.executable, "-m", "specdec_lab.bench.gpu", "calibrate", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


# As a GPU machine without a network may be: the Python that runs torch has little else.
BARE = """
import sys, importlib.machinery as machinery
absent = {"optuna", "plotly", "ipywidgets", "anywidget", "pynvml", "IPython", "jsonschema", "triton"}
find = machinery.PathFinder.find_spec
class Finder(machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else find(name, path, target)
sys.meta_path[:] = [Finder if f is machinery.PathFinder else f for f in sys.meta_path]
from specdec_lab.cli import main
sys.exit(main(["gpu", "calibrate", "headline", "tune", "trace", "--rehearse", "--json"]))
"""


def test_stages_do_without_what_they_do_not_need_and_the_tuner_says_what_it_misses():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ended = {name: rows[-1] for name, rows in json.loads(done.stdout)["stages"].items()}
    assert ended["tune"]["values"]["status"] == SKIPPED
    assert ended["tune"]["reason"] == "optuna is not installed in this Python"
    assert {row["values"]["status"] for name, row in ended.items() if name != "tune"} == {OK}
