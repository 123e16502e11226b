"""One tuning run: parts, search, duel and fill of every cell, by one worker or several. Only this process writes.

Not known here: engine, view, and what the policy will be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from ..records import Cell, SpecConfig
from .assemble import CellEvidence, State, choose_portfolio
from .compose import compose
from .crew import Crew, Ending
from .db import Database, Measurement
from .duel import finalist, verdict
from .folder import RunFolder
from .grid import Plan, starting_points, with_trees
from .progress import Progress, Report
from .runner import FAILURES, BlockRunner, Setting
from .search import CellSearch, Trial, open_journal
from .sentinel import KIND as SENTINEL
from .watch import MachineShifted, Watch
from .workers import Executor

if TYPE_CHECKING:
    import optuna

MAX_NEIGHBOURS = 3  # winners of other cells that a search starts from


class Tuner:
    """states  of the cells that are finished, or need not begin"""

    def __init__(
        self, plan: Plan, executor: Executor, database: Database, setting: Setting, folder: RunFolder, report: Report,
        ending: Ending,
    ) -> None:
        self._plan, self._executor, self._database, self._set = plan, executor, database, setting
        self.runner = BlockRunner(executor, database, setting)
        self._folder, self._report_to, self._ending = folder, report, ending
        self._storage: optuna.storages.BaseStorage = open_journal(folder.path / "journal.log")
        self.states: dict[Cell, State] = {cell: ("infeasible", reason) for cell, reason in plan.infeasible.items()}
        self.states |= folder.finished
        self._crew = Crew(executor, plan, ending, self.states)
        self._watch = Watch(self.runner, executor.names, plan.cells, setting.clock, self._reopen)
        self._is_last_stage = plan.shard.count == 1 or self._is_everything_tuned()
        self._leaders: dict[Cell, tuple[SpecConfig, float]] = {}
        self._race_s: dict[Cell, float] = {}
        self._race_blocks: dict[Cell, int] = {}

    def run(self) -> None:
        """Visit the cells, then measure the winners of some in the others, and visit again what a sentinel has re-opened."""
        self._gauge()
        while True:
            self._crew.each_worker(self._visit_cells)
            self._crew.assign_rest()
            if self._is_last_stage:
                self._crew.each_worker(partial(self._fill, [SpecConfig.parse(config) for config in self._portfolio()[1:]]))
            self._crew.each_worker(self._close)
            if not self._crew.waiting or self._ending.is_over():
                return

    def _is_everything_tuned(self) -> bool:
        """Whether this call began with all cells finished, those of other shards as far as they can run included."""
        there = {m.cell for m in self._database.standing() if m.config == "off" and m.status == "ok" and self.runner.is_ours(m)}
        others = {cell for cell, reason in self._plan.siblings.items() if not reason}
        return all(cell in self.states for cell in self._plan.cells) and others <= there

    def _gauge(self) -> None:
        """Where several workers measure: what their being busy all at once costs each of them."""
        if len(self._executor.names) == 1:
            return
        cells = self._crew.first_cells()
        ready: set[int] = set()

        def prepare(worker: int) -> None:
            if worker in cells and not self._ending.is_over():
                self._race_s[cells[worker]] = self._plan.protocol.race_seconds(self._share())
                if self.runner.prepare(cells[worker], self._race_s[cells[worker]]).status == "ok":
                    ready.add(worker)

        self._crew.each_worker(prepare)
        if len(ready) < 2 or self._ending.is_over():
            return
        with self._executor.turn:
            alone = {worker: self._watch.alone(cells[worker], self._race_s[cells[worker]]) for worker in sorted(ready)}

        def together(worker: int) -> None:
            if worker in ready:
                self._watch.together(worker, cells[worker], self._race_s[cells[worker]], alone[worker])

        self._crew.each_worker(together)

    def _visit_cells(self, worker: int) -> None:
        self._watch.active.add(worker)
        while (cell := self._crew.next(worker)) is not None:
            try:
                self._visit(cell)
            except MachineShifted as shifted:
                self._crew.again([cell])
                self._tell_reopened([cell], shifted)
            self._executor.turn.notify_all()
        self._watch.active.discard(worker)

    def _close(self, worker: int) -> None:
        """The last look at the machine; what it re-opens waits again."""
        if not self._ending.interrupted:
            try:
                self._watch.close(worker)
            except MachineShifted as shifted:
                self._tell_reopened(self._crew.waiting[:1], shifted)

    def _reopen(self, worker: int, since: Measurement, seconds: float) -> bool:
        """Take back every cell that was measured since this sentinel, if there is time to measure as long again."""
        if self._ending.is_over() or self._ending.left() < seconds:
            return False
        cells = {m.cell for m in self._database if m.env.get(SENTINEL) == since.id}
        cells &= {cell for cell in self._plan.cells if self._executor.is_free_for(cell, worker)}
        for cell in cells:
            self.states.pop(cell, None)
            self._folder.reopen(cell)
        self._crew.again(cells)
        return True

    def _tell_reopened(self, cells: Sequence[Cell], shifted: MachineShifted) -> None:
        for cell in cells:
            self._leaders[cell] = SpecConfig.off(), 0.0
            self._report(cell, str(shifted), "cell", 0, None, "reopened")

    def _share(self) -> float:
        """Seconds that the next cell may take."""
        return self._plan.share_s(max(self._ending.left() - self._plan.fill_s, 0.0), len(self._crew.waiting) + 1)

    def _visit(self, cell: Cell) -> None:
        share = self._share()
        protocol, begun = self._plan.protocol, self._set.clock()
        self._race_s[cell] = protocol.race_seconds(share)
        plain = self.runner.prepare(cell, self._race_s[cell])
        if plain.status != "ok":
            self._finish(cell, ("infeasible", plain.reason))
            return
        if plain.id in self.runner.fresh:
            self._watch.begin(self._executor.home(cell), cell, self._race_s[cell], plain)
        self._probe(cell, share)
        block_s = protocol.block_seconds(self._race_s[cell], plain.summary["step_s"]["mean"])
        race_share = share - max(share * protocol.duel_share, protocol.duel_blocks * block_s)
        probed_s = self._plan.probe.seconds(share) if self._plan.probe is not None else 0.0
        self._race_blocks[cell] = protocol.race_blocks_within(race_share - probed_s, block_s)
        search = self._search(cell, begun + race_share)
        self._finish(cell, self._decide(cell, search, protocol.duel_seconds(share)))

    def _probe(self, cell: Cell, share_s: float) -> None:
        """Measure the cell's parts within their share, and remember what they promise; once, also in a resumed run."""
        seconds = self._plan.probe.seconds(share_s) if self._plan.probe is not None else 0.0
        if not seconds or self._plan.probe is None or cell in self._folder.proposed:
            return
        runs = (SpecConfig.off(), *self._plan.probe.runs(self._plan.configs[cell], cell))
        until = self._set.clock() + seconds
        for config, scored_s in zip(runs, self._plan.probe.shares(runs, seconds), strict=True):
            if self._ending.is_over() or self._set.clock() >= until:
                break
            self._look(cell, config, "verify", 0)
            self._report(cell, str(config), "probe", 0, None)
            record = self.runner.probe(cell, config, scored_s)
            self._report(cell, str(config), "probe", 0, record)
        if not self._ending.interrupted:
            later = {c for c in self._plan.cells if c != cell} - set(self._plan.before(cell))  # perhaps being measured now
            later |= set(self._plan.siblings)
            found = compose(cell, [m for m in self._database.standing() if self.runner.is_ours(m) and m.cell not in later])
            self._folder.propose(cell, [proposal.config for proposal in found.proposals] if found else [])

    def _search(self, cell: Cell, until: float) -> CellSearch:
        """Race the starting points, then others until the time is used, the trials are, or nothing is left to try."""
        composed = self._folder.proposed.get(cell, ())
        nearest, starts = self._neighbours(cell), self._starts(cell)
        first, *others = [*nearest, *starts]
        # the nearest winner sets the mark for the guesses; a cell counts as tuned once all starting points were raced
        priors = (first, *composed[:2], *starts, *composed[2:], *others)
        configs = with_trees(self._plan.configs[cell], (*composed, *nearest), cell)
        search = CellSearch(
            self._storage, cell, configs, priors, self._set.seed, self._plan.protocol, self._num_reopenings(cell)
        )
        self._leaders[cell] = search.best
        while not self._ending.is_over():
            is_spent = self._set.clock() >= until or search.num_known >= self._plan.protocol.max_trials
            if is_spent and search.has_tried(self._starts(cell)):
                break
            trial = search.ask()
            if trial is None:
                break
            self._race(cell, trial)
            self._leaders[cell] = search.best
        return search

    def _starts(self, cell: Cell) -> tuple[SpecConfig, ...]:
        return starting_points(self._plan.configs[cell], cell)

    def _race(self, cell: Cell, trial: Trial) -> None:
        for index in range(self._race_blocks[cell]):
            if index and self._ending.is_over():
                break
            record = self._block(cell, trial.config, "race", index, self._race_s[cell])
            if record.status in FAILURES:
                trial.fail(record.status)
                return
            if trial.report(record.summary["log_speedup"]):
                break
        trial.finish()

    def _decide(self, cell: Cell, search: CellSearch, seconds: float) -> State:
        """Duel the best of the race against plain decoding; a cell whose races nobody won is decided without."""
        if self._ending.interrupted or not search.has_tried(self._starts(cell)):
            return "not_visited", f"{self.why_ended()} after {search.num_known} trials"
        found = self._evidence(cell).blocks
        races = {c: blocks for c in search.known if (blocks := found.get(str(c), {}).get("race", ()))}
        while races:
            best = finalist(races, self._winners(self._plan.before(cell)), self._plan.protocol.tie)
            if fmean(block.summary["log_speedup"] for block in races[best]) <= 0:
                break
            status = self._duel(cell, best, seconds)
            if status == "ok":
                break
            if status == "open":
                return "not_visited", f"{self.why_ended()} before {best} was confirmed ({search.num_known} trials)"
            del races[best]
        return "tuned", ""

    def _duel(self, cell: Cell, config: SpecConfig, seconds: float) -> str:
        """Status of the last block: ok, a failure that rules the configuration out, or "open" when the run ended."""
        status = "open"
        for index in range(self._plan.protocol.duel_blocks):
            if self._ending.is_over():
                return "open"
            status = self._block(cell, config, "duel", index, seconds).status
            if status in FAILURES:
                break
        return status

    def _fill(self, portfolio: Sequence[SpecConfig], worker: int) -> None:
        """Winners of some cells measured in the others, so that lookup can interpolate between them; each worker in its own."""
        cells = [cell for cell in self._tuned(self._plan.cells) if self._executor.home(cell) == worker]
        self._watch.active.add(worker)
        try:
            for config in portfolio:
                for cell in cells:
                    self._fill_one(cell, config)
        except MachineShifted as shifted:
            self._tell_reopened(self._crew.waiting[:1], shifted)
        self._watch.active.discard(worker)

    def _fill_one(self, cell: Cell, config: SpecConfig) -> None:
        if self._evidence(cell).estimate(str(config), self._plan.protocol) is not None:
            return
        self._leaders[cell] = self._result(cell)
        for index in range(self._plan.protocol.pilot_blocks):
            if self._ending.is_over():
                return
            if self._block(cell, config, "pilot", index, self._race_seconds(cell)).status in FAILURES:
                return

    def _race_seconds(self, cell: Cell) -> float:
        """Scored seconds of a run of a race; of a cell that an earlier call has finished, the most there may be."""
        return self._race_s.get(cell, self._plan.protocol.race_run_s)

    def _look(self, cell: Cell, config: SpecConfig, kind: str, index: int) -> None:
        """Mind the machine before something is measured; raises MachineShifted."""
        if self.runner.known(cell, config, kind, index) is None:
            self._watch.look(self._executor.home(cell), cell, self._race_seconds(cell))

    def _num_reopenings(self, cell: Cell) -> int:
        """How often this run has taken back measurements of a cell: each time a new study begins, from what stands."""
        gone = {m.reopens for m in self._database if m.reopens}
        mine = (m.env.get(SENTINEL) for m in self._database if m.cell == cell and m.run == self._set.run)
        return len({sentinel for sentinel in mine if sentinel in gone})

    def _block(self, cell: Cell, config: SpecConfig, kind: str, index: int, seconds: float) -> Measurement:
        stage = {"race": "search", "duel": "duel", "pilot": "fill"}[kind]
        self._look(cell, config, kind, index)
        self._report(cell, str(config), stage, index, None)
        record = self.runner.block(cell, config, kind, index, seconds)
        self._report(cell, str(config), stage, index, record)
        return record

    def _finish(self, cell: Cell, state: State) -> None:
        self.states[cell] = state
        if state[0] != "not_visited":
            self._folder.finish(cell, state)
        self._leaders[cell] = self._result(cell)
        self._report(cell, str(self._leaders[cell][0]), "cell", 0, None)

    def _report(
        self, cell: Cell, config: str, stage: str, block: int, record: Measurement | None, status: str | None = None
    ) -> None:
        done, total = sum(c in self.states for c in self._plan.cells), len(self._plan.cells)
        elapsed, left = self._ending.elapsed(), max(self._ending.left(), 0.0)
        eta = min(left, elapsed / done * (total - done) + self._plan.fill_s if done else math.inf)
        best, value = self._leaders.get(cell, (SpecConfig.off(), 0.0))
        log_speedup = record.summary.get("log_speedup") if record else None
        status = record.status if record else status or (self.states[cell][0] if stage == "cell" else None)
        self._report_to(
            Progress(cell, config, stage, done, total, elapsed, eta, str(best), math.exp(value), block, status, log_speedup)
        )

    def _evidence(self, cell: Cell) -> CellEvidence:
        ours = [m for m in self._database.standing() if m.cell == cell or m.kind == SENTINEL]
        return CellEvidence.of(cell, [m for m in ours if self.runner.is_ours(m)])

    def _result(self, cell: Cell) -> tuple[SpecConfig, float]:
        evidence = self._evidence(cell)
        winner = evidence.winner(self._plan.protocol)
        found = verdict(evidence.best(winner, self._plan.protocol)) if winner != "off" else None
        return SpecConfig.parse(winner), found.mean if found else 0.0

    def _portfolio(self) -> tuple[str, ...]:
        """Of all cells, those of other shards included where their records are here."""
        others = [self._evidence(cell) for cell in self._plan.siblings]
        cells = [self._evidence(cell) for cell in self._tuned(self._plan.cells)]
        return choose_portfolio([*cells, *(cell for cell in others if cell.plain)], self._plan.protocol)

    def _tuned(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.states.get(cell, ("", ""))[0] == "tuned"]

    def _winners(self, cells: Sequence[Cell]) -> set[SpecConfig]:
        return {self._result(cell)[0] for cell in self._tuned(cells)}

    def _neighbours(self, cell: Cell) -> tuple[SpecConfig, ...]:
        """Winners of the cells before this one, the nearest cell first."""

        def distance(other: Cell) -> float:
            return abs(math.log2(other.batch / cell.batch)) + abs(math.log2(other.length / cell.length))

        done = sorted(self._tuned(self._plan.before(cell)), key=lambda c: (distance(c), c))
        found = dict.fromkeys(self._result(other)[0] for other in done)
        return tuple(config for config in found if not config.is_off)[:MAX_NEIGHBOURS]

    def why_ended(self) -> str:
        """Why cells are missing."""
        return "interrupted" if self._ending.interrupted else "the budget ended"
