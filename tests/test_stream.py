"""One stream, many readers; whoever drains it closes it, and nothing recorded is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from builders import header, round_step
from specdec_lab.records import Run, StepRecord
from specdec_lab.stream import Stream, record

STEPS = tuple(round_step(index=i) for i in range(5))


class Source:
    """A generator of STEPS that remembers how far it was read and whether it was closed."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.num_read = 0
        self.closed = False
        self.interrupt_at = interrupt_at

    def steps(self) -> Iterator[StepRecord]:
        try:
            for step in STEPS:
                if step.index == self.interrupt_at:
                    raise KeyboardInterrupt
                self.num_read += 1
                yield step
        finally:
            self.closed = True


def test_every_sink_sees_every_step_in_order_and_the_run_holds_them() -> None:
    source, one, two = Source(), list[StepRecord](), list[StepRecord]()
    run = record(Stream(header(), source.steps()), one.append, two.append)
    assert tuple(one) == tuple(two) == run.steps == STEPS
    assert run == Run(header(), STEPS)
    assert source.closed


def test_sinks_see_a_step_before_the_next_one_is_made() -> None:
    source, order = Source(), list[int]()
    record(Stream(header(), source.steps()), lambda step: order.append(source.num_read - step.index))
    assert order == [1] * len(STEPS)


def test_stop_ends_the_run_at_a_step_boundary_and_closes_the_source() -> None:
    source, seen = Source(), list[StepRecord]()
    run = record(Stream(header(), source.steps()), seen.append, stop=lambda: len(seen) == 2)
    assert run == Run(header(), STEPS[:2], interrupted=True)
    assert source.num_read == 2
    assert source.closed


def test_an_interrupt_keeps_what_was_recorded() -> None:
    source = Source(interrupt_at=3)
    run = record(Stream(header(), source.steps()))
    assert run == Run(header(), STEPS[:3], interrupted=True)
    assert source.closed


def test_an_error_in_a_sink_is_not_swallowed_and_closes_the_source() -> None:
    source = Source()

    def full(_: StepRecord) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        record(Stream(header(), source.steps()), full)
    assert source.num_read == 1
    assert source.closed


def test_a_sink_that_cannot_write_is_dropped_with_a_warning_and_the_run_goes_on() -> None:
    source, seen = Source(), []

    def full(step: StepRecord) -> None:
        seen.append(step)
        raise OSError("disk full")

    with pytest.warns(UserWarning, match="disk full. The run goes on without it"):
        run = record(Stream(header(), source.steps()), full)
    assert len(seen) == 1
    assert len(run.steps) > 1
    assert not run.interrupted

def test_leaving_the_with_block_closes_the_source() -> None:
    source = Source()
    with Stream(header(), source.steps()) as stream:
        assert next(stream) == STEPS[0]
        assert not source.closed
    assert source.closed
    assert list(stream) == []


def test_a_stream_over_a_plain_iterator_can_be_closed_too() -> None:
    stream = Stream(header(), iter(STEPS))
    stream.close()
    assert list(stream) == list(STEPS)


def test_tokens_of_a_run_are_joined_row_by_row() -> None:
    steps = (round_step((1, 0)), round_step((0, 2), frozen=[0]))
    assert Run(header(), steps).tokens() == [[0, 1], [0, 0, 1, 2]]
