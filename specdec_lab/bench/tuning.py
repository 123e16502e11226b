"""Tuning an engine: its plan, its sessions as the tuner's `measure`, its database and run folder, put together.

Not known here: how progress is shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..policy import Policy
from ..records import Cell, fingerprint
from ..tune import SNAPKV_BUDGETS, Database, Plan, ProbePlan, Processes, Progress, Protocol, find_database, make_plan, tune
from ..tune.assemble import refuse_forced
from ..tune.folder import RunFolder
from ..workload import Sampling, Workload
from .recipe import EngineRecipe
from .sessions import Sessions

if TYPE_CHECKING:
    from ..engine.loop import Engine

RUNS = Path("runs")


@dataclass(frozen=True, slots=True)
class Tuning:
    """A tuning that is ready to run. Running it again resumes where it stopped.

    recipe, devices  of worker processes, one per device; without devices the engine itself is measured, in this process
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

    def check(self) -> None:
        """Raise now what would end the run: a database or folder that cannot be written, another plan, another tuner."""
        refuse_forced([str(self.engine.identity().base.get("acceptance", ""))], self.allow_forced)
        self.database.check_writable()
        with RunFolder(self.run_dir, self.plan, self.engine.identity(), self.workload, self.temperature, self.seed):
            pass

    def run(
        self, report: Callable[[Progress], None] = lambda progress: None, stop: Callable[[], bool] = lambda: False
    ) -> Policy:
        """Measure and return the policy; an interrupt or `stop()` ends it early with everything recorded.

        raises  WorkerCannotStart where a device's process ended before it could measure
        """
        if self.recipe is None:
            return self._tune(self.sessions, report, stop)
        base = self.engine.identity().base_fingerprint
        with Processes(self.recipe, self.devices, base, self.run_dir / "workers") as workers:
            return self._tune(workers, report, stop)

    def _tune(self, measure: Sessions | Processes, report: Callable[[Progress], None], stop: Callable[[], bool]) -> Policy:
        return tune(
            self.plan, measure, self.engine.identity(), self.database, run_dir=self.run_dir, workload=self.workload,
            temperature=self.temperature, seed=self.seed, report=report, stop=stop,
            allow_forced=self.allow_forced,
        )


def prepare(
    engine: Engine, batches: Sequence[int], lengths: Sequence[int], budget_s: float, *, workload: str = "prose",
    texts: Callable[[Cell], Workload] | None = None, database: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None, sampling: Sampling | None = None, protocol: Protocol | None = None,
    allow_forced: bool = False, recipe: EngineRecipe | None = None, devices: Sequence[str] = (),
) -> Tuning:
    """A tuning of this engine; nothing is measured or written yet.

    workload  a kind of shipped held-out text, or the name under which the prompts that `texts` gives are recorded
    database  where measurements go; found as `specdec_lab.tune.find_database` does when left out
    allow_forced  write a policy although acceptance is forced
    run_dir   when left out, one made from what is tuned, so that the same call resumes
    recipe    makes this engine again in a process of each of `devices`, which measure cells side by side
    """
    if (recipe is None) != (not devices):
        raise ValueError("workers need both a recipe and devices")
    sampling = sampling or {}
    sessions = Sessions(engine, texts or workload, sampling=sampling)
    identity, pair = engine.identity(), engine.pair
    has_lists = engine.backend.why_not(replace(pair.target.need(), index_list=True)) is None
    plan = make_plan(
        batches, lengths, budget_s, tuple(identity.drafters), fits=sessions.why_not, protocol=protocol,
        snapkv=SNAPKV_BUDGETS if has_lists else (), probe=ProbePlan(),
        lanes=max(len(devices), 1),
    )  # fmt: skip
    draft = pair.draft.name if pair.draft else "model"
    temperature, seed = sampling.get("temperature", 0.0), sampling.get("seed", 0)
    same = (plan.to_dict(), identity.base, identity.drafters, temperature, seed)
    folder = RUNS / f"tune-{workload}-{fingerprint({'same': same})[:8]}"
    return Tuning(
        engine, plan, sessions, Database(find_database(database).path, identity, Path(pair.name).name, draft),
        Path(run_dir) if run_dir else folder, workload, temperature, seed,
        allow_forced, recipe, tuple(devices),
    )
