"""Workers on machines that Ray connects: one actor per worker, with a GPU of its own, or a CPU core.

The same items and answers as between processes. Ray is loaded when the workers start and not before. Ray starts on this
machine unless it is told of a cluster in its own ways (`ray start`, RAY_ADDRESS); specdec_lab must be installed on its nodes.
"""

from __future__ import annotations

import pickle
import re
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..records import UnsupportedConfig
from .blocks import RunSample
from .workers import (
    LAST_WORDS,
    Executor,
    Instrument,
    Lease,
    Recipe,
    WorkerCannotStart,
    WorkerLost,
    WorkItem,
    last_words,
    measure_item,
)

if TYPE_CHECKING:
    from types import ModuleType

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
INSTALL = 'pip install "specdec_lab[ray]"'


class Measurer:
    """What lives in an actor: the instrument, made there. An error that is no answer ends the actor."""

    def __init__(self, recipe: bytes, device: str) -> None:
        self._instrument: Instrument = pickle.loads(recipe)(device)

    def ready(self) -> tuple[str, int]:
        """The base fingerprint, and the id of the process."""
        import os

        return self._instrument.base, os.getpid()

    def measure(self, item: WorkItem) -> tuple[str, Any]:
        """An answer, as a worker process gives it."""
        try:
            return "runs", measure_item(self._instrument, item)
        except UnsupportedConfig as error:
            return "infeasible", str(error)
        except MemoryError as error:
            return "oom", str(error)


class RayActors(Executor):
    """Actors, each with its own instrument; used as a context manager, which ends them.

    base    fingerprint that every worker's instrument must have
    device  that each actor sees: `cuda` with a GPU of its own (Ray hides the others), `cpu` with a core of its own
    """

    def __init__(self, recipe: Recipe, num_workers: int, device: str, base: str, lease: Lease | None = None) -> None:
        if num_workers < 1:
            raise ValueError(f"RayActors needs at least one worker, got {num_workers}")
        super().__init__([f"w{i}@ray:{device}" for i in range(num_workers)])
        self._recipe, self._device, self._base, self._lease = pickle.dumps(recipe), device, base, lease or Lease()
        self._actors: list[Any] = [None] * num_workers
        self._pids: list[int | None] = [None] * num_workers
        self._num_ended = [0] * num_workers
        self._ray: ModuleType = load_ray()
        self._began_ray = False

    def __enter__(self) -> Self:
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, configure_logging=False)
            self._began_ray = True
        try:
            for worker in range(len(self.names)):
                self._start(worker)
            for worker in range(len(self.names)):
                self._wait_until_ready(worker)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all actors, and Ray if it was begun here."""
        for worker in range(len(self.names)):
            self._end(worker)
        if self._began_ray:
            self._ray.shutdown()
            self._began_ray = False

    def life(self, cell: Any) -> int:
        """How many actors the worker of a cell has used up."""
        return self._num_ended[self.home(cell)]

    def pids(self) -> tuple[int | None, ...]:
        """Of the actors' processes, on whatever machine; None where a worker waits to be started again."""
        return tuple(self._pids)

    def _start(self, worker: int) -> None:
        own = {"num_gpus": 1} if self._device == "cuda" else {"num_cpus": 1}
        actor = self._ray.remote(Measurer).options(max_restarts=0, **own)  # a fresh one is made by us, and so counted
        self._actors[worker] = actor.remote(self._recipe, "cuda:0" if self._device == "cuda" else self._device)

    def _wait_until_ready(self, worker: int) -> None:
        name = self.names[worker]
        try:
            base, self._pids[worker] = self._answer(worker, self._actors[worker].ready.remote(), self._lease.seconds(None))
        except WorkerLost as lost:
            raise WorkerCannotStart(
                f"worker {name} cannot start: {lost}. The cluster has {_words(self._ray.cluster_resources())}; a worker needs "
                f"{'a GPU' if self._device == 'cuda' else 'a CPU core'}, and specdec_lab on its node"
            ) from None
        if base != self._base:
            self._end(worker)
            raise WorkerCannotStart(
                f"worker {name} has base fingerprint {base}, the plan was made for {self._base}: their numbers cannot be "
                "pooled. Tune on nodes of one kind with one set of software"
            )

    def _run(self, worker: int, item: WorkItem, predicted_s: float | None) -> tuple[RunSample, ...]:
        if self._actors[worker] is None:
            self._start(worker)
            self._wait_until_ready(worker)
        kind, answer = self._answer(worker, self._actors[worker].measure.remote(item), self._lease.seconds(predicted_s))
        if kind == "infeasible":
            raise UnsupportedConfig(answer)
        if kind == "oom":
            self._end(worker)
            raise MemoryError(answer)
        runs: tuple[RunSample, ...] = answer
        return runs

    def _answer(self, worker: int, promise: Any, seconds: float) -> Any:
        """What an actor answers. Whatever goes wrong ends it: the next one is fresh."""
        errors, name = self._ray.exceptions, self.names[worker]
        try:
            return self._ray.get(promise, timeout=seconds)
        except errors.GetTimeoutError:
            self._end(worker)
            raise WorkerLost("timeout", f"{name} gave no answer within its lease of {seconds:.0f} s and was ended") from None
        except errors.RayTaskError as error:
            self._end(worker)
            raise WorkerLost("crashed", f"{name} ended: {_story(error)}") from None
        except errors.RayActorError as error:  # died, or cannot be reached
            self._end(worker)
            raise WorkerLost("crashed", f"{name} is gone: {_story(error)}") from None
        except BaseException:  # an interrupt: nobody would fetch its answer
            self._end(worker)
            raise

    def _end(self, worker: int) -> None:
        if self._actors[worker] is None:
            return
        self._ray.kill(self._actors[worker], no_restart=True)
        self._actors[worker] = self._pids[worker] = None
        self._num_ended[worker] += 1


def load_ray() -> ModuleType:
    """Ray, or WorkerCannotStart with the command that installs it."""
    try:
        import ray
    except ImportError:
        raise WorkerCannotStart(f"the Ray executor needs Ray, which is not installed here: {INSTALL}") from None
    module: ModuleType = ray
    return module


def _words(resources: dict[str, float]) -> str:
    return f"{resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} CPU cores"


def _story(error: BaseException) -> str:
    """What an actor's error says: the end of its traceback if it has one, else its first lines."""
    text = COLOURS.sub("", str(error)).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    return last_words(lines if '  File "' in text else lines[:LAST_WORDS])
