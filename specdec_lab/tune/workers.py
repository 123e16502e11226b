"""Who measures: this process, or one process per device. A worker gets items of work and gives their runs, nothing else.

One coordinator owns studies, records and every file. It may have a thread per worker; the threads take turns, and one lets
go of its turn only while its worker measures. Not known here: what is worth measuring, what a result means, the engine.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ..records import Cell, SpecConfig, UnsupportedConfig
from .blocks import Clock, Measure, RunSample, run_once
from .grid import Protocol

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

LAST_WORDS = 3  # lines of a dead worker's log that its error quotes


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Runs that belong together, in their order: a block, one run, a warm-up. Pairs are never split across devices."""

    cell: Cell
    configs: tuple[SpecConfig, ...]
    seconds: float  # scored, of each run
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Instrument:
    """What a worker measures with.

    base  fingerprint of target, device and software; workers of other fingerprints measure something else and are refused
    """

    measure: Measure
    base: str
    clock: Clock = time.perf_counter


Recipe = Callable[[str], Instrument]  # from the name of a device; can be pickled, and is called in the worker


@dataclass(frozen=True, slots=True)
class Lease:
    """How long a worker may be silent, in seconds, before it counts as lost.

    first_s  for what has no prediction: to start, to read prompts, to compile
    """

    factor: float = 3.0
    slack_s: float = 30.0
    first_s: float = 900.0

    def seconds(self, predicted_s: float | None) -> float:
        """Of an item that is predicted to take this long; None = nothing is known of it."""
        return self.slack_s + (self.first_s if predicted_s is None else self.factor * predicted_s)


class WorkerLost(Exception):
    """A worker that died (`crashed`) or outstayed its lease (`timeout`); the next item gets a fresh one."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class WorkerCannotStart(RuntimeError):
    """A worker that ended, or was refused, before it could measure anything."""


def measure_item(instrument: Instrument, item: WorkItem) -> tuple[RunSample, ...]:
    """The runs of an item, one after another."""
    measure, clock = instrument.measure, instrument.clock
    return tuple(run_once(measure, item.cell, config, item.seconds, item.protocol, clock) for config in item.configs)


class Executor(ABC):
    """Gives items to workers. A cell stays with the worker it was assigned to: its prompts lie in that one's caches.

    names  of the workers, as records carry them
    turn   held by the thread that acts; `run` lets go of it while a worker measures
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.turn = threading.Condition(threading.Lock())
        self._homes: dict[Cell, int] = {}

    def assign(self, cell: Cell, worker: int) -> None:
        """Let this worker measure the cell from now on, unless it has one already."""
        self._homes.setdefault(cell, worker)

    def is_free_for(self, cell: Cell, worker: int) -> bool:
        """Whether this worker may measure the cell: nobody has it, or this one does."""
        return self._homes.get(cell, worker) == worker

    def home(self, cell: Cell) -> int:
        """The worker of a cell, by its place in `names`."""
        return self._homes[cell]

    def life(self, cell: Cell) -> int:
        """How many processes the worker of a cell has used up; a fresh one knows nothing of what it did before."""
        return 0

    def run(self, item: WorkItem, predicted_s: float | None) -> tuple[RunSample, ...]:
        """The runs of an item. The caller holds the turn, and holds it again afterwards.

        raises  UnsupportedConfig, MemoryError (either: as `measure` does), WorkerLost, WorkerCannotStart
        """
        self.turn.release()
        try:
            return self._run(self.home(item.cell), item, predicted_s)
        finally:
            self.turn.acquire()

    @abstractmethod
    def _run(self, worker: int, item: WorkItem, predicted_s: float | None) -> tuple[RunSample, ...]: ...


class Inline(Executor):
    """One worker: this process. It cannot be lost, so leases do not matter."""

    def __init__(self, measure: Measure, clock: Clock = time.perf_counter) -> None:
        super().__init__(["main"])
        self._instrument = Instrument(measure, "", clock)

    def _run(self, worker: int, item: WorkItem, predicted_s: float | None) -> tuple[RunSample, ...]:
        return measure_item(self._instrument, item)


class Processes(Executor):
    """One process per device, spawned, each with its own instrument; used as a context manager, which ends them.

    base     fingerprint that every worker's instrument must have
    log_dir  here each worker writes what it prints, `<name>.log`
    """

    def __init__(self, recipe: Recipe, devices: Sequence[str], base: str, log_dir: Path, lease: Lease | None = None) -> None:
        if not devices:
            raise ValueError("Processes needs at least one device")
        super().__init__([f"w{i}@{device}" for i, device in enumerate(devices)])
        self._lease = lease or Lease()
        recipe_bytes = pickle.dumps(recipe)
        logs = [log_dir / f"{name.replace(':', '')}.log" for name in self.names]
        self._workers = [_Worker(*each, recipe_bytes, base) for each in zip(self.names, devices, logs, strict=True)]

    def __enter__(self) -> Self:
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.wait_until_ready(self._lease.seconds(None))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.end()

    def life(self, cell: Cell) -> int:
        """How many processes the worker of a cell has used up."""
        return self._workers[self.home(cell)].num_ended

    def pids(self) -> tuple[int | None, ...]:
        """Of the processes; None where a worker waits to be started again."""
        return tuple(worker.pid for worker in self._workers)

    def _run(self, worker: int, item: WorkItem, predicted_s: float | None) -> tuple[RunSample, ...]:
        chosen = self._workers[worker]
        if chosen.pid is None:
            chosen.start()
            chosen.wait_until_ready(self._lease.seconds(None))
        return chosen.ask(item, self._lease.seconds(predicted_s))


def last_words(lines: Sequence[str]) -> str:
    """The last lines that say something, in one."""
    return " | ".join(line.strip() for line in [line for line in lines if line.strip(" ^~")][-LAST_WORDS:])


class _Worker:
    """A process behind a pipe, from the coordinator's side. Whatever goes wrong ends the process: the next one is fresh."""

    def __init__(self, name: str, device: str, log: Path, recipe: bytes, base: str) -> None:
        self._name, self._device, self._log, self._recipe, self._base = name, device, log, recipe, base
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self.num_ended = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        context = get_context("spawn")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._recipe, self._device, str(self._log))
        process = context.Process(target=serve, args=arguments, name=self._name, daemon=True)
        _give_main_a_spec()
        process.start()
        self._process = process
        theirs.close()  # so that its end is seen here as the end of the pipe

    def wait_until_ready(self, seconds: float) -> None:
        try:
            base = self._receive(seconds)
        except WorkerLost as lost:
            raise WorkerCannotStart(
                f"worker {self._name} cannot start: {lost}. Its output is in {self._log}; check the device, or tune without it"
            ) from None
        if base != self._base:
            self.end()
            raise WorkerCannotStart(
                f"worker {self._name} has base fingerprint {base}, the plan was made for {self._base}: their numbers cannot be "
                "pooled. Tune on devices of one kind with one set of software"
            )

    def ask(self, item: WorkItem, seconds: float) -> tuple[RunSample, ...]:
        assert self._pipe is not None
        with suppress(OSError):  # it died between two items: the answer, which will not come, says so
            self._pipe.send(item)
        kind, answer = self._receive(seconds)
        if kind == "infeasible":
            raise UnsupportedConfig(answer)
        if kind == "oom":
            self.end()
            raise MemoryError(answer)
        runs: tuple[RunSample, ...] = answer
        return runs

    def _receive(self, seconds: float) -> Any:
        assert self._pipe is not None
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise WorkerLost("crashed", f"{self._name} {self._obituary()}") from None
        except BaseException:  # an interrupt: its answer would be taken for that to the next question
            self.end()
            raise
        self.end()
        raise WorkerLost("timeout", f"{self._name} gave no answer within its lease of {seconds:.0f} s and was ended")

    def _obituary(self) -> str:
        """How it died, with the last lines that it wrote."""
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        self.end()
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        words = last_words(lines)
        return f"{how}: {words}" if words and code is not None and code >= 0 else how

    def end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.num_ended += 1
        self._pipe = self._process = None


def _give_main_a_spec() -> None:
    """Shells inside another program put a main module in place that lacks `__spec__`, for which spawning asks."""
    main = sys.modules["__main__"]
    if not hasattr(main, "__spec__"):
        main.__spec__ = None


def serve(pipe: Connection, recipe: bytes, device: str, log: str) -> None:
    """The life of a worker: make the instrument, say so, then answer items until the coordinator hangs up.

    Out of memory is its last answer. Any other error ends it with a traceback in its log: a device after an unknown error is
    not trusted with another measurement.
    """
    _write_to(log)
    instrument = pickle.loads(recipe)(device)
    pipe.send(instrument.base)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("runs", measure_item(instrument, item)))
        except UnsupportedConfig as error:
            pipe.send(("infeasible", str(error)))
        except MemoryError as error:
            pipe.send(("oom", str(error)))
            return


def _write_to(log: str) -> None:
    """Send what this process prints to its log, and leave a terminal's interrupt to the coordinator."""
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)
