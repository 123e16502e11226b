"""What a verb gives: an outcome at once, or a job that takes time and can be watched.

A notebook takes the value, a shell prints the words or the data and takes the exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records import Run, RunHeader
from ..stream import Sink, Stream

if TYPE_CHECKING:
    from ..summary import Comparison

OK, MISTAKE, PARTIAL, NOTHING_WON, INTERRUPTED = 0, 2, 3, 4, 130
RED = 1  # measured, and a check failed: outputs differ, a policy does not belong here


class Words(str):
    """Text that a notebook shows as it is, line by line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True)
class Outcome:
    """value: what a notebook gets; words and data: what a shell prints without and with --json; code: its exit code."""

    value: Any
    words: str
    data: Any
    code: int = OK


@dataclass(frozen=True, slots=True)
class StreamJob:
    """Streams to drain one after the other.

    sinks_for  further readers of each stream; context managers among them are entered and left
    conclude   called once with all finished runs, in a notebook from the draining thread: writes files, says the result
    compare    what may be quoted of the runs; None: all of them
    notices    what is known before the start; a notebook says it then, a shell with the result
    texts      in words what the finished runs generated; None where nobody asked for text
    """

    name: str
    title: str
    streams: Iterable[Stream]
    conclude: Callable[[Sequence[Run]], Outcome]
    sinks_for: Callable[[RunHeader], Sequence[Sink]] = lambda header: ()
    compare: Callable[[Sequence[Run]], tuple[Comparison, ...]] | None = None
    notices: Sequence[str] = ()
    texts: Callable[[Sequence[Run]], list[str]] | None = None
