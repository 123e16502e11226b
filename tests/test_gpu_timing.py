"""How a GPU run takes times, without a GPU: guards, NVIDIA's tools, attention calls and models of random weights."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from specdec_lab.bench.gpu import context as context_module
from specdec_lab.bench.gpu import timing, tools
from specdec_lab.bench.gpu.attention_calls import COMPILED, QUICK, Call, Stage, error_of, layer_bytes, others, ours
from specdec_lab.bench.gpu.context import Context
from specdec_lab.bench.gpu.ledger import (
    RED,
    Ledger,
    header_of,
)
from specdec_lab.bench.gpu.models import LABELS, assumed, opened, rounds_of
from specdec_lab.bench.gpu.sizes import FULL, TINY, KernelCell
from specdec_lab.bench.gpu.stages import kernels as kernels_stage
from specdec_lab.bench.gpu.stages import rounds as rounds_stage
from specdec_lab.bench.gpu.stages.calibrate import peak_bytes_per_s
from specdec_lab.bench.gpu.stages.exposed import alias_mask
from specdec_lab.bench.gpu.timing import EventWatch, GraphWatch, HostWatch, Timing, timed_twice
from specdec_lab.bench.kernel_shapes import KernelShape
from specdec_lab.engine.cache import CacheTooLarge
from specdec_lab.engine.loop import Engine
from specdec_lab.engine.models.loading import load
from specdec_lab.engine.models.random_weights import PREFIX, config_of
from specdec_lab.engine.models.runner import shape_of
from specdec_lab.records import Cell, SpecConfig
from specdec_lab.sensors import Absent, Reading

CPU, MB = torch.device("cpu"), 1_000_000


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "a" / "gpu.jsonl", "r1", header_of("a", "580.1", {"torch": "2"}))


def context(ledger, seconds=60.0, **more):
    return Context(CPU, TINY, ledger, seconds, quiet, **more)


def quiet(line):
    """Says nothing."""


# Times.


class Clock:
    """Device time that only launches let pass; events read it, and synchronising is counted."""

    def __init__(self) -> None:
        self.ms, self.waits, self.captured = 0.0, 0, 0

    def event(self):
        clock = self

        class Mark:
            at = float("nan")

            def record(self):
                self.at = clock.ms

            def elapsed_time(self, end):
                return end.at - self.at

        return Mark()

    def synchronize(self):
        self.waits += 1

    def capture(self, work):
        self.captured += 1
        return work


def test_events_time_the_mean_launch_of_every_repeat_after_one_wait():
    clock, turns = Clock(), []

    def launch(turn):
        turns.append(turn)
        clock.ms += 2.0 + turn

    found = EventWatch(clock.event, clock.synchronize)(launch, 3, 4)
    assert found == pytest.approx((3e-3,) * 4)
    assert turns == [0, 1, 2] * (timing.WARM_UP + 4)
    assert clock.waits == 1


def test_a_graph_is_captured_once_per_timing_and_replayed():
    clock, launches = Clock(), []

    def launch(turn):
        launches.append(turn)
        clock.ms += 1.0

    watch = GraphWatch(EventWatch(clock.event, clock.synchronize), clock.capture)
    found = timed_twice(watch, launch, 2, 5)
    assert clock.captured == 2
    assert len(found.first) == len(found.second) == 5
    assert (found.seconds, found.disagreement, found.how) == (1e-3, 0.0, "replays of a graph")


def test_the_host_clock_times_the_mean_of_a_rotation():
    moments = iter([0.0, 6.0, 10.0, 13.0])
    assert HostWatch(lambda: next(moments))(lambda turn: None, 3, 2) == (2.0, 1.0)


def test_a_timing_is_the_median_of_both_times_and_says_how_far_they_lie_apart():
    found = Timing((1.0, 1.0, 9.0), (1.1, 1.1, 1.1), "x")
    assert found.seconds == pytest.approx(1.1)
    assert found.disagreement == pytest.approx(0.1)
    assert found.to_dict()["count"] == 6


class OnGpu(Context):
    """A context that takes times as on a GPU."""

    is_gpu = True


@pytest.fixture
def gpu_clock(monkeypatch):
    """A GPU's clock, and what capturing raises."""
    clock = Clock()
    clock.trouble = None

    def capture(work):
        if clock.trouble is not None:
            raise clock.trouble
        return work

    events = EventWatch(clock.event, clock.synchronize)
    monkeypatch.setattr(context_module, "cuda_watches", lambda: (GraphWatch(events, capture), events))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return clock


def tick(clock):
    def launch(turn):
        clock.ms += 3.0

    return launch


def test_a_gpu_times_in_a_graph_and_what_cannot_be_captured_by_its_launches_which_the_row_says(ledger, gpu_clock):
    found = OnGpu(CPU, TINY, ledger, 60.0)
    assert found.timed(tick(gpu_clock), 2).how == "replays of a graph"
    gpu_clock.trouble = RuntimeError("operation not permitted when stream is capturing")
    timing = found.timed(tick(gpu_clock), 2)
    assert timing.how == "events around launches, cannot be captured in a graph"
    assert (timing.seconds, len(timing.second)) == (pytest.approx(3e-3), TINY.repeats)


def test_running_out_of_memory_is_not_taken_for_a_launch_that_cannot_be_captured(ledger, gpu_clock):
    gpu_clock.trouble = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        OnGpu(CPU, TINY, ledger, 60.0).timed(tick(gpu_clock), 1)


@pytest.mark.parametrize(
    ("read", "holds", "free", "sets"),
    [(10, 10, 1e12, 64), (120 * MB, 120 * MB, 1e12, 2), (4096 * MB, 4096 * MB, 5e9, 1), (100 * MB, 1000 * MB, 2e9, 2)],
)
def test_buffers_rotate_so_that_240_mb_lie_between_two_reads_as_far_as_memory_goes(read, holds, free, sets):
    assert timing.rotation(read, holds, free) == sets
    assert sets == timing.MOST_SETS or sets * read >= timing.ROTATED_BYTES or (sets + 1) * holds > free


def test_buffers_that_do_not_fit_once_are_an_error_with_the_bytes():
    with pytest.raises(MemoryError, match="needs 100 bytes, 99 are free"):
        timing.rotation(50, 100, 99)


def test_faster_than_the_ceiling_is_l2_where_the_kv_fits_and_else_takes_the_number_away():
    assert timing.speed_flags(103, 1.0, 100.0, 50) == ()
    assert timing.speed_flags(104, 1.0, 100.0, 104) == (timing.KV_IN_L2,)
    (flag,) = timing.speed_flags(104, 1.0, 100.0, 103)
    assert flag == "invalid: faster than the read ceiling by 1.04"
    assert timing.speed_flags(104, 1.0, 100.0, None) == (flag,)
    assert not timing.is_valid((flag,))
    assert timing.is_valid((timing.KV_IN_L2,))


NOTHING = Absent("none")
READ = Reading(0.0, NOTHING, NOTHING, 1980, NOTHING, NOTHING, NOTHING, (), NOTHING, NOTHING)


def test_a_clock_that_falls_under_load_and_a_throttle_are_flagged_and_an_idle_clock_is_not():
    idle = replace(READ, sm_mhz=345, clock_events=("gpu idle",))
    assert timing.clock_flags([idle, READ, replace(READ, sm_mhz=1800)]) == ()
    slow = replace(READ, sm_mhz=1500, clock_events=("power cap",))
    assert timing.clock_flags([READ, slow]) == ("clock dropped from 1980 to 1500 MHz", "slowed by power cap")
    assert timing.clock_flags([replace(READ, sm_mhz=NOTHING, clock_events=NOTHING)]) == ()
    assert timing.clock_flags([]) == ()


# NVIDIA's tools.

NCU = '''==PROF== Connected
{"kv_bytes": 2000000000, "backends": []}
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","split_kernel","dram__bytes_read.sum","Gbyte","1.96"
"1","combine_kernel","dram__bytes_read.sum","Mbyte","20.5"
'''


def tool(monkeypatch, *, stdout="", stderr="", code=0, error=None):
    monkeypatch.setattr(tools.shutil, "which", lambda name: f"/opt/{name}")
    commands = []

    def spawn(command, **options):
        commands.append(command)
        if error is not None:
            raise error
        return SimpleNamespace(stdout=stdout, stderr=stderr, returncode=code)

    return spawn, commands


def test_the_profilers_bytes_are_summed_over_all_kernels(monkeypatch):
    spawn, commands = tool(monkeypatch, stdout=NCU)
    found = tools.count_bytes(10, spawn)
    assert (found.read_bytes, found.counted_bytes) == (pytest.approx(1.9805e9), 2_000_000_000)
    assert commands[0][:3] == ["/opt/ncu", "--clock-control", "none"]  # the clocks are left alone
    assert tools.read_bytes_in("nothing") is None


def test_the_memory_checker_is_good_only_with_a_summary_and_code_0(monkeypatch):
    good, _ = tool(monkeypatch, stdout="========= ERROR SUMMARY: 0 errors\n")
    assert tools.sanitize("memcheck", 10, good) == tools.Found(True, "0 errors")
    bad, commands = tool(monkeypatch, stdout="========= ERROR SUMMARY: 3 errors\n", code=tools.ERROR_CODE)
    assert tools.sanitize("memcheck", 10, bad).is_good is False
    assert commands[0][1:5] == ["--tool", "memcheck", "--error-exitcode", "9"]
    broken, _ = tool(monkeypatch, stderr="Device not supported\n", code=1)
    assert tools.sanitize("memcheck", 10, broken) == tools.Found(
        None, "no summary in its output; it ended with code 1: Device not supported"
    )


def test_a_tool_that_is_missing_hangs_or_cannot_start_is_left_out_with_the_reason(monkeypatch):
    slow, _ = tool(monkeypatch, error=subprocess.TimeoutExpired("x", 5))
    assert tools.sanitize("racecheck", 5, slow).words == "compute-sanitizer was not done after 5 s"
    denied, _ = tool(monkeypatch, error=PermissionError(13, "Permission denied"))
    assert "Permission denied" in tools.count_bytes(5, denied).words
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    assert tools.sanitize("memcheck", 5).words == "compute-sanitizer is not on PATH"
    assert tools.count_bytes(5).words == "ncu is not on PATH"


# Attention calls.


@pytest.mark.parametrize("cell", TINY.kernels, ids=str)
def test_everything_that_is_timed_was_compared_with_float64_and_wrong_ones_are_seen(cell):
    board = Stage(cell, 2, torch.float32, CPU)
    theirs = [(False, made) for made in others(board, (*QUICK, *COMPILED))]
    for is_ours, made in [(True, made) for made in ours(board)] + theirs:
        if isinstance(made, Call):
            assert error_of(made, board, is_ours=is_ours) < 4e-6, made.name
            wrong = Call(made.name, lambda turn, made=made: made.launch(turn) * 1.001)
            assert error_of(wrong, board, is_ours=is_ours) > 4e-6
    assert board.cache.kv[0].numel() * 4 == layer_bytes(cell, 4)


def test_bytes_and_flops_of_a_call_are_exact():
    cell = KernelCell(KernelShape.parse("32x32k/8x128g4"), 5)
    board = SimpleNamespace(cell=cell, cache=SimpleNamespace(kv=torch.zeros(1, dtype=torch.bfloat16)), corner=None)
    board.counts = Stage.counts.fget(board)
    assert Stage.kv_bytes.fget(board) == 2 * 2 * 32 * 8 * 128 * (32768 + 5)
    assert Stage.flops.fget(board) == 4 * 32 * 32 * 128 * (5 * 32768 + 15)


def test_a_wrong_kernel_gets_no_speed(ledger, monkeypatch):
    monkeypatch.setattr(kernels_stage, "error_of", lambda *_, **__: 0.5)
    rows = list(kernels_stage.measure(context(ledger), TINY.kernels[0]))
    timed = [row for row in rows if row.kind == "attention"]
    assert timed
    assert all(row.verdict == RED and "median_s" not in row.values for row in timed)


def test_a_cell_that_does_not_fit_is_left_out_with_its_bytes_and_the_largest_batch(ledger):
    class Small(Context):
        free_bytes = 3e9

    cell = KernelCell(KernelShape.parse("32x32k/8x128g4"), 5)
    (row,) = kernels_stage.measure(Small(CPU, FULL, ledger, 60.0), cell)
    assert (row.kind, row.values["needed_bytes"], row.values["largest_batch"]) == ("left out", layer_bytes(cell, 2), 22)


def test_an_aliased_footprint_is_a_power_of_two_well_inside_the_l2():
    for cell in FULL.exposed:
        slots = alias_mask(cell, 2, 60 << 20) + 1
        shape = cell.shape
        footprint = 4 * slots * shape.cell.batch * shape.kv_heads * shape.head_dim
        assert slots & (slots - 1) == 0
        assert (256 << 10) < footprint <= (60 << 20) // 4 < 2 * footprint


def test_the_profilers_attention_is_that_of_the_attention_kernels_alone():
    seen = (("split_kernel", 300.0, 4), ("combine_kernel", 20.0, 6), ("gemm", 5e3, 99), ("list_kernel", 80.0, 2))
    events = [SimpleNamespace(key=key, self_device_time_total=time, count=count) for key, time, count in seen]
    assert rounds_stage.attention_in(events, 2) == pytest.approx(400e-6 / 3)  # six launches of two layers are three forwards
    assert rounds_stage.attention_in(events[2:3], 2) == float("inf")
    from specdec_kernels.tree_attention import gpu_kernels

    assert all(hasattr(gpu_kernels, name) for name in (*rounds_stage.MAIN_KERNELS, rounds_stage.COMBINE_KERNEL))


def test_the_peak_of_the_memory_is_known_only_where_torch_tells_its_clock():
    h200 = SimpleNamespace(memory_clock_rate=3_201_000, memory_bus_width=6144)
    assert peak_bytes_per_s(h200) == pytest.approx(4.917e12, rel=1e-3)
    assert peak_bytes_per_s(SimpleNamespace()) is None


# Models of random weights.


@pytest.fixture(scope="module")
def engine():
    return Engine(load(TINY.models[0].loads, device="cpu", dtype="float32"))


def test_sessions_begin_at_any_length_without_reading_and_every_header_says_so(engine):
    session = assumed(engine, Cell(2, 40), 60)
    made = rounds_of(session, SpecConfig.parse("self:2+14/chain3"), 4)
    assert set(LABELS) <= set(made.header.labels)
    assert made.rounds[0].context_tokens >= (39 + 3, 39 + 3)
    assert all(step.kind == "round" for step in made.steps)
    again = rounds_of(session, SpecConfig.off(), 4)  # from the same point: nothing is read
    assert again.rounds[0].context_tokens == (39 + 3, 39 + 3)


def test_the_models_of_the_run_have_the_shapes_that_their_floors_are_made_with():
    for sizes in (FULL, TINY):
        for model in sizes.models:
            assert shape_of(config_of(model.loads.removeprefix(PREFIX))) == model.shape


def test_what_the_engine_finds_too_large_is_a_row_with_its_reason(engine, monkeypatch):
    def refuse(workload):
        raise CacheTooLarge("needs 9 bytes; 8 are free")

    monkeypatch.setattr(engine, "open", refuse)
    row = opened(engine, Cell(2, 40), 10)
    assert (row.kind, row.what, row.reason) == ("left out", "random:tiny 2x40", "needs 9 bytes; 8 are free")


def test_a_cell_beyond_memory_becomes_the_largest_batch_that_fits(engine, ledger):
    class Small(Context):
        free_bytes = 1.5 * 2048 * (40 + 10 + 512)

    cell, row = rounds_stage.fitting(Small(CPU, TINY, ledger, 60.0), engine, Cell(2, 40), 10)
    assert cell == Cell(1, 40)
    assert (row.kind, row.values["largest_batch"]) == ("left out", 1)
    none, _ = rounds_stage.fitting(Small(CPU, TINY, ledger, 60.0), engine, Cell(2, 4000), 10)
    assert none is None


def test_floors_of_rounds_are_those_of_the_published_limits():
    from specdec_lab.costs import Limits

    floors = rounds_stage.floors_of(FULL.models[1], Limits(4.3e12, 788e12), Cell(32, 16384), FULL.config, "bfloat16")
    assert floors["plain_s"] == pytest.approx(19.47e-3, rel=2e-3)
    assert floors["verify_s"] == pytest.approx(19.48e-3, rel=2e-3)
    assert floors["draft_s"] == pytest.approx(3.99e-3, rel=5e-3)
    assert floors["kv_share"] == pytest.approx(0.82, abs=0.01)
