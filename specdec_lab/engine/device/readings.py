"""What the host reads: the log, copied whole every few rounds, and what its numbers mean in seconds.

Times are stamps of the device's own clock, so a round's parts sum to its wall time by construction: the time between two marks
belongs to one phase, attention (intervals inside a forward, layer by layer) is taken out of the forward it sits in, and the gap
to the round before is the host's. Not known here: what a round does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..clocks import Lap, Phase
from .state import ATTENTION, DRAFT_ATTENTION, ENTRY, TIMES

NS = 1e-9


@dataclass(slots=True)
class SyncedNow:
    """Time for a PhaseClock over work that the host starts on a device: the device is waited for first, while `waits`."""

    synchronize: Callable[[], object]
    now: Callable[[], int] = time.perf_counter_ns
    waits: bool = True

    def __call__(self) -> int:
        """Nanoseconds."""
        if self.waits:
            self.synchronize()
        return self.now()


@dataclass(frozen=True, slots=True)
class Reading:
    """One round as the log has it: entries per row, stamps in ns."""

    entries: list[list[int]]
    times: list[int]


class Letter(Protocol):
    """A copy of the log under way."""

    def open(self) -> Tensor:
        """The copy, once it is here: the one place where the host waits for the device."""


class Post(Protocol):
    """Sends the log to the host without stopping the device."""

    def send(self, log: Tensor) -> Letter:
        """Copies the log as it is after all work given to the device so far."""


@dataclass(frozen=True, slots=True)
class _Here:
    log: Tensor

    def open(self) -> Tensor:
        return self.log


class HostPost:
    """For logs that lie in host memory."""

    def send(self, log: Tensor) -> Letter:
        """See Post."""
        return _Here(log.clone())


@dataclass(frozen=True, slots=True)
class _UnderWay:
    log: Tensor
    arrived: Any

    def open(self) -> Tensor:
        self.arrived.synchronize()
        return self.log


class PinnedPost:
    """Asynchronous copies into pinned memory, one buffer per letter that may be under way. cuda: torch.cuda."""

    def __init__(self, log: Tensor, letters: int, cuda: Any) -> None:
        self._cuda, self._next = cuda, 0
        self._buffers = [torch.empty(log.shape, dtype=log.dtype, pin_memory=True) for _ in range(letters)]
        self._events = [cuda.Event() for _ in range(letters)]

    def send(self, log: Tensor) -> Letter:
        """See Post."""
        place, self._next = self._next, (self._next + 1) % len(self._buffers)
        self._buffers[place].copy_(log, non_blocking=True)
        self._events[place].record(self._cuda.current_stream())
        return _UnderWay(self._buffers[place], self._events[place])


def readings(log: Tensor, first: int, count: int) -> list[Reading]:
    """Rounds first .. first + count - 1 of a log [rounds, B * ENTRY + TIMES] on the host, round r in row r % rounds."""
    batch, found = (log.shape[1] - TIMES) // ENTRY, []
    for number in range(first, first + count):
        row = log[number % log.shape[0]]
        found.append(Reading(row[: batch * ENTRY].view(batch, ENTRY).tolist(), row[batch * ENTRY :].tolist()))
    return found


def lap(phases: Sequence[Phase], times: Sequence[int], gap_ns: int, draft_ns: int = 0) -> tuple[Lap, tuple[str, ...]]:
    """Seconds per phase of one round, and what a reader must know of them.

    gap_ns    what the host kept the device waiting before it, or 0
    draft_ns  what the host's clock says of a draft model that caught up before it
    cpu_s is the wall time: the host sleeps through a round, and how long says nothing about how busy it is.
    """
    spent, flags = [0] * len(Phase), []
    for column in range(len(phases) - 1):
        spent[phases[column]] += times[column + 1] - times[column]
    for linear, attention, column in (
        (Phase.DRAFT_LINEAR, Phase.DRAFT_ATTENTION, DRAFT_ATTENTION), (Phase.LINEAR, Phase.ATTENTION, ATTENTION),
    ):  # fmt: skip
        if times[column] > spent[linear]:
            flags.append("attention-above-forward")  # intervals that do not lie in their forward: the stamps are wrong
        inside = min(max(times[column], 0), spent[linear])
        spent[linear] -= inside
        spent[attention] += inside
    spent[Phase.HOST] += max(gap_ns, 0)
    spent[Phase.DRAFT_LINEAR] += draft_ns
    seconds = tuple(ns * NS for ns in spent)
    return Lap(seconds, sum(seconds), sum(seconds)), tuple(dict.fromkeys(flags))


def start_ns(reading: Reading) -> int:
    """The first stamp of a round."""
    return reading.times[0]


def end_ns(reading: Reading, phases: Sequence[Phase]) -> int:
    """The last stamp of a round."""
    return reading.times[len(phases) - 1]
