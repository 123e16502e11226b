"""What a peer is: something that continues fixed prompts greedily, again and again, from the end of the prompts.

Knows records only: neither our engine nor any other.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...records import Cell

Rows = list[list[int]]


class PeerFailed(Exception):
    """A peer that could not do what it said it could; one sentence. What was measured before stays valid."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What one decode gave.

    tokens   new tokens of every row, all of the length that was prepared
    seconds  wall time of exactly these tokens: the KV of every prompt token but the last was there before
    extra    what the peer can tell besides: cpu_s of the thread that drove it, tokens_per_round, floor_s (modelled)
    """

    tokens: Rows
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """One engine in one setting.

    name       group and setting, "transformers/static"; the group of our own configurations is "ours"
    goes_last  whether it is loaded and measured only after all others of a cell, because it disturbs them
    """

    name: str
    goes_last: bool

    def why_not(self, cell: Cell) -> str | None:
        """Why this cell cannot run, in one sentence; None if it can."""

    def settings(self) -> dict[str, Any]:
        """Versions, threads, types, knobs: what the numbers depend on besides the machine."""

    def prepare(self, prompts: Rows, new_tokens: int) -> float:
        """Read the prompts, forgetting earlier ones; the seconds that took. PeerFailed if it cannot."""

    def decode(self) -> Decoded:
        """Continue greedily from the end of the prompts for exactly `new_tokens` per row, end of text ignored."""

    def close(self) -> None:
        """Free what it holds. It may be prepared again."""


class Stopwatch:
    """Wall seconds, and CPU seconds of this thread, of a `with` block."""

    seconds = 0.0
    cpu_s = 0.0

    def __enter__(self) -> Stopwatch:
        self._cpu, self._wall = time.thread_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu_s = time.thread_time() - self._cpu
