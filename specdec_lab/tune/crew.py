"""Who works on which cell, and until when. Not known here: what is done in a cell."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

from ..records import Cell
from .blocks import Clock
from .grid import Plan
from .workers import Executor

POLL_S = 0.2  # between two looks at whether the run shall end, while a worker waits for a cell


class Ending:
    """When a run ends: its budget is used, it was interrupted, or somebody asked for it."""

    def __init__(self, started: float, budget_s: float, clock: Clock, stop: Callable[[], bool]) -> None:
        self._started, self._deadline, self._clock, self._stop_asked = started, started + budget_s, clock, stop
        self.interrupted = False

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def left(self) -> float:
        """Seconds of the budget, below 0 when it is used."""
        return self._deadline - self._clock()

    def is_over(self) -> bool:
        """Whether nothing more should be measured."""
        self.interrupted = self.interrupted or self._stop_asked()
        return self.interrupted or self.left() <= 0


class Crew:
    """Deals cells to workers; a cell stays with the worker that began it.

    waiting  cells that nobody has begun, in the plan's order
    """

    def __init__(self, executor: Executor, plan: Plan, ending: Ending, finished: Collection[Cell]) -> None:
        self._executor, self._plan, self._ending, self._finished = executor, plan, ending, finished
        self.waiting = [cell for cell in plan.cells if cell not in finished]
        self._first: dict[int, Cell] = {}

    def each_worker(self, work: Callable[[int], None]) -> None:
        """Do this for every worker: in this thread if there is one, else in a thread per worker, which take turns."""

        def with_turn(worker: int) -> None:
            with self._executor.turn:
                try:
                    work(worker)
                except BaseException:
                    self._ending.interrupted = True  # the others finish their blocks
                    raise
                finally:
                    self._executor.turn.notify_all()

        workers = range(len(self._executor.names))
        if len(workers) == 1:
            with_turn(0)
            return
        with ThreadPoolExecutor(len(workers)) as pool:
            jobs = [pool.submit(with_turn, worker) for worker in workers]
            try:
                wait(jobs)
            except KeyboardInterrupt:
                self._ending.interrupted = True
                wait(jobs)
        for job in jobs:
            job.result()

    def first_cells(self) -> dict[int, Cell]:
        """A cell for every worker to begin with, as far as there are any that need no other."""
        self._first = {}
        for worker in range(len(self._executor.names)):
            if (cell := self._ready(worker)) is not None:
                self._first[worker] = self._begin(worker, cell)
        return dict(self._first)

    def next(self, worker: int) -> Cell | None:
        """The next cell, once those that it starts from are finished; None when there is none, or the run ends."""
        if (cell := self._first.pop(worker, None)) is not None and not self._ending.is_over():
            return cell
        while self.waiting and not self._ending.is_over():
            if (cell := self._ready(worker)) is not None:
                return self._begin(worker, cell)
            self._executor.turn.wait(POLL_S)
        return None

    def again(self, cells: Iterable[Cell]) -> None:
        """These wait once more, for the workers that they have."""
        waiting = {*self.waiting, *cells}
        self.waiting[:] = [cell for cell in self._plan.cells if cell in waiting]

    def assign_rest(self) -> None:
        """A worker for every cell that has none: those that an earlier call has finished."""
        for place, cell in enumerate(self._plan.cells):
            self._executor.assign(cell, place % len(self._executor.names))

    def _ready(self, worker: int) -> Cell | None:
        """The first that waits, that no other worker has begun, and that starts from finished cells."""
        mine = (cell for cell in self.waiting if self._executor.is_free_for(cell, worker))
        return next((cell for cell in mine if all(other in self._finished for other in self._plan.before(cell))), None)

    def _begin(self, worker: int, cell: Cell) -> Cell:
        self.waiting.remove(cell)
        self._executor.assign(cell, worker)
        return cell
