"""One stream, many readers: drain steps into any number of sinks and keep the finished run.

Knows records only. Whoever drains a stream is the only one who closes it; another thread asks by a `stop` flag.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

from .records import Run, RunHeader, StepRecord

Sink = Callable[[StepRecord], None]


class Stream:
    """Steps as they happen, with the header they belong to. An iterator; closing it stops the engine behind it."""

    def __init__(self, header: RunHeader, steps: Iterator[StepRecord]) -> None:
        self.header = header
        self._steps = steps

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> StepRecord:
        return next(self._steps)

    def close(self) -> None:
        """End the stream; what was read stays read."""
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def record(stream: Stream, *sinks: Sink, stop: Callable[[], bool] = lambda: False) -> Run:
    """Drain `stream` into `sinks` and return the finished run.

    An interrupt, or `stop()` returning True at a step boundary, ends the run early: nothing recorded is lost and the
    run is marked interrupted. A sink that cannot write (OSError: disk full, folder gone) is dropped with a warning, and
    the run goes on without it.
    """
    steps: list[StepRecord] = []
    interrupted = False
    readers = list(sinks)
    try:
        for step in stream:
            steps.append(step)
            for sink in tuple(readers):
                try:
                    sink(step)
                except OSError as error:
                    readers.remove(sink)
                    warnings.warn(f"a reader of this run stopped: {error}. The run goes on without it.", stacklevel=2)
            if stop():
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    return Run(stream.header, tuple(steps), interrupted)
