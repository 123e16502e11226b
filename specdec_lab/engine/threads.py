"""How many threads each kind of forward uses: measured when it first runs, and again when the machine becomes busy.

Small draft steps are often fastest on one thread, long reads on all; and two threads on a machine with other work can take
twenty times as long as one, because each waits for the other at every barrier. Not known here: what a forward computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

REPEATS = 5  # of every candidate
WORTH = 0.97  # more threads must take at most this share of the time of fewer
HOPELESS = 2.0  # so many times the best so far: measured no further
TINY_S = 100e-6  # below this on one thread, more threads only add waiting
SLOW, PATIENCE = 4.0, 3  # so many times as long as when measured, so many times in a row: measure again
KEPT_S = 60.0  # then a choice made on a busy machine is made again, at the start of a run


def candidates(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`."""
    powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return (*powers, most)


@dataclass(slots=True)
class Choice:
    """What was measured for one kind of forward: the count in use, and seconds of every candidate (median)."""

    threads: int
    seconds: dict[int, float]
    made_s: float  # when
    slow: int = 0  # how often in a row it took far longer than measured
    measured: int = 1  # how often it was measured


class Threads:
    """Thread counts by kind of forward, each measured on the forward itself.

    most  at most so many threads; 1 measures nothing
    """

    def __init__(self, most: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.most, self._now = most, now
        self.choices: dict[Hashable, Choice] = {}

    def use(
        self, kind: Hashable, work: Callable[[], object], clock_off: Callable[[], None], clock_on: Callable[[], None]
    ) -> int:
        """Make `kind`'s count torch's, measuring it on `work` first if nothing is known; returns the count.

        work       the forward; it may run many times and leaves no trace
        clock_off  called before and clock_on after measuring: its time belongs to no round
        """
        if self.most == 1:
            return 1
        known = self.choices.get(kind)
        if known is None or known.slow >= PATIENCE:
            clock_off()
            self.choices[kind] = self._measure(work, known)
            clock_on()
        threads = self.choices[kind].threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return threads

    def took(self, kind: Hashable, seconds: float) -> None:
        """A forward of `kind` with the count in use took so long."""
        known = self.choices.get(kind)
        if known is not None:
            known.slow = known.slow + 1 if seconds > SLOW * known.seconds[known.threads] else 0

    def restore(self) -> None:
        """Give torch its threads back; for when a round ends."""
        if torch.get_num_threads() != self.most:
            torch.set_num_threads(self.most)

    def forget_old(self) -> None:
        """Measure again what was measured long ago; for when a run starts."""
        now = self._now()
        self.choices = {kind: c for kind, c in self.choices.items() if now - c.made_s < KEPT_S}

    def _measure(self, work: Callable[[], object], known: Choice | None) -> Choice:
        seconds: dict[int, float] = {}
        for threads in candidates(self.most):
            fewest = min(seconds.values(), default=float("inf"))
            if seconds.get(1, 1.0) < TINY_S:
                break
            seconds[threads] = self._median(work, threads, HOPELESS * fewest)
        best = 1
        for threads in seconds:
            if seconds[threads] <= WORTH * seconds[best]:
                best = threads
        return Choice(best, seconds, self._now(), measured=known.measured + 1 if known else 1)

    def _median(self, work: Callable[[], object], threads: int, give_up_s: float) -> float:
        """Median seconds of some repeats after a warm-up, of fewer where it is hopeless."""
        torch.set_num_threads(threads)
        work()
        taken: list[float] = []
        while len(taken) < REPEATS and (len(taken) < 2 or median(taken) < give_up_s):
            start = self._now()
            work()
            taken.append(self._now() - start)
        return median(taken)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set torch's thread count, which our kernels follow, and put it back."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
