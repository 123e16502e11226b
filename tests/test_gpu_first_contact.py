"""The GPU run as it may go at first: cells without memory, kernels that raise, stages that hang; and the plan told before."""

from __future__ import annotations

import gc
import subprocess
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from specdec_lab.bench.gpu import forecast, plan, run
from specdec_lab.bench.gpu.attempts import Attempt, one_by_one, one_of_theirs
from specdec_lab.bench.gpu.context import Context, OutOfTime, Skipped
from specdec_lab.bench.gpu.ledger import FAILED, OK, RED, Ledger, Row, header_of
from specdec_lab.bench.gpu.plan import STARTS_S, Stage
from specdec_lab.bench.gpu.sizes import FULL, TINY
from specdec_lab.bench.gpu.stages import headline as headline_stage
from specdec_lab.bench.gpu.stages import kernels as kernels_stage
from specdec_lab.engine.cache import CacheTooLarge
from specdec_lab.records import Cell

CPU = torch.device("cpu")


def quiet(line):
    """Says nothing."""


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "a" / "gpu.jsonl", "r1", header_of("a", "580.1", {"torch": "2"}))


@pytest.fixture
def context(ledger):
    return Context(CPU, TINY, ledger, 60.0, quiet)


def breaking(error, *rows):
    yield from rows
    raise error


class TheirOwnError(Exception):
    """As of a compiler: none of the usual classes."""


# Cells.


@pytest.mark.parametrize(
    ("error", "kind", "verdict", "reason"),
    [
        (torch.OutOfMemoryError("tried to\n allocate 20 GiB"), "left out", None,
         "out of memory: OutOfMemoryError: tried to allocate 20 GiB"),
        (CacheTooLarge("needs 9 bytes"), "left out", None, "out of memory: needs 9 bytes"),
        (TheirOwnError("no registers left"), "failed", RED, "TheirOwnError: no registers left"),
        (AssertionError(), "failed", RED, "AssertionError"),
    ],
)  # fmt: skip
def test_a_cell_that_breaks_keeps_its_rows_and_says_why(context, error, kind, verdict, reason):
    before = Row("attention", "32x32k")
    rows = list(one_by_one(context, "32x32k", breaking(error, before)))
    assert rows[0] == before
    assert [(row.kind, row.what, row.verdict, row.reason) for row in rows[1:]] == [(kind, "32x32k", verdict, reason)]


def test_a_contestant_that_is_not_ours_and_breaks_makes_nothing_red(context):
    (row,) = one_of_theirs(context, "flex", breaking(TheirOwnError("no registers left")))
    assert (row.kind, row.verdict, row.reason) == ("failed", None, "TheirOwnError: no registers left")
    (row,) = one_of_theirs(context, "flex", breaking(torch.OutOfMemoryError("x")))
    assert row.kind == "left out"


def test_a_cell_that_ends_well_adds_nothing(context):
    rows = [Row("a", "b"), Row("c", "d")]
    assert list(one_by_one(context, "x", iter(rows))) == rows


@pytest.mark.parametrize("error", [OutOfTime("over"), Skipped("absent"), KeyboardInterrupt()])
def test_the_end_of_a_stage_is_not_taken_for_the_end_of_a_cell(context, error):
    with pytest.raises(type(error)):
        list(one_by_one(context, "x", breaking(error)))


def test_what_filled_the_memory_is_free_before_the_next_cell_has_its_turn():
    class Cache:
        """Something large."""

    seen = []

    def fill():
        cache = Cache()
        seen.append(weakref.ref(cache))
        raise torch.OutOfMemoryError("no memory")

    attempt = Attempt()
    with attempt:
        fill()
    gc.collect()
    assert attempt.is_memory
    assert seen[0]() is None


def test_a_broken_device_ends_the_stage_and_not_only_the_cell(context, monkeypatch):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(context, "synchronize", lost)
    inner = one_by_one(context, "cell", breaking(TheirOwnError("x")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(one_by_one(context, "model", inner))


def test_a_kernel_cell_without_memory_does_not_take_the_others_with_it(context, monkeypatch):
    usual, (full, *others) = kernels_stage.measure, TINY.kernels

    def measure(context, cell):
        if cell is full:
            raise torch.OutOfMemoryError("no memory")
        yield from usual(context, cell)

    monkeypatch.setattr(kernels_stage, "measure", measure)
    monkeypatch.setattr(kernels_stage, "COMPILED", ())
    monkeypatch.setattr(kernels_stage, "measure", lambda context, cell: iter(measure(context, cell)))
    rows = list(kernels_stage.stage(context))
    assert [row.what for row in rows if row.kind == "left out"] == [str(full)]
    for cell in others:
        assert any(row.kind == "attention" and row.what.startswith(str(cell)) for row in rows)
    assert any(row.kind == "round kernel" for row in rows)


def test_a_headline_with_a_broken_cell_has_its_row_and_the_picture_of_the_others(context, monkeypatch):
    usual, broken = headline_stage._cell, Cell(2, 24)

    def cell(context, engine, name, at):
        return breaking(TheirOwnError("x")) if at == broken else usual(context, engine, name, at)

    monkeypatch.setattr(headline_stage, "_cell", cell)
    context.folder.mkdir(parents=True)
    rows = list(headline_stage.stage(context))
    assert [row.what for row in rows if row.kind == "failed"] == [f"tiny {broken}"]
    assert len([row for row in rows if row.kind == "headline"]) == 3
    assert (context.folder / headline_stage.FILE).exists()


# Stages.


def test_a_stage_that_hangs_loses_neither_its_rows_nor_the_next_stage(ledger, tmp_path):
    given = [Stage("kernels", 60.0, "words"), Stage("rounds", 60.0, "words")]

    def spawn(command, check, timeout):
        name = command[3]
        ledger.write(name, Row("attention", f"a cell of {name}", {"median_s": 1.0}))
        if name == "kernels":
            raise subprocess.TimeoutExpired(command, timeout)
        ledger.end(name, OK, 1.0)
        return SimpleNamespace(returncode=0)

    runs = run.run(given, ledger, lambda s, book, t: run.apart(s, book, t, tmp_path, spawn), minutes=10, say=quiet)
    ends = {row["stage"]: row["values"]["status"] for row in ledger.rows() if row["kind"] == "stage"}
    assert ends == {"kernels": FAILED, "rounds": OK}
    assert [row["what"] for name in runs for row in ledger.of_run(runs[name], name) if row["kind"] == "attention"] == [
        "a cell of kernels", "a cell of rounds"
    ]


def test_a_process_is_ended_when_the_time_of_the_run_is_over(ledger, tmp_path):
    seen = []

    def spawn(command, check, timeout):
        seen.append((command, timeout))
        return SimpleNamespace(returncode=0)

    stage = Stage("kernels", 60.0, "words")
    run.apart(stage, ledger, 60.0, tmp_path, spawn, at_most=80.0)
    run.apart(stage, ledger, 60.0, tmp_path, spawn, gpt_fast=tmp_path)
    assert [timeout for _, timeout in seen] == [80.0, 150.0]
    assert "--gpt-fast" not in seen[0][0]
    assert seen[1][0][-2:] == ["--gpt-fast", str(tmp_path)]


def test_a_stage_that_was_asked_for_takes_its_time_from_nobody(ledger):
    given, seconds = [Stage("a", 570.0, "words"), Stage("b", 150.0, "words", asks="--b")], {}
    moments = iter([0.0, 0.0, 590.0])
    assert plan.whole_s(given, 10) == 600 + 150 + STARTS_S
    run.run(given, ledger, lambda s, book, t: seconds.update({s.name: t}), minutes=10, say=quiet, now=lambda: next(moments))
    assert seconds == {"a": 570.0, "b": 150.0}


# The plan.


def test_the_plan_fits_by_its_own_model_and_every_figure_says_modelled():
    found = forecast.forecasts(plan.chosen((), ("--gpt-fast",)), plan.MINUTES)
    assert [one.stage.name for one in found if one.is_cut] == []
    assert [one.stage.name for one in found if one.fills] == ["correctness", "tune"]
    head, *lines = forecast.lines(plan.chosen(()), plan.MINUTES)
    assert head.startswith("plan, modelled and not measured")
    assert all("modelled" in line or "samples as long as it may" in line for line in lines)
    assert "the run may take 600 s" in lines[-1]
    assert "may get less" not in lines[-1]


def test_modelled_work_is_that_of_the_published_limit_tables():
    large = FULL.models[1]
    assert forecast.step_s(large, Cell(8, 32768)) == pytest.approx(11.48e-3, rel=2e-3)
    assert forecast.step_s(large, Cell(32, 16384), 5) == pytest.approx(19.48e-3, rel=2e-3)
    drafts = 4 * 3.99e-3
    assert forecast.round_s(large, Cell(32, 16384), FULL.config) == pytest.approx(drafts + 19.48e-3, rel=5e-3)
    window_s = forecast.round_s(large, Cell(32, 1024), FULL.config)
    assert window_s < forecast.round_s(large, Cell(32, 16384), FULL.config)


def test_a_stage_whose_time_would_not_do_is_said_to_be_cut():
    (one,) = forecast.forecasts(plan.chosen(("rounds",)), plan.MINUTES, replace(FULL, rounds=4800))
    assert one.is_cut
    assert str(one).endswith("it would be cut")
    (half,) = forecast.forecasts(plan.chosen(("rounds",)), plan.MINUTES / 10)
    assert half.most_s == pytest.approx(9.0)
    assert half.is_cut


def test_more_stages_than_the_minutes_hold_are_said_to_get_less():
    stages = tuple(replace(stage, seconds=4 * stage.seconds) for stage in plan.chosen(()))
    assert "the last stages may get less" in list(forecast.lines(stages, plan.MINUTES))[-1]


def test_every_stage_is_modelled_or_samples():
    assert set(forecast.WORK) <= set(plan.NAMES)
    assert set(plan.NAMES) - set(forecast.WORK) == {"correctness", "tune"}
