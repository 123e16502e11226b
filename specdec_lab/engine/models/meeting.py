"""Processes that were started together end together, whatever ends the first of them.

They meet at a store (that of torchrun), which answers while this process waits for another in a sum. A thread looks there a few
times per second: once a rank has said that it is done for, the others end with its exit code and without words, and it waits
until they have noticed, so that nothing breaks under them before. A rank that left in order has said how often it met the
others; who waits for it at a later meeting waits in vain, says so and ends. Not known here: models, what is summed.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

FAULT = 1  # exit code where nobody gave one
LOOK_S = 0.2
PATIENCE_S = 5.0  # for others to notice
KIND = ("sum", "order")  # meetings that are counted apart: of devices, and of hosts


def is_started_together(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun, or who sets the same variables, started this process as one of several."""
    has_place = all(name in environment for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return has_place and environment.get("WORLD_SIZE", "1") not in ("", "0", "1")


class Meeting:
    """This process among those that were started with it. Use meeting().

    store  for this object alone: whoever waits at a store keeps others from asking it
    leave  ends the process at once; injected in tests
    """

    def __init__(self, store: Any, rank: int, ranks: int, leave: Callable[[int], object] = os._exit) -> None:
        self.rank, self.ranks = rank, ranks
        self._store, self._exit = store, leave
        self._met = dict.fromkeys(KIND, 0)
        self._has_ended, self._stop = False, threading.Event()
        self._before: list[Callable[[], object]] = []
        self._after: list[Callable[[], object]] = []
        self._watch = threading.Thread(target=self._look_on, name="ranks", daemon=True)

    def start(self) -> Meeting:
        """Look for others that end, and leave in order at exit."""
        self._watch.start()
        atexit.register(self.leave)
        return self

    def met(self, kind: str = "sum") -> None:
        """Call before work that needs all ranks."""
        self._met[kind] += 1

    def before_leaving(self, work: Callable[[], object]) -> None:
        """To be done in order, and only where nothing failed."""
        self._before.append(work)

    def after_leaving(self, work: Callable[[], object]) -> None:
        """To be done once no rank waits for another any more; the last one given is done first."""
        self._after.append(work)

    def end(self, code: int) -> bool:
        """Say that this rank is done for. True for the first that says so: its words are shown, those of others are not."""
        mine = f"{self.rank} {code}"
        said = self._store.compare_set("over", "", mine)
        self._has_ended = True
        return bool(said == mine.encode())

    def leave(self) -> None:
        """At exit. In order: wait until all others leave too. After a failure: wait a little, until they have noticed."""
        self._stop.set()
        self._watch.join()
        try:
            if hasattr(sys, "last_type") and not self._has_ended:
                self.end(FAULT)
            if not self._has_ended:
                self._wait_for_all()
            self._part("noticed" if self._has_ended else "gone")
        except RuntimeError:  # the store is gone, and with it the others: they had all left
            pass
        if not self._has_ended:
            for work in reversed(self._after):
                work()

    def _wait_for_all(self) -> None:
        for work in self._before:
            work()
        self._store.set(f"left{self.rank}", " ".join(str(self._met[kind]) for kind in KIND))
        while not self._has_ended and not self._store.check([f"left{rank}" for rank in range(self.ranks)]):
            self._has_ended = self._store.check(["over"])  # by one that failed meanwhile
            time.sleep(LOOK_S / 4)

    def _part(self, key: str) -> None:
        """Wait a while until all ranks have come to this point; rank 0, whose own the store may be, until they have gone."""
        self._store.add(key, 1)
        self._until(key)
        self._store.add(f"{key} and gone", 1)
        if self.rank == 0:
            self._until(f"{key} and gone")

    def _until(self, key: str) -> None:
        """All ranks counted at a key, or patience is at an end."""
        deadline = time.monotonic() + PATIENCE_S
        while self._store.add(key, 0) < self.ranks and time.monotonic() < deadline:
            time.sleep(LOOK_S / 4)

    def _look_on(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self._look()
            except RuntimeError as error:
                if self._stop.is_set() or self._has_ended:
                    return
                self._say(f"the processes started with rank {self.rank} cannot be reached any more ({error})")
                self._go(FAULT)

    def _look(self) -> None:
        if self._has_ended:
            return
        if self._store.check(["over"]):
            first, _, code = self._store.get("over").decode().partition(" ")
            if int(first) != self.rank:
                self._part("noticed")
                self._go(int(code))
            return
        for rank in (r for r in range(self.ranks) if r != self.rank and self._store.check([f"left{r}"])):
            most = dict(zip(KIND, map(int, self._store.get(f"left{rank}").split()), strict=True))
            if any(self._met[kind] > most[kind] for kind in KIND) and self.end(FAULT):
                self._say(f"rank {rank} ended while rank {self.rank} still waited for it")
                self._part("noticed")
                self._go(FAULT)
                return

    @staticmethod
    def _say(words: str) -> None:
        sys.stderr.write(f"specdec_lab: error: {words}\n")

    def _go(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._exit(code)


@lru_cache(maxsize=1)
def meeting() -> Meeting | None:
    """Of this process, opened when first asked for; None for a process that was started alone."""
    if not is_started_together():
        return None
    from torch.distributed import distributed_c10d
    from torch.distributed.rendezvous import rendezvous

    store, rank, ranks = next(iter(rendezvous("env://")))
    return Meeting(distributed_c10d.PrefixStore("specdec_lab", store), rank, ranks).start()
