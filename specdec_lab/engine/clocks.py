"""Phase timers: time always belongs to exactly one phase, so the parts of a round sum to its wall time.

Knows neither models nor records. The source of time is injected, which makes the sums exact in tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


class Phase(IntEnum):
    """Where a nanosecond of a round may go."""

    HOST = 0
    DRAFT_LINEAR = 1
    DRAFT_ATTENTION = 2
    DRAFT_OTHER = 3  # choosing the drafted token, matching n-grams
    LINEAR = 4
    ATTENTION = 5
    ACCEPT = 6
    COMMIT = 7


@dataclass(frozen=True, slots=True)
class Lap:
    """One round: seconds per phase in the order of Phase, their sum, and CPU seconds of the engine's thread."""

    seconds: tuple[float, ...]
    wall_s: float
    cpu_s: float


class Clock(Protocol):
    """What the loop and the runners tell a timer."""

    def enter(self, phase: Phase) -> None:
        """All time from now on belongs to `phase`."""

    def forward(self, linear: Phase, attention: Phase) -> None:
        """A model forward starts; its parts are booked under these two phases."""

    def attention(self) -> None:
        """The forward enters attention."""

    def linear(self) -> None:
        """The forward leaves attention."""

    def inside(self, ns: int, phase: Phase | None = None) -> None:
        """Of the time since the last mark, `ns` belong to `phase` (None: attention): measured by the kernel."""

    def pause(self) -> None:
        """The consumer of the stream runs now; its time belongs to nobody."""

    def resume(self) -> None:
        """The engine runs again, in phase HOST."""

    def lap(self) -> Lap:
        """The time since the last lap; starts the next one."""


class PhaseClock:
    """Host clock for engines whose calls return when the work is done (CPU)."""

    def __init__(
        self, now: Callable[[], int] = time.perf_counter_ns, cpu_now: Callable[[], int] = time.thread_time_ns
    ) -> None:
        self._now, self._cpu_now = now, cpu_now
        self._spent = [0] * len(Phase)
        self._phase = Phase.HOST
        self._linear, self._attention = Phase.LINEAR, Phase.ATTENTION
        self._since, self._cpu_since, self._cpu_spent = now(), cpu_now(), 0

    def enter(self, phase: Phase) -> None:
        moment = self._now()
        self._spent[self._phase] += moment - self._since
        self._since, self._phase = moment, phase

    def forward(self, linear: Phase, attention: Phase) -> None:
        self._linear, self._attention = linear, attention
        self.enter(linear)

    def attention(self) -> None:
        self.enter(self._attention)

    def linear(self) -> None:
        self.enter(self._linear)

    def inside(self, ns: int, phase: Phase | None = None) -> None:
        # two readings of one clock: the kernel's interval lies inside ours but for their resolution
        part = min(ns, self._now() - self._since)
        self._spent[self._attention if phase is None else phase] += part
        self._since += part

    def pause(self) -> None:
        self.enter(Phase.HOST)
        self._cpu_spent += self._cpu_now() - self._cpu_since

    def resume(self) -> None:
        self._since, self._phase = self._now(), Phase.HOST
        self._cpu_since = self._cpu_now()

    def lap(self) -> Lap:
        self.enter(self._phase)
        cpu = self._cpu_now()
        total, self._cpu_spent, self._cpu_since = self._cpu_spent + cpu - self._cpu_since, 0, cpu
        seconds = tuple(ns * 1e-9 for ns in self._spent)
        self._spent = [0] * len(Phase)
        return Lap(seconds, sum(seconds), total * 1e-9)


class CoarseClock(PhaseClock):
    """Instrumentation off: whole rounds only. Everything is booked under HOST and the run header says so."""

    def forward(self, linear: Phase, attention: Phase) -> None:
        pass

    def attention(self) -> None:
        pass

    def linear(self) -> None:
        pass

    def inside(self, ns: int, phase: Phase | None = None) -> None:
        pass

    def enter(self, phase: Phase) -> None:
        pass

    def pause(self) -> None:
        super().enter(Phase.HOST)
        self._cpu_spent += self._cpu_now() - self._cpu_since

    def lap(self) -> Lap:
        super().enter(Phase.HOST)
        return super().lap()
