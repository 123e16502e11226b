"""Tune: per cell an Optuna search against plain decoding, a confirming duel, and at the end a policy from the records.

The tuner asks for steps by a function `measure(cell, config)`; the engine, a replay or a synthetic world gives them, in
this process or in workers. Only this process writes. Not known here: engine, view.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .. import machine
from ..policy import Policy, Rules
from ..records import Cell, Identity, SpecConfig
from .assemble import CellEvidence, State, assemble, choose_portfolio, refuse_forced
from .blocks import Clock, Measure
from .compose import compose
from .db import Database, Measurement, read_file
from .duel import finalist, verdict
from .folder import RunFolder
from .grid import Plan, starting_points, with_trees
from .probe import KINDS as PART_KINDS
from .runner import FAILURES, BlockRunner, Setting
from .search import CellSearch, Trial, open_journal, quiet_optuna
from .workers import Executor, Inline

if TYPE_CHECKING:
    import optuna

MAX_NEIGHBOURS = 3  # winners of other cells that a search starts from
POLL_S = 0.2  # between two looks at whether the run shall end, while a worker waits for a cell


@dataclass(frozen=True, slots=True)
class Progress:
    """What is going on, reported before and after each block.

    stage    probe (parts of a cell), search, duel, fill, or cell (a cell is finished)
    done     cells finished, of `total`
    best     leader of this cell, or its result, with its speed-up over plain decoding so far (1.0 = `off`)
    block    of this configuration; None of `status` before it is measured
    """

    cell: Cell
    config: str
    stage: str
    done: int
    total: int
    elapsed_s: float
    eta_s: float
    best: str
    speedup: float
    block: int = 0
    status: str | None = None
    log_speedup: float | None = None


Report = Callable[[Progress], None]


def tune(
    plan: Plan,
    measure: Measure | Executor,
    identity: Identity,
    database: Database,
    *,
    run_dir: Path | str,
    workload: str,
    temperature: float = 0.0,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    report: Report = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    allow_forced: bool = False,
    now: Callable[[], str] = machine.now,
) -> Policy:
    """Search every cell of the plan within its budget, record every block, and return the policy (also in `run_dir`).

    measure      (cell, config) -> steps from the end of the prompt; raises UnsupportedConfig or MemoryError where it cannot.
                 Or an executor, whose workers measure cells side by side, as many as the plan has lanes
    run_dir      studies, raw samples, policy.json; called again with the same folder and plan it goes on where it stopped
    stop         asked between blocks; True, or an interrupt, ends the run: what is recorded stays, at most the running block
                 is lost, and the policy says `interrupted`
    allow_forced write a policy although acceptance is forced; else that raises ForcedAcceptance before anything is measured
    raises       DatabaseError where records cannot be written; it carries the finished measurements. WorkerCannotStart
    """
    started = clock()
    refuse_forced([str(identity.base.get("acceptance", ""))], allow_forced)
    database.flush()
    database.check_writable()
    with RunFolder(Path(run_dir), plan, identity, workload, temperature, seed) as folder, quiet_optuna():
        setting = Setting(folder.name, folder.path, identity, workload, temperature, seed, plan.protocol, clock, now)
        executor = measure if isinstance(measure, Executor) else Inline(measure, clock)
        tuner = _Tuner(plan, executor, database, setting, folder, report, stop, started)
        tuner.allow_forced = allow_forced
        try:
            tuner.run()
        except KeyboardInterrupt:
            tuner.interrupted = True
        database.flush()
        policy = tuner.policy()
        policy.save(folder.path / "policy.json")
    return policy


class _Tuner:
    def __init__(
        self, plan: Plan, executor: Executor, database: Database, setting: Setting, folder: RunFolder, report: Report,
        stop: Callable[[], bool], started: float,
    ) -> None:
        self._plan, self._executor, self._database, self._set = plan, executor, database, setting
        self._runner = BlockRunner(executor, database, setting)
        self._folder, self._report_to, self._stop_asked = folder, report, stop
        self._started = started
        self._storage: optuna.storages.BaseStorage = open_journal(folder.path / "journal.log")
        self._states: dict[Cell, State] = {cell: ("infeasible", reason) for cell, reason in plan.infeasible.items()}
        self._states |= folder.finished
        self._leaders: dict[Cell, tuple[SpecConfig, float]] = {}
        self._race_s: dict[Cell, float] = {}
        self._race_blocks: dict[Cell, int] = {}
        self._waiting = [cell for cell in plan.cells if cell not in self._states]
        self.interrupted = False
        self.allow_forced = False

    @property
    def _deadline(self) -> float:
        return self._started + self._plan.budget_s

    def _left(self) -> float:
        return self._deadline - self._set.clock()

    def _is_over(self) -> bool:
        self.interrupted = self.interrupted or self._stop_asked()
        return self.interrupted or self._left() <= 0

    def run(self) -> None:
        """Visit the cells, then measure the winners of some in the others."""
        self._each_worker(self._visit_cells)
        for place, cell in enumerate(self._plan.cells):  # those that an earlier call has finished
            self._executor.assign(cell, place % len(self._executor.names))
        portfolio = [SpecConfig.parse(config) for config in self._portfolio()[1:]]
        self._each_worker(lambda worker: self._fill(worker, portfolio))

    def _each_worker(self, work: Callable[[int], None]) -> None:
        """Do this for every worker: in this thread if there is one, else in a thread per worker, which take turns."""

        def with_turn(worker: int) -> None:
            with self._executor.turn:
                try:
                    work(worker)
                except BaseException:
                    self.interrupted = True  # the others finish their blocks
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
                self.interrupted = True
                wait(jobs)
        for job in jobs:
            job.result()

    def _visit_cells(self, worker: int) -> None:
        while (cell := self._next()) is not None:
            self._executor.assign(cell, worker)
            self._visit(cell)
            self._executor.turn.notify_all()

    def _next(self) -> Cell | None:
        """The next cell, once those that it starts from are finished; None when there is none, or the run ends."""
        while self._waiting and not self._is_over():
            if all(cell in self._states for cell in self._plan.before(self._waiting[0])):
                return self._waiting.pop(0)
            self._executor.turn.wait(POLL_S)
        return None

    def _visit(self, cell: Cell) -> None:
        share = self._plan.share_s(max(self._left() - self._plan.fill_s, 0.0), len(self._waiting) + 1)
        protocol, begun = self._plan.protocol, self._set.clock()
        self._race_s[cell] = protocol.race_seconds(share)
        plain = self._runner.prepare(cell, self._race_s[cell])
        if plain.status != "ok":
            self._finish(cell, ("infeasible", plain.reason))
            return
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
            if self._is_over() or self._set.clock() >= until:
                break
            self._report(cell, str(config), "probe", 0, None)
            record = self._runner.probe(cell, config, scored_s)
            self._report(cell, str(config), "probe", 0, record)
        if not self.interrupted:
            later = {c for c in self._plan.cells if c != cell} - set(self._plan.before(cell))  # perhaps being measured now
            found = compose(cell, [m for m in self._database if self._runner.is_ours(m) and m.cell not in later])
            self._folder.propose(cell, [proposal.config for proposal in found.proposals] if found else [])

    def _search(self, cell: Cell, until: float) -> CellSearch:
        """Race the starting points, then others until the time is used, the trials are, or nothing is left to try."""
        composed = self._folder.proposed.get(cell, ())
        nearest, starts = self._neighbours(cell), self._starts(cell)
        first, *others = [*nearest, *starts]
        # the nearest winner sets the mark for the guesses; a cell counts as tuned once all starting points were raced
        priors = (first, *composed[:2], *starts, *composed[2:], *others)
        configs = with_trees(self._plan.configs[cell], (*composed, *nearest), cell)
        search = CellSearch(self._storage, cell, configs, priors, self._set.seed, self._plan.protocol)
        self._leaders[cell] = search.best
        while not self._is_over():
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
            if index and self._is_over():
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
        if self.interrupted or not search.has_tried(self._starts(cell)):
            return "not_visited", f"{self._why_ended()} after {search.num_known} trials"
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
                return "not_visited", f"{self._why_ended()} before {best} was confirmed ({search.num_known} trials)"
            del races[best]
        return "tuned", ""

    def _duel(self, cell: Cell, config: SpecConfig, seconds: float) -> str:
        """Status of the last block: ok, a failure that rules the configuration out, or "open" when the run ended."""
        status = "open"
        for index in range(self._plan.protocol.duel_blocks):
            if self._is_over():
                return "open"
            status = self._block(cell, config, "duel", index, seconds).status
            if status in FAILURES:
                break
        return status

    def _fill(self, worker: int, portfolio: Sequence[SpecConfig]) -> None:
        """Winners of some cells measured in the others, so that lookup can interpolate between them; each worker in its own."""
        cells = [cell for cell in self._tuned(self._plan.cells) if self._executor.home(cell) == worker]
        for config in portfolio:
            for cell in cells:
                if self._evidence(cell).estimate(str(config), self._plan.protocol) is not None:
                    continue
                self._leaders[cell] = self._result(cell)
                for index in range(self._plan.protocol.pilot_blocks):
                    if self._is_over():
                        return
                    seconds = self._race_s.get(cell, self._plan.protocol.race_run_s)
                    if self._block(cell, config, "pilot", index, seconds).status in FAILURES:
                        break

    def _block(self, cell: Cell, config: SpecConfig, kind: str, index: int, seconds: float) -> Measurement:
        stage = {"race": "search", "duel": "duel", "pilot": "fill"}[kind]
        self._report(cell, str(config), stage, index, None)
        record = self._runner.block(cell, config, kind, index, seconds)
        self._report(cell, str(config), stage, index, record)
        return record

    def _finish(self, cell: Cell, state: State) -> None:
        self._states[cell] = state
        if state[0] != "not_visited":
            self._folder.finish(cell, state)
        self._leaders[cell] = self._result(cell)
        self._report(cell, str(self._leaders[cell][0]), "cell", 0, None)

    def _report(self, cell: Cell, config: str, stage: str, block: int, record: Measurement | None) -> None:
        done, total = sum(c in self._states for c in self._plan.cells), len(self._plan.cells)
        elapsed = self._set.clock() - self._started
        eta = min(max(self._left(), 0.0), elapsed / done * (total - done) + self._plan.fill_s if done else math.inf)
        best, value = self._leaders.get(cell, (SpecConfig.off(), 0.0))
        log_speedup = record.summary.get("log_speedup") if record else None
        status = record.status if record else self._states[cell][0] if stage == "cell" else None
        self._report_to(
            Progress(cell, config, stage, done, total, elapsed, eta, str(best), math.exp(value), block, status, log_speedup)
        )

    def _evidence(self, cell: Cell) -> CellEvidence:
        here = (m for m in self._database if m.cell == cell)
        return CellEvidence.of(cell, [m for m in here if self._runner.is_ours(m)])

    def _result(self, cell: Cell) -> tuple[SpecConfig, float]:
        evidence = self._evidence(cell)
        winner = evidence.winner(self._plan.protocol)
        found = verdict(evidence.best(winner, self._plan.protocol)) if winner != "off" else None
        return SpecConfig.parse(winner), found.mean if found else 0.0

    def _portfolio(self) -> tuple[str, ...]:
        return choose_portfolio([self._evidence(cell) for cell in self._tuned(self._plan.cells)], self._plan.protocol)

    def _tuned(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self._states.get(cell, ("", ""))[0] == "tuned"]

    def _winners(self, cells: Sequence[Cell]) -> set[SpecConfig]:
        return {self._result(cell)[0] for cell in self._tuned(cells)}

    def _neighbours(self, cell: Cell) -> tuple[SpecConfig, ...]:
        """Winners of the cells before this one, the nearest cell first."""

        def distance(other: Cell) -> float:
            return abs(math.log2(other.batch / cell.batch)) + abs(math.log2(other.length / cell.length))

        done = sorted(self._tuned(self._plan.before(cell)), key=lambda c: (distance(c), c))
        found = dict.fromkeys(self._result(other)[0] for other in done)
        return tuple(config for config in found if not config.is_off)[:MAX_NEIGHBOURS]

    def policy(self) -> Policy:
        """The policy from what is on disk."""
        unvisited = "not_visited", f"{self._why_ended()} before this cell"
        states = {cell: self._states.get(cell, unvisited) for cell in self._plan.all_cells}
        contents = {path.name: read_file(path) for path in self._database.paths()}
        evidence = [{"file": name, "sha256": c.sha256, "bytes": c.num_bytes} for name, c in contents.items()]
        records = [record for c in contents.values() for record in c.measurements]
        header = policy_header(self._database, self._set, self._labels(states, records), evidence)
        header |= {"workers": list(self._executor.names)} if self._executor.names != ("main",) else {}
        rules = Rules(min_speedup=self._plan.protocol.min_speedup)
        return assemble(header, rules, states, records, allow_forced=self.allow_forced)

    def _why_ended(self) -> str:
        return "interrupted" if self.interrupted else "the budget ended"

    def _labels(self, states: Mapping[Cell, State], records: list[Measurement]) -> list[str]:
        blocks = (m for m in records if m.kind not in PART_KINDS)  # parts decide nothing
        used = [m for m in blocks if m.status == "ok" and m.cell in states and self._runner.is_ours(m)]
        labels = {label for m in used for label in m.env.get("labels", ())}
        labels |= {"busy"} if any(m.env.get("busy") for m in used) else set()
        labels |= {"partial"} if any(state == "not_visited" for state, _ in states.values()) else set()
        return sorted(labels | ({"interrupted"} if self.interrupted else set()))


def policy_header(
    database: Database, setting: Setting, labels: list[str], evidence: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the numbers of a policy were measured on."""
    from .. import __version__

    identity = setting.identity
    versions = {"specdec_lab": __version__, **{name: str(value) for name, value in identity.warn.items()}}
    return {
        "created": setting.now(), "device": identity.device, "count": identity.base.get("count", 1), "versions": versions,
        "dtype": str(identity.base.get("dtype", "unknown")), "base": identity.base_fingerprint, "target": database.target,
        "drafters": {kind: identity.drafter_fingerprint(kind) for kind in identity.drafters},
        "exact": {"base": dict(identity.base), "drafters": {kind: dict(f) for kind, f in identity.drafters.items()}},
        "workload": setting.workload, "temperature": setting.temperature, "labels": labels, "objective": "tokens_per_s",
        "interval": "95 %: Student's t over paired blocks and the text sampled, in quadrature",
        "run": setting.run, "seed": setting.seed, "protocol": asdict(setting.protocol), "evidence": evidence,
    }  # fmt: skip
