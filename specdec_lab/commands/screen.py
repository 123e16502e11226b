"""A terminal while something runs: lines that stay, and one block of text that is renewed in place.

Everything goes to the error stream, so that the output stream holds results only. Where that is no terminal, the
renewed block is not written at all.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from ..records import Run, StepRecord
from ..stream import record
from ..trace import TraceError, TraceWriter
from .outcome import StreamJob

REDRAW_S = 0.5


class Screen:
    """What a shell command shows before its result."""

    def __init__(self, err: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._err, self._clock = err, clock
        self._is_terminal = err.isatty()
        self._num_lines, self._next_draw = 0, 0.0

    def say(self, line: str) -> None:
        """A line that stays."""
        self.wipe()
        self._err.write(f"{line}\n")
        self._err.flush()

    def draw(self, text: Callable[[], str]) -> None:
        """Replace the renewed block, at most twice a second."""
        if not self._is_terminal or self._clock() < self._next_draw:
            return
        self._next_draw = self._clock() + REDRAW_S
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in text().splitlines()][: size.lines - 1]
        self.wipe()
        self._err.write("".join(f"{line}\n" for line in lines))
        self._err.flush()
        self._num_lines = len(lines)

    def wipe(self) -> None:
        """Take the renewed block away."""
        if self._num_lines:
            self._err.write(f"\x1b[{self._num_lines}F\x1b[J")
            self._num_lines = 0


@dataclass(frozen=True, slots=True)
class Drained:
    """All runs that ended; whether an interrupt ended the job, or a trace that could not be written."""

    runs: tuple[Run, ...]
    is_interrupted: bool = False
    error: TraceError | None = None


def drain(job: StreamJob, screen: Screen) -> Drained:
    """Drain a job in this thread; whatever ends it, the runs that ended before are kept."""
    runs: list[Run] = []
    streams = iter(job.streams)
    try:
        for stream in streams:
            with contextlib.ExitStack() as stack:
                sinks = job.sinks_for(stream.header)
                for sink in sinks:
                    if isinstance(sink, contextlib.AbstractContextManager):
                        stack.enter_context(sink)
                runs.append(record(stream, *sinks, _Status(job, runs, screen)))
                for sink in sinks:
                    if isinstance(sink, TraceWriter):
                        sink.close(interrupted=runs[-1].interrupted)
            if runs[-1].interrupted:
                return Drained(tuple(runs), is_interrupted=True)
    except KeyboardInterrupt:  # between two streams, for example while prompts are read
        return Drained(tuple(runs), is_interrupted=True)
    except TraceError as error:
        return Drained(tuple(runs), error=error)
    finally:
        screen.wipe()
        close = getattr(streams, "close", None)
        if close is not None:
            close()
    return Drained(tuple(runs))


class _Status:
    """A sink that shows the table of the finished runs, and where the present one is."""

    def __init__(self, job: StreamJob, runs: Sequence[Run], screen: Screen) -> None:
        self._job, self._screen, self._rounds = job, screen, 0
        self._ended, self._table = tuple(runs), ""

    def __call__(self, step: StepRecord) -> None:
        self._rounds += step.kind == "round"
        self._screen.draw(lambda: self._text(step))

    def _text(self, step: StepRecord) -> str:
        self._table = self._table or _table(self._ended)  # once per stream, and never where there is no terminal
        return f"{self._table}{self._job.title}: {step.config}, round {self._rounds:,}"


def _table(runs: Sequence[Run]) -> str:
    """What is known so far, without the explanations that the final table has below it."""
    from ..summary import compare
    from ..view.tables import render_table

    return render_table(compare(runs)).partition("\n\n")[0] + "\n" if runs else ""
