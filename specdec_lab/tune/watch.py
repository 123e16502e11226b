"""One sentinel per worker: when plain decoding is measured again, and what follows where the machine has become another one.

Not known here: which cells are searched again (the tuner says, by `reopen`), what a sentinel means for a policy (sentinel.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from ..records import Cell
from .blocks import Clock, RunSample, summarize_runs
from .db import Measurement
from .runner import BlockRunner
from .sentinel import CROWDED, is_shifted, shift, variation

PERIOD_S = 300.0
LOOKS = 3  # at a machine that seems to have shifted, before that is believed: a burst of other work passes
MAX_REOPENINGS = 3  # per worker; then the machine is taken as it is, and what was measured across a shift is flagged
CROWD_RUNS = 3  # side by side; the middle one has company from start to end


class MachineShifted(Exception):
    """What a worker measured since its last good sentinel is to be measured again."""


class Reopen(Protocol):
    """Asks the tuner to take back what this worker measured since a sentinel; False where no time is left to do it again."""

    def __call__(self, worker: int, since: Measurement, seconds: float) -> bool: ...


@dataclass(slots=True)
class _Post:
    """A worker's sentinel: cell, scored seconds, the last good record and its time, and how often things were re-opened."""

    cell: Cell
    seconds: float
    good: Measurement
    at: float
    reopenings: int = 0


class Watch:
    """Keeps the sentinels of all workers. The caller holds the turn.

    clock  seconds; every PERIOD_S of them the sentinel of a worker is due
    reopen see there
    """

    def __init__(
        self, runner: BlockRunner, names: tuple[str, ...], cells: Collection[Cell], clock: Clock, reopen: Reopen
    ) -> None:
        self._runner, self._names, self._cells, self._clock, self._reopen = runner, names, cells, clock, reopen
        self._posts: dict[int, _Post] = {}
        self._history: dict[int, list[Measurement]] = {}
        self._slowdown = 0.0
        self.active = set(range(len(names)))

    def begin(self, worker: int, cell: Cell, seconds: float, record: Measurement) -> None:
        """Plain decoding that was measured just now is the worker's sentinel from here on, unless it has one."""
        if worker not in self._posts and self._runner.open_sentinel(self._names[worker], self._cells) is None:
            self._good(worker, _Post(cell, seconds, record, self._clock()), record)

    def alone(self, cell: Cell, seconds: float) -> RunSample:
        """Plain decoding while the other workers wait."""
        sample = self._runner.plain(cell, seconds)
        self._runner.record_sentinel(cell, sample, env={"concurrency": 1})
        return sample

    def together(self, worker: int, cell: Cell, seconds: float, alone: RunSample) -> None:
        """The same while the others do the same; the worker's sentinel from here on."""
        sample = self._runner.plain(cell, seconds, CROWD_RUNS)
        slowdown = shift(summarize_runs([sample]), summarize_runs([alone]))
        self._slowdown = max(self._slowdown, slowdown)
        self.begin(worker, cell, seconds, self._runner.record_sentinel(cell, sample, slowdown=slowdown))

    def look(self, worker: int, cell: Cell, seconds: float) -> None:
        """Before anything is measured: begin, or see whether the machine is still the same if that is due.

        raises  MachineShifted
        """
        post = self._posts.get(worker)
        if post is not None:
            if self._clock() - post.at >= PERIOD_S:
                self._judge(worker, post)
            return
        before = self._runner.open_sentinel(self._names[worker], self._cells)
        if before is not None and self._runner.may_measure(before.cell, worker):
            self._judge(worker, _Post(before.cell, seconds, before, -math.inf))  # what that call measured is flagged at most
        else:
            record = self._runner.record_sentinel(cell, self._runner.plain(cell, seconds))
            self._good(worker, _Post(cell, seconds, record, self._clock()), record)

    def close(self, worker: int) -> None:
        """Look a last time, if the last look is nearer to two periods ago than to none; raises MachineShifted."""
        post = self._posts.get(worker)
        if post is not None and self._clock() - post.at >= PERIOD_S / 2:
            self._judge(worker, post)

    def _judge(self, worker: int, post: _Post) -> None:
        if self._slowdown > math.log1p(CROWDED) and len(self.active) < len(self._names):
            return  # with fewer at work it is faster by that much, which says nothing of drift
        sample = self._compare(worker, post)
        last, change = post.good, shift(summarize_runs([sample]), post.good.summary)
        if not self._is_shifted(worker, post, sample):
            self._good(worker, post, self._runner.record_sentinel(post.cell, sample, pair_of=last.id, shift=change))
            return
        words = f"plain decoding of {post.cell} takes {math.exp(change):.3f} times as long as at the last sentinel"
        if post.reopenings < MAX_REOPENINGS and self._reopen(worker, last, self._clock() - post.at):
            post.reopenings += 1
            reason = f"{words}: measured again since then"
            self._runner.record_sentinel(
                post.cell, sample, pair_of=last.id, shift=change, status="throttled", reason=reason
            )  # fmt: skip
            self._good(worker, post, self._runner.record_sentinel(post.cell, sample))
            raise MachineShifted(words)
        reason = f"{words}, and what was measured in between stays"
        record = self._runner.record_sentinel(post.cell, sample, pair_of=last.id, shift=change, is_drift=True, reason=reason)
        self._good(worker, post, record)

    def _compare(self, worker: int, post: _Post) -> RunSample:
        """Of up to LOOKS runs the first that is not shifted, else the one that is least."""
        looks: list[RunSample] = []
        while len(looks) < LOOKS:
            looks.append(self._runner.plain(post.cell, post.seconds))
            if not self._is_shifted(worker, post, looks[-1]):
                return looks[-1]
        return min(looks, key=lambda sample: abs(shift(summarize_runs([sample]), post.good.summary)))

    def _is_shifted(self, worker: int, post: _Post, sample: RunSample) -> bool:
        return is_shifted(summarize_runs([sample]), post.good.summary, variation(self._history.get(worker, ())))

    def _good(self, worker: int, post: _Post, record: Measurement) -> None:
        post.good, post.at = record, self._clock()
        self._posts[worker] = post
        self._history.setdefault(worker, []).append(record)
        self._runner.sentinels[self._names[worker]] = record.id
