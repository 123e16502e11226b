"""One Optuna study per cell: which configuration to race next, and when to stop racing it. Nothing is measured here.

The value of a trial is the mean log speed-up over plain decoding of the same blocks; plain decoding is a trial of value
0. `study.best_value` is the luckiest of many and is never published.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..records import Cell, SpecConfig
from .db import DatabaseError
from .grid import Protocol

if TYPE_CHECKING:
    import optuna

PRUNE_P, PRUNE_BLOCKS = 0.05, 4  # the exact p of n blocks is at least 2^-n, so the fifth block is the first that prunes
MIN_FREEDOM = 5  # residuals, before the spread of blocks is believed
RANDOM_TRIALS = 4  # beyond the starting points, before TPE models anything
KNOWN_IN_A_ROW = 5  # proposals that were measured before, until something new is drawn instead


@dataclass(frozen=True, slots=True)
class _Axis:
    """The configurations of one drafter as two ordered axes: views by the tokens they read, trees by their nodes."""

    members: tuple[SpecConfig, ...]
    views: tuple[str, ...]
    trees: tuple[str, ...]

    @classmethod
    def of(cls, members: Sequence[SpecConfig]) -> _Axis:
        by_reads = sorted(members, key=lambda c: (c.view is not None and (c.view.max_tokens or 1 << 40), str(c.view)))
        by_nodes = sorted(members, key=lambda c: (c.num_nodes, str(c.tree)))
        unique = (tuple(dict.fromkeys(str(c.view) for c in by_reads)), tuple(dict.fromkeys(str(c.tree) for c in by_nodes)))
        return cls(tuple(members), *unique)

    def place(self, config: SpecConfig) -> tuple[int, int]:
        return self.views.index(str(config.view)), self.trees.index(str(config.tree))

    def nearest(self, view: int, tree: int) -> SpecConfig:
        """The member at this place, or the one nearest to it where the candidates leave holes."""

        def distance(config: SpecConfig) -> int:
            there = self.place(config)
            return abs(there[0] - view) + abs(there[1] - tree)

        return min(self.members, key=lambda config: (distance(config), str(config)))


class SearchSpace:
    """Candidates as Optuna parameters: the drafter, then an index of its view and one of its tree."""

    def __init__(self, configs: Sequence[SpecConfig]) -> None:
        kinds = tuple(dict.fromkeys(config.drafter for config in configs))
        self._axes = {kind: _Axis.of([c for c in configs if c.drafter == kind]) for kind in kinds}

    def params(self, config: SpecConfig) -> dict[str, Any]:
        """The parameters that mean this configuration."""
        view, tree = self._axes[config.drafter].place(config)
        return {"drafter": config.drafter, f"{config.drafter}.view": view, f"{config.drafter}.tree": tree}

    def around(self, config: SpecConfig) -> tuple[SpecConfig, ...]:
        """The members one step away: a larger tree or view, a smaller one."""
        axis = self._axes[config.drafter]
        view, tree = axis.place(config)
        places = ((view, tree + 1), (view + 1, tree), (view, tree - 1), (view - 1, tree))
        return tuple(c for place in places for c in axis.members if axis.place(c) == place)

    def suggest(self, trial: optuna.Trial) -> SpecConfig:
        """Let Optuna choose."""
        kind = trial.suggest_categorical("drafter", tuple(self._axes))
        axis = self._axes[kind]
        view = trial.suggest_int(f"{kind}.view", 0, len(axis.views) - 1)
        tree = trial.suggest_int(f"{kind}.tree", 0, len(axis.trees) - 1)
        return axis.nearest(view, tree)


class Trial:
    """A configuration being raced."""

    def __init__(self, search: CellSearch, trial: optuna.Trial, config: SpecConfig) -> None:
        self.config, self._search, self._trial = config, search, trial
        self.values: list[float] = []

    def report(self, value: float) -> bool:
        """Take the log speed-up of the next block; whether the race should end here."""
        self._trial.report(value, step=len(self.values))
        self.values.append(value)
        return self._search.is_lost(self)

    def finish(self) -> None:
        """Close with the mean of the blocks so far."""
        self._search.close(self._trial, self.config, "ok", self.values)

    def fail(self, status: str) -> None:
        """Close without a value."""
        self._search.close(self._trial, self.config, status, [])

    def should_prune(self) -> bool:
        """The pruner's word: significantly worse than the best over the same blocks."""
        return self._trial.should_prune()


class CellSearch:
    """Ask and tell for one cell; a configuration is proposed for measuring once.

    known  per configuration that was closed: its block values, empty if it failed
    """

    def __init__(
        self, storage: optuna.storages.BaseStorage, cell: Cell, configs: Sequence[SpecConfig], priors: Sequence[SpecConfig],
        seed: int, protocol: Protocol, reopenings: int = 0,
    ) -> None:
        """`priors` are raced first, in this order; those that are no candidates here are left out.

        reopenings  how often results were taken back: values that Optuna was told stay, so each time a new study begins
        """
        import optuna

        self._optuna, self._cell, self._seed, self._protocol = optuna, cell, seed, protocol
        self._configs = tuple(configs)
        self._priors = tuple(config for config in dict.fromkeys(priors) if config in set(configs))
        self._space = SearchSpace(configs)
        with _no_experimental_warnings():
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=PRUNE_P, n_startup_steps=PRUNE_BLOCKS)
        self._study = optuna.create_study(
            storage=storage, study_name=study_name(cell, reopenings), direction="maximize", pruner=pruner, load_if_exists=True
        )
        self._fail_stale()
        if not self._study.trials:
            self._add_plain()
        self.known: dict[SpecConfig, list[float]] = {}
        for trial in self._closed():
            values = [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)]
            self.known.setdefault(SpecConfig.parse(trial.user_attrs["config"]), values if trial.value is not None else [])

    @property
    def num_known(self) -> int:
        """Configurations closed, plain decoding not counted."""
        return len(self.known) - 1

    @property
    def best(self) -> tuple[SpecConfig, float]:
        """The leader and its mean log speed-up; plain decoding leads with 0 until something beats it."""
        means = {config: fmean(values) for config, values in self.known.items() if values}
        leader = max(means, key=lambda config: (means[config], str(config)))
        return leader, means[leader]

    def has_tried(self, configs: Iterable[SpecConfig]) -> bool:
        """Whether all of these were measured or failed."""
        return all(config in self.known for config in configs)

    def ask(self) -> Trial | None:
        """The next configuration to race, one that is not known yet; None when all are.

        The starting points, then whatever is one step from the best candidate (costs and acceptance are smooth along both
        axes, so this climbs quickly), then what TPE proposes.
        """
        fresh = next((config for config in (*self._priors, *self._around_best()) if config not in self.known), None)
        if fresh is not None:
            return self._ask_for(fresh)
        for _ in range(KNOWN_IN_A_ROW):
            trial = self._ask_tpe()
            if trial.config not in self.known:
                return trial
            self._repeat(trial)
        unknown = [config for config in self._configs if config not in self.known]
        return self._ask_for(random.Random(self._derived_seed()).choice(unknown)) if unknown else None

    def is_lost(self, trial: Trial) -> bool:
        """Whether to stop racing: behind the best (or plain) by more than the noise, or worse by Wilcoxon's test."""
        leader, mean = self.best
        blocks, leader_blocks = len(trial.values), len(self.known[leader])
        if fmean(trial.values) < mean - self._margin(blocks, leader_blocks):
            return True
        return blocks <= leader_blocks and trial.should_prune()

    def _margin(self, blocks: int, leader_blocks: int) -> float:
        """Twice the standard error of a difference, once the spread of this cell's blocks is known; never below a tie."""
        races = [values for values in self.known.values() if len(values) > 1 and any(values)]
        freedom = sum(len(values) - 1 for values in races)
        if freedom < MIN_FREEDOM:
            return self._protocol.hopeless / blocks
        spread = math.sqrt(sum((v - fmean(values)) ** 2 for values in races for v in values) / freedom)
        return max(2 * spread * math.sqrt(1 / blocks + 1 / leader_blocks), math.log1p(self._protocol.tie))

    def close(self, trial: optuna.Trial, config: SpecConfig, status: str, values: Sequence[float]) -> None:
        """Tell Optuna, and remember."""
        trial.set_user_attr("config", str(config))
        trial.set_user_attr("status", status)
        if values:
            self._study.tell(trial, fmean(values))
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self.known.setdefault(config, list(values))

    def _around_best(self) -> tuple[SpecConfig, ...]:
        means = {config: fmean(values) for config, values in self.known.items() if values and not config.is_off}
        return self._space.around(max(means, key=lambda config: (means[config], str(config)))) if means else ()

    def _ask_for(self, config: SpecConfig) -> Trial:
        self._study.enqueue_trial(self._space.params(config))
        trial = self._study.ask()
        self._space.suggest(trial)
        return Trial(self, trial, config)

    def _ask_tpe(self) -> Trial:
        """TPE's proposal. A sampler per question, seeded by how much is known: a resumed search asks the same questions."""
        with _no_experimental_warnings():
            self._study.sampler = self._optuna.samplers.TPESampler(
                multivariate=True, group=True, constant_liar=False, seed=self._derived_seed(),
                n_startup_trials=len(self._priors) + 1 + RANDOM_TRIALS,
            )
        trial = self._study.ask()
        return Trial(self, trial, self._space.suggest(trial))

    def _repeat(self, trial: Trial) -> None:
        """A known configuration again: answered from memory."""
        values = self.known[trial.config]
        for value in values:
            trial.report(value)
        trial.finish() if values else trial.fail("known to fail")

    def _derived_seed(self) -> int:
        text = f"{self._seed}/{self._cell}/{len(self._closed())}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def _closed(self) -> list[optuna.trial.FrozenTrial]:
        """Trials with a result or a recorded failure; what a killed run left open is neither."""
        trials = self._study.get_trials(deepcopy=False)
        return [t for t in trials if t.value is not None or t.user_attrs.get("status", "ok") != "ok"]

    def _add_plain(self) -> None:
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params={}, distributions={}, value=0.0, user_attrs={"config": "off", "status": "ok"},
                intermediate_values=dict.fromkeys(range(self._protocol.race_blocks), 0.0),
            )
        )

    def _fail_stale(self) -> None:
        """Trials that a killed run left waiting or running: told FAIL, so that nothing waits for them or avoids them."""
        state = self._optuna.trial.TrialState
        while self._study.get_trials(deepcopy=False, states=(state.WAITING,)):
            self._study.tell(self._study.ask(), state=state.FAIL)
        for trial in self._study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            self._study.tell(trial.number, state=state.FAIL)


def study_name(cell: Cell, reopenings: int = 0) -> str:
    """`cell/64x4096`, then `cell/64x4096#1`."""
    return f"cell/{cell}" + (f"#{reopenings}" if reopenings else "")


def open_journal(path: Path) -> optuna.storages.JournalStorage:
    """The studies of a run. The run's folder is held by one process, so the journal needs no lock of its own."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class OneWriter(JournalFileOpenLock):
        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            return

    class Journal(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                super().append_logs(logs)
            except OSError as error:
                advice = "Every finished measurement is in the database: free space and run again to go on"
                raise DatabaseError(path, f"cannot be written: {error.strerror}", advice) from error

    _drop_half_line(path)
    return JournalStorage(Journal(str(path), lock_obj=OneWriter(str(path))))


def _drop_half_line(path: Path) -> None:
    """A process killed while it wrote leaves half a line, which Optuna would refuse once another follows."""
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """No log line per trial; the caller's verbosity comes back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _no_experimental_warnings() -> Iterator[None]:
    """`group` and the Wilcoxon pruner are flagged experimental; their behaviour is covered by our tests."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


