from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from builders import header, off_step, round_step, run_of
from specdec_lab.records import RunHeader, StepRecord
from specdec_lab.stream import Stream
from specdec_lab.trace import TraceWriter, read_run
from specdec_lab.view import LiveRun, close_all, live_run

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _no_thread_survives_a_test() -> Iterator[None]:
    yield
    close_all()
    assert [t.name for t in threading.enumerate() if t.name.startswith("specdec-")] == []


def finite(*steps: StepRecord, **fields: Any) -> Stream:
    return Stream(header(**fields), iter(steps))


@dataclass
class Gate:
    """An endless stream that hands out a step each time the test asks for one."""

    tickets: Queue[bool] = field(default_factory=Queue)
    taken: Queue[int] = field(default_factory=Queue)
    is_closed: bool = False

    def steps(self) -> Iterator[StepRecord]:
        try:
            index = 0
            while self.tickets.get(timeout=PATIENCE_S):
                yield round_step(index=index)
                index += 1
                self.taken.put(index)  # asked for the next one: the last has been through all sinks
        finally:
            self.is_closed = True

    def stream(self) -> Stream:
        return Stream(header(), self.steps())

    def let(self, count: int) -> None:
        for _ in range(count):
            self.tickets.put(True)

    def await_taken(self, count: int) -> None:
        while self.taken.get(timeout=PATIENCE_S) < count:
            pass


# The handle.


def test_a_run_ends_with_every_step_of_every_stream() -> None:
    live = LiveRun((finite(round_step(index=i), off_step(index=9)) for i in range(3)), title="t").start()
    runs = live.wait(PATIENCE_S)
    assert [len(run.steps) for run in runs] == [2, 2, 2]
    assert live.state == "finished"
    assert not live.is_interrupted


def test_one_stream_needs_no_list() -> None:
    assert len(LiveRun(finite(round_step()), title="t").start().wait(PATIENCE_S)) == 1


def test_the_drawing_never_gets_between_engine_and_record() -> None:
    steps = [round_step(index=i) for i in range(50)]
    (run,) = LiveRun(finite(*steps), title="t").start().wait(PATIENCE_S)
    assert run.steps == tuple(steps)


def test_stop_ends_at_a_step_boundary_keeps_all_data_and_marks_the_run() -> None:
    gate = Gate()
    live = LiveRun(gate.stream(), title="t").start()
    gate.let(3)
    gate.await_taken(2)
    live.stop()
    gate.let(1)
    (run,) = live.wait(PATIENCE_S)
    assert run.interrupted
    assert live.state == "stopped"
    assert 3 <= len(run.steps) <= 4
    assert gate.is_closed


def test_no_stream_is_begun_after_a_stop() -> None:
    gate, begun = Gate(), []

    def streams() -> Iterator[Stream]:
        for number in range(3):
            begun.append(number)
            yield gate.stream()

    live = LiveRun(streams(), title="t").start()
    gate.let(1)
    live.stop()
    gate.let(1)
    live.wait(PATIENCE_S)
    assert begun == [0]


def test_a_paused_run_takes_no_step_until_it_is_resumed() -> None:
    gate = Gate()
    live = LiveRun(gate.stream(), title="t").start()
    live.pause()
    gate.let(4)
    assert live.state == "paused"
    with pytest.raises(TimeoutError, match="has not ended"):
        live.wait(0.01)
    assert live.num_seen <= 1  # the step under way
    live.resume()
    gate.await_taken(3)
    gate.tickets.put(False)
    (run,) = live.wait(PATIENCE_S)
    assert [s.index for s in run.steps] == [0, 1, 2, 3]


def test_a_paused_run_can_be_stopped() -> None:
    gate = Gate()
    live = LiveRun(gate.stream(), title="t").start()
    live.pause()
    gate.let(1)
    live.stop()
    live.pause()  # too late: stopping has begun
    live.wait(PATIENCE_S)
    assert live.state == "stopped"


def test_a_fault_of_the_engine_reaches_whoever_waits_and_its_steps_are_kept() -> None:
    def steps() -> Iterator[StepRecord]:
        yield round_step(index=0)
        yield round_step(index=1)
        raise MemoryError("KV needs 12 GiB, 8 GiB are free")

    live = LiveRun(Stream(header(), steps()), title="t").start()
    with pytest.raises(MemoryError, match="12 GiB"):
        live.wait(PATIENCE_S)
    assert live.state == "failed"
    assert [len(run.steps) for run in live.runs] == [2]
    assert live.runs[0].interrupted
    assert "12 GiB" in live.headline()


def test_a_fault_in_making_the_next_stream_keeps_the_finished_ones() -> None:
    def streams() -> Iterator[Stream]:
        yield finite(round_step())
        raise OSError("disk full")

    live = LiveRun(streams(), title="t").start()
    with pytest.raises(OSError, match="disk full"):
        live.wait(PATIENCE_S)
    assert len(live.runs) == 1


def test_an_interrupt_while_waiting_stops_the_run_and_returns_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    live = LiveRun(gate.stream(), title="t").start()
    gate.let(2)
    gate.await_taken(1)
    real, is_first = live.finished.wait, iter([True])

    def interrupted(timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and next(is_first, False):
            raise KeyboardInterrupt
        gate.tickets.put(True)
        return real(timeout)

    monkeypatch.setattr(live.finished, "wait", interrupted)
    (run,) = live.wait()
    assert run.interrupted
    assert len(run.steps) >= 2


def test_waiting_for_a_run_that_was_never_started_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"never started; call start\(\)"):
        LiveRun(finite(round_step()), title="t").wait()


def test_starting_under_a_name_in_use_closes_the_earlier_run() -> None:
    gate = Gate()
    earlier = LiveRun(gate.stream(), title="t", name="same").start()
    gate.let(1)
    gate.await_taken(0 + 1)
    earlier.stop()
    gate.let(1)
    later = LiveRun(finite(round_step()), title="t", name="same").start()
    assert not earlier.is_alive
    assert earlier.state == "stopped"
    assert live_run("same") is later
    later.wait(PATIENCE_S)


def test_runs_again_and_again_leave_two_threads_at_most() -> None:
    for _ in range(4):
        LiveRun(finite(round_step()), title="t", name="again").start()
        names = [t.name for t in threading.enumerate() if t.name.startswith("specdec-")]
        assert len(names) <= 2
        assert set(names) <= {"specdec-run-again", "specdec-view-again"}


def test_traces_are_written_while_it_runs_and_say_that_they_were_interrupted(tmp_path: Path) -> None:
    gate, path = Gate(), tmp_path / "run.jsonl"

    def sinks(head: RunHeader) -> list[Callable[[StepRecord], None]]:
        return [TraceWriter(path, head)]

    live = LiveRun(gate.stream(), title="t", sinks_for=sinks).start()
    gate.let(2)
    gate.await_taken(2)
    assert len(path.read_text().splitlines()) >= 3  # header and two steps are on disk already
    live.stop()
    gate.let(1)
    (run,) = live.wait(PATIENCE_S)
    assert read_run(path).run == run


def test_done_is_told_once_with_the_finished_runs() -> None:
    told: list[int] = []
    live = LiveRun(
        [finite(round_step()), finite(off_step())], title="t", on_done=lambda live: told.append(live.num_runs)
    ).start()
    live.wait(PATIENCE_S)
    assert told == [2]


def test_the_comparison_is_that_of_the_summary() -> None:
    streams = [
        finite(*(make() for _ in range(3)), config=config, block=block)
        for block in range(2)
        for config, make in (("off", off_step), ("self:4+60/chain3", round_step))
    ]
    live = LiveRun(streams, title="t").start()
    live.wait(PATIENCE_S)
    found = {c.config: c.speedup for c in live.comparison()}
    assert found["off"] is None
    speedup = found["self:4+60/chain3"]
    assert speedup is not None
    assert speedup.num_blocks == 2


# What is shown.


def test_text_and_html_say_what_ran_how_it_stands_and_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_DISPLAY", "static")
    live = LiveRun([finite(off_step(), config="off"), finite(round_step())], title="a title").start()
    live.wait(PATIENCE_S)
    bundle = live._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    for text in bundle.values():
        assert "a title: finished" in text
        assert "self:4+60/chain3" in text
    assert "SPECDEC_DISPLAY=static" in bundle["text/html"]


def test_in_a_terminal_it_is_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_DISPLAY", "text")
    live = LiveRun(finite(round_step()), title="t").start()
    live.wait(PATIENCE_S)
    assert set(live._repr_mimebundle_()) == {"text/plain"}
    with pytest.raises(NotImplementedError):
        live._ipython_display_()
    assert repr(live) == "<LiveRun 'run' finished, 1 runs ended, 1 steps seen>"


def test_saved_and_live_forms_come_from_the_same_finished_runs() -> None:
    live = LiveRun([finite(off_step(), config="off", block=0), finite(round_step(), block=0)], title="t").start()
    runs = live.wait(PATIENCE_S)
    assert [run.header.config for run in runs] == ["off", "self:4+60/chain3"]
    assert runs[1].steps == run_of(round_step()).steps
