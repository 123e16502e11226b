"""The tuner: search configurations per cell against plain decoding, keep every measurement, make a policy.

    from specdec_lab.tune import Database, make_plan, tune
    plan = make_plan([1, 4], [512, 1024], budget_s=120, drafters=["self", "ngram"])
    policy = tune(plan, measure, identity, Database("tuning_db", identity, "demo"), run_dir="runs/first", workload="prose")

Knows records, summary and policy; Optuna is loaded when a search starts. The engine reaches it as `measure(cell, config)`.
"""

from __future__ import annotations

from .blocks import Measure
from .compose import Composition, compose
from .db import Database, DatabaseError, Design, Measurement, read_file
from .evidence import verify
from .folder import PlanChanged
from .grid import SNAPKV_BUDGETS, Plan, Protocol, candidates, make_plan
from .join import ShardsDiffer, join
from .probe import ProbePlan
from .progress import Progress
from .ray_workers import RayActors
from .shard import CellShard
from .shelf import Location, Merged, describe, find_database, locations, merge
from .study import tune
from .workers import Executor, Inline, Instrument, Lease, Processes, WorkerCannotStart

__all__ = [
    "SNAPKV_BUDGETS", "CellShard", "Composition", "Database", "DatabaseError", "Design", "Executor", "Inline", "Instrument",
    "Lease", "Location", "Measure", "Measurement", "Merged", "Plan", "PlanChanged", "ProbePlan", "Processes", "Progress",
    "Protocol", "RayActors", "ShardsDiffer", "WorkerCannotStart", "candidates", "compose", "describe", "find_database",
    "join", "locations", "make_plan", "merge", "read_file", "tune", "verify",
]  # fmt: skip
