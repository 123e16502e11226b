"""How a kernel is timed: on the GPU's own clock, over rotated buffers, many times, twice; and when a time must not be quoted.

The source of time is injected, so that all of this is tested without a GPU. Not known here: what is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from ...sensors import Absent, Reading, conditions

ROTATED_BYTES = 240_000_000  # several times any L2: what a call reads has left the cache before its turn comes again
MOST_SETS = 64
REPEATS, WARM_UP = 50, 3
TOO_FAST = 1.03  # times the read ceiling: more cannot come from memory
CLOCK_DROP = 0.9  # lowest over highest clock of a busy GPU
KV_IN_L2 = "KV in L2"
FASTER_THAN_MEMORY = "invalid: faster than the read ceiling"

Launch = Callable[[int], object]


class Event(Protocol):
    """What we use of torch.cuda.Event."""

    def record(self) -> Any:
        """Mark this place of the stream."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to `end`."""


class Watch(Protocol):
    """Times a launch; its argument is the turn, by which buffers are rotated."""

    @property
    def how(self) -> str:
        """In words, for the row."""

    def __call__(self, launch: Launch, turns: int, repeats: int) -> tuple[float, ...]:
        """`repeats` durations in seconds, each the mean over `turns` launches in a row."""


@dataclass(frozen=True, slots=True)
class HostWatch:
    """For work that is done when its call returns."""

    now: Callable[[], float] = time.perf_counter
    how: str = "host clock"

    def __call__(self, launch: Launch, turns: int, repeats: int) -> tuple[float, ...]:
        """See Watch."""
        for turn in range(turns):
            launch(turn)
        found = []
        for _ in range(repeats):
            start = self.now()
            for turn in range(turns):
                launch(turn)
            found.append((self.now() - start) / turns)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class EventWatch:
    """For a GPU: events around the launches, all read after one wait at the end."""

    event: Callable[[], Event]
    synchronize: Callable[[], object]
    how: str = "events around launches"

    def __call__(self, launch: Launch, turns: int, repeats: int) -> tuple[float, ...]:
        """See Watch."""

        def all_turns() -> None:
            for turn in range(turns):
                launch(turn)

        return self.timed(all_turns, turns, repeats)

    def timed(self, work: Callable[[], object], launches: int, repeats: int) -> tuple[float, ...]:
        """Durations of `work`, which makes so many launches, per launch."""
        for _ in range(WARM_UP):
            work()
        marks = [self.event() for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.synchronize()
        return tuple(a.elapsed_time(b) * 1e-3 / launches for a, b in zip(marks, marks[1:], strict=False))


@dataclass(frozen=True, slots=True)
class GraphWatch:
    """For a GPU: the launches of all turns captured once, so that no launch waits for the host.

    capture  work -> a function that replays it
    """

    events: EventWatch
    capture: Callable[[Callable[[], object]], Callable[[], object]]
    how: str = "replays of a graph"

    def __call__(self, launch: Launch, turns: int, repeats: int) -> tuple[float, ...]:
        """See Watch."""

        def all_turns() -> None:
            for turn in range(turns):
                launch(turn)

        all_turns()  # compiles what is to be captured
        self.events.synchronize()
        return self.events.timed(self.capture(all_turns), turns, repeats)


@dataclass(frozen=True, slots=True)
class Timing:
    """The same version timed twice. `seconds` are all repeats of both times; `how` they were taken."""

    first: tuple[float, ...]
    second: tuple[float, ...]
    how: str

    @property
    def seconds(self) -> float:
        """The median of all repeats."""
        return median((*self.first, *self.second))

    @property
    def disagreement(self) -> float:
        """How far the two medians lie apart: a difference between versions below it is noise."""
        a, b = median(self.first), median(self.second)
        return abs(a - b) / min(a, b)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        every = (*self.first, *self.second)
        p05, p95 = (float(value) for value in np.percentile(every, (5, 95)))
        return {
            "median_s": self.seconds, "p05_s": p05, "p95_s": p95, "count": len(every), "disagreement": self.disagreement,
            "timed": self.how,
        }  # fmt: skip


def timed_twice(watch: Watch, launch: Launch, turns: int, repeats: int = REPEATS) -> Timing:
    """Time a version, and then the same version again."""
    first = watch(launch, turns, repeats)
    return Timing(first, watch(launch, turns, repeats), watch.how)


def rotation(read_bytes: int, set_bytes: int, free_bytes: float, most: int = MOST_SETS) -> int:
    """How many sets of buffers take turns, so that `ROTATED_BYTES` are read between two uses of one.

    read_bytes  of a turn; set_bytes  what one set occupies, at least as much; MemoryError if not even one fits
    """
    if set_bytes > free_bytes:
        raise MemoryError(f"one set of buffers needs {set_bytes:,} bytes, {free_bytes:,.0f} are free")
    wanted = min(most, -(-ROTATED_BYTES // read_bytes))
    return max(1, min(wanted, int(free_bytes / set_bytes) if free_bytes < float("inf") else wanted))


def speed_flags(read_bytes: int, seconds: float, read_ceiling: float, l2_bytes: int | None) -> tuple[str, ...]:
    """What must be said of a read of so many bytes in so many seconds.

    More than the ceiling allows came from a cache if it fits into one (a mark), and is otherwise a mistake (invalid).
    """
    if read_bytes / seconds <= TOO_FAST * read_ceiling:
        return ()
    fits = l2_bytes is not None and read_bytes <= l2_bytes
    return (KV_IN_L2,) if fits else (f"{FASTER_THAN_MEMORY} by {read_bytes / seconds / read_ceiling:.2f}",)


def is_valid(flags: Iterable[str]) -> bool:
    """Whether a number with these flags may be quoted."""
    return not any(flag.startswith("invalid") for flag in flags)


def clock_flags(readings: Sequence[Reading]) -> tuple[str, ...]:
    """What the sensors say of a stretch: clocks that fell while the GPU was busy, and reasons that slow it down."""
    busy = [r for r in readings if isinstance(r.clock_events, Absent) or "gpu idle" not in r.clock_events]
    found = conditions(busy)
    flags = []
    if not isinstance(found.sm_mhz, Absent) and found.sm_mhz[0] < CLOCK_DROP * found.sm_mhz[1]:
        flags.append(f"clock dropped from {found.sm_mhz[1]} to {found.sm_mhz[0]} MHz")
    if not isinstance(found.throttle, Absent):
        flags += [f"slowed by {name}" for name in found.throttle]
    return tuple(flags)


def cuda_watches() -> tuple[GraphWatch, EventWatch]:
    """For this process's GPU: by graph, and by launches for what cannot be captured."""
    import torch

    def capture(work: Callable[[], object]) -> Callable[[], object]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own stream current
            raise
        return graph.replay

    events = EventWatch(lambda: torch.cuda.Event(enable_timing=True), torch.cuda.synchronize)
    return GraphWatch(events, capture), events
