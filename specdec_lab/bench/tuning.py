"""Tuning an engine: its plan, its sessions as the tuner's `measure`, its database and run folder, put together.

Not known here: how progress is shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from ..policy import Policy
from ..records import Cell, fingerprint
from ..tune import (
    SNAPKV_BUDGETS,
    CellShard,
    Database,
    Executor,
    Plan,
    ProbePlan,
    Processes,
    Progress,
    Protocol,
    RayActors,
    find_database,
    make_plan,
    tune,
)
from ..tune.assemble import refuse_forced
from ..tune.folder import RunFolder
from ..tune.shard import ALL
from ..workload import Sampling, Workload
from .recipe import EngineRecipe
from .sessions import Sessions

if TYPE_CHECKING:
    from ..engine.loop import Engine

RUNS = Path("runs")


@dataclass(frozen=True, slots=True)
class Tuning:
    """A tuning that is ready to run. Running it again resumes where it stopped.

    recipe   of the engine in workers; None = the engine itself is measured, in this process
    devices  a worker process for each
    actors   so many workers that Ray places, where there are no devices
    """

    engine: Engine
    plan: Plan
    sessions: Sessions
    database: Database
    run_dir: Path
    workload: str
    temperature: float
    seed: int
    allow_forced: bool = False
    recipe: EngineRecipe | None = None
    devices: tuple[str, ...] = ()
    actors: int = 0
    remeasure: bool = False

    def check(self) -> None:
        """Raise now what would end the run: a database or folder that cannot be written, another plan, another tuner."""
        refuse_forced([str(self.engine.identity().base.get("acceptance", ""))], self.allow_forced)
        self.database.check_writable()
        experiment = (self.workload, self.temperature, self.seed, self.remeasure)
        with RunFolder(self.run_dir, self.plan, self.engine.identity(), *experiment):
            pass

    def run(
        self, report: Callable[[Progress], None] = lambda progress: None, stop: Callable[[], bool] = lambda: False
    ) -> Policy:
        """Measure and return the policy; an interrupt or `stop()` ends it early with everything recorded.

        raises  WorkerCannotStart where a worker ended before it could measure, or there is no Ray
        """
        if self.recipe is None:
            return self._tune(self.sessions, report, stop)
        with self._executor(self.recipe) as workers:
            return self._tune(workers, report, stop)

    def _executor(self, recipe: EngineRecipe) -> Processes | RayActors:
        base = self.engine.identity().base_fingerprint
        if self.devices:
            return Processes(recipe, self.devices, base, self.run_dir / "workers")
        return RayActors(recipe, self.actors, self.engine.pair.target.device.type, base)

    def _tune(self, measure: Sessions | Executor, report: Callable[[Progress], None], stop: Callable[[], bool]) -> Policy:
        return tune(
            self.plan, measure, self.engine.identity(), self.database, run_dir=self.run_dir, workload=self.workload,
            temperature=self.temperature, seed=self.seed, report=report, stop=stop,
            allow_forced=self.allow_forced, remeasure=self.remeasure,
        )


def prepare(
    engine: Engine, batches: Sequence[int], lengths: Sequence[int], budget_s: float, *, workload: str = "prose",
    texts: Callable[[Cell], Workload] | None = None, database: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None, sampling: Sampling | None = None, protocol: Protocol | None = None,
    allow_forced: bool = False, recipe: EngineRecipe | None = None, devices: Sequence[str] = (), actors: int = 0,
    shard: CellShard | None = None, remeasure: bool = False,
) -> Tuning:
    """A tuning of this engine; nothing is measured or written yet.

    workload  a kind of shipped held-out text, or the name under which the prompts that `texts` gives are recorded
    database  where measurements go; found as `specdec_lab.tune.find_database` does when left out
    allow_forced  write a policy although acceptance is forced
    run_dir   when left out, one made from what is tuned, so that the same call resumes; a shard adds its own ending
    recipe    makes this engine again in a process of each of `devices`, or in so many `actors`, which measure side by side
    shard     tune these cells alone, into a database of their own (in the run folder) unless one is given
    remeasure use nothing that is recorded, in a new run folder
    """
    if (recipe is None) != (not devices and not actors) or (devices and actors):
        raise ValueError("workers need a recipe, and either devices or a number of actors")
    sampling = sampling or {}
    sessions = Sessions(engine, texts or workload, sampling=sampling)
    identity, pair = engine.identity(), engine.pair
    has_lists = engine.backend.why_not(replace(pair.target.need(), index_list=True)) is None
    plan = make_plan(
        batches, lengths, budget_s, tuple(identity.drafters), fits=sessions.why_not, protocol=protocol,
        snapkv=SNAPKV_BUDGETS if has_lists else (), probe=ProbePlan(),
        lanes=max(len(devices), actors, 1),
    )  # fmt: skip
    draft = pair.draft.name if pair.draft else "model"
    temperature, seed = sampling.get("temperature", 0.0), sampling.get("seed", 0)
    whole = plan.of_shard(CellShard(ALL, shard.count)) if shard else plan
    same = (whole.to_dict(), identity.base, identity.drafters, temperature, seed)
    folder = Path(run_dir) if run_dir else RUNS / f"tune-{workload}-{fingerprint({'same': same})[:8]}"
    if remeasure and not run_dir:
        folder = _fresh(folder, shard.suffix if shard else "")
    if shard:
        plan, folder = plan.of_shard(shard), folder.with_name(folder.name + shard.suffix)
    is_own = database is None and shard is not None and not shard.is_whole
    records = folder / "tuning_db" if is_own else find_database(database).path
    return Tuning(
        engine, plan, sessions, Database(records, identity, Path(pair.name).name, draft), folder, workload, temperature, seed,
        allow_forced, recipe, tuple(devices), actors, remeasure,
    )


def _fresh(folder: Path, suffix: str) -> Path:
    """A run folder beside this one in which nothing was finished yet."""
    for number in count(1):
        candidate = folder.with_name(f"{folder.name}-again{number}")
        policy = candidate.with_name(candidate.name + suffix) / "policy.json"
        if not policy.exists() or {"partial", "interrupted"} & set(Policy.load(policy).header["labels"]):
            return candidate
    raise AssertionError("counting does not end")
