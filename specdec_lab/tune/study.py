"""Tune: per cell an Optuna search against plain decoding, a confirming duel, and at the end a policy from the records.

The tuner asks for steps by a function `measure(cell, config)`; the engine, a replay or a synthetic world gives them, in
this process or in workers. Not known here: engine, view.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import machine
from ..policy import Policy, Rules
from ..records import Identity
from .assemble import assemble, labels_of, refuse_forced
from .blocks import Clock, Measure
from .crew import Ending
from .db import Database
from .evidence import SHARD, collect
from .folder import RunFolder
from .grid import Plan
from .progress import Report
from .runner import Setting
from .search import quiet_optuna
from .tuner import Tuner
from .workers import Executor, Inline


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
    remeasure: bool = False,
    now: Callable[[], str] = machine.now,
) -> Policy:
    """Search every cell of the plan within its budget, record every block, and return the policy (also in `run_dir`).

    measure      (cell, config) -> steps from the end of the prompt; raises UnsupportedConfig or MemoryError where it cannot.
                 Or an executor, whose workers measure cells side by side, as many as the plan has lanes
    run_dir      studies, raw samples, policy.json; called again with the same folder and plan it goes on where it stopped
    stop         asked between blocks; True, or an interrupt, ends the run: what is recorded stays, at most the running block
                 is lost, and the policy says `interrupted`
    allow_forced write a policy although acceptance is forced; else that raises ForcedAcceptance before anything is measured
    remeasure    use and pool nothing that other runs have recorded
    raises       DatabaseError where records cannot be written; it carries the finished measurements. WorkerCannotStart
    """
    started = clock()
    refuse_forced([str(identity.base.get("acceptance", ""))], allow_forced)
    database.flush()
    database.check_writable()
    with RunFolder(Path(run_dir), plan, identity, workload, temperature, seed, remeasure) as folder, quiet_optuna():
        setting = Setting(folder.name, folder.path, identity, workload, temperature, seed, plan.protocol, clock, now, remeasure)
        executor = measure if isinstance(measure, Executor) else Inline(measure, clock)
        ending = Ending(started, plan.budget_s, clock, stop)
        tuner = Tuner(plan, executor, database, setting, folder, report, ending)
        try:
            tuner.run()
        except KeyboardInterrupt:
            ending.interrupted = True
        database.flush()
        policy = _policy(tuner, plan, database, setting, executor.names, ending.interrupted, allow_forced)
        policy.save(folder.path / "policy.json")
    return policy


def _policy(
    tuner: Tuner, plan: Plan, database: Database, setting: Setting, workers: Sequence[str], interrupted: bool,
    allow_forced: bool,
) -> Policy:  # fmt: skip
    """The policy from what is on disk."""
    unvisited = "not_visited", f"{tuner.why_ended()} before this cell"
    states = {cell: tuner.states.get(cell, unvisited) for cell in plan.all_cells}
    header = policy_header(database, setting)
    header |= {"workers": list(workers)} if tuple(workers) != ("main",) else {}
    header |= {SHARD: str(plan.shard)} if plan.shard.count > 1 else {}
    header |= {"remeasured": True} if setting.remeasure else {}
    records, header["evidence"] = collect(database.paths(), header)
    header["labels"] = labels_of(header, states, records, {"interrupted"} if interrupted else set())
    rules = Rules(min_speedup=plan.protocol.min_speedup)
    return assemble(header, rules, states, records, allow_forced=allow_forced)


def policy_header(database: Database, setting: Setting) -> dict[str, Any]:
    """What the numbers of a policy were measured on."""
    from .. import __version__

    identity = setting.identity
    versions = {"specdec_lab": __version__, **{name: str(value) for name, value in identity.warn.items()}}
    return {
        "created": setting.now(), "device": identity.device, "count": identity.base.get("count", 1), "versions": versions,
        "dtype": str(identity.base.get("dtype", "unknown")), "base": identity.base_fingerprint, "target": database.target,
        "drafters": {kind: identity.drafter_fingerprint(kind) for kind in identity.drafters},
        "exact": {"base": dict(identity.base), "drafters": {kind: dict(f) for kind, f in identity.drafters.items()}},
        "workload": setting.workload, "temperature": setting.temperature, "labels": [], "objective": "tokens_per_s",
        "interval": "95 %: Student's t over paired blocks and the text sampled, in quadrature",
        "run": setting.run, "seed": setting.seed, "protocol": asdict(setting.protocol), "evidence": [],
    }  # fmt: skip
