"""A CUDA that is not there: streams and graphs that note what is done with them. A replay runs the captured round again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.replays, self.again = cuda, 0, None

    def replay(self) -> None:
        self.replays += 1
        self.again()


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        pass


class FakeCuda:
    """What graphs.py asks of torch.cuda."""

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.pools: list[Any] = []
        self.modes: list[dict[str, str]] = []  # of captures, where they are not the usual
        self.capturing, self.rehearsals = None, 0
        self._default = FakeStream()

    def graph_pool_handle(self) -> object:
        return object()

    def Stream(self) -> FakeStream:
        return FakeStream()

    def current_stream(self) -> FakeStream:
        return self._default

    @contextmanager
    def stream(self, stream):
        yield

    def CUDAGraph(self) -> FakeGraph:
        self.graphs.append(FakeGraph(self))
        return self.graphs[-1]

    @contextmanager
    def graph(self, graph, pool, stream, **mode):
        self.pools.append(pool)
        self.modes.append(mode)
        self.capturing = graph
        yield
        self.capturing = None
