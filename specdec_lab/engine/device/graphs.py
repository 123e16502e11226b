"""Rounds captured as CUDA graphs, one per program, replayed by one call each; or, where there is no CUDA, simply run.

Both are Players: `play()` does one round. `torch.cuda` itself is handed in as the interface to graphs, so that a test can
hand in another. Not known here: what a round does, who reads its results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..clocks import Phase
from .program import Key, Program
from .round import Stage, play

REHEARSALS = 2  # before capture: kernels are compiled, libraries make their workspaces


class Player(Protocol):
    """A round of one program, ready to be played."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Of the stamps of its latest round."""

    def play(self) -> None:
        """One round."""


@dataclass(slots=True)
class Eager:
    """Runs the line of work anew each time."""

    stage: Stage
    program: Program
    phases: tuple[Phase, ...] = ()

    def play(self) -> None:
        """See Player."""
        self.phases = play(self.stage, self.program)


@dataclass(frozen=True, slots=True)
class Captured:
    """Replays a graph. Keeps the program, to whose tensors the graph points."""

    graph: Any
    program: Program
    phases: tuple[Phase, ...]

    def play(self) -> None:
        """See Player."""
        self.graph.replay()


class Players(Protocol):
    """Gives the player of a program. kind: for the run header. capture_s: what making them took so far."""

    kind: str
    capture_s: float

    def of(self, program: Program) -> Player:
        """The player, made when first asked for."""


@dataclass(slots=True)
class EagerPlayers:
    """For machines without CUDA graphs."""

    stage: Stage
    kind: str
    capture_s: float = 0.0

    def of(self, program: Program) -> Player:
        """See Players."""
        return Eager(self.stage, program)


@dataclass(slots=True)
class CapturedPlayers:
    """One graph per program key on the buffers of a session; all graphs share one memory pool.

    Windows, what is listed, lengths, live rows and what was emitted are values in buffers, so no part of the key. A graph of
    one program may reuse the memory of another's temporaries: they are replayed one after the other on one stream, and nothing
    but the buffers of the state, the lists and the caches is carried from round to round.
    """

    stage: Stage
    cuda: Any  # torch.cuda
    kind: str = "one CUDA graph"
    capture_s: float = 0.0
    now: Callable[[], float] = time.perf_counter
    _made: dict[Key, Captured] = field(default_factory=dict)
    _pool: Any = None

    def of(self, program: Program) -> Player:
        """See Players."""
        if program.key not in self._made:
            start = self.now()
            self._made[program.key] = self._capture(program)
            self.capture_s += self.now() - start
        return self._made[program.key]

    def _capture(self, program: Program) -> Captured:
        """Rehearse on a stream of its own, then capture; neither advances a row."""
        if self._pool is None:
            self._pool = self.cuda.graph_pool_handle()
        stream, state = self.cuda.Stream(), self.stage.state
        saved = [buffer.clone() for buffer in state.counters()]
        state.live.zero_()  # a rehearsal finds every row finished: it writes only beyond their texts
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(REHEARSALS):
                play(self.stage, program)
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph, pool=self._pool, stream=stream):
            phases = play(self.stage, program)
        self._restore(saved)
        return Captured(graph, program, phases)

    def _restore(self, saved: list[Tensor]) -> None:
        for buffer, value in zip(self.stage.state.counters(), saved, strict=True):
            buffer.copy_(value)
