"""Worlds for workers: what a worker process or actor measures, what may go wrong in it, and tunings by one or several."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from specdec_lab.records import Cell
from specdec_lab.tune import Database, Protocol, tune
from specdec_lab.tune.workers import Inline, Instrument, Lease, Processes
from world import IDENTITY, World, small_plan

SHORT = Lease(factor=3.0, slack_s=4.0, first_s=60.0)
VICTIM = "ngram/chain3"
BASE = IDENTITY.base_fingerprint


class SteadyWorld(World):
    """Every run starts at second 0, so that none depends on what its process ran before."""

    def __call__(self, cell, config):
        self.seconds = 0.0
        return super().__call__(cell, config)


@dataclass(frozen=True)
class Synthetic:
    """A worker's world. `trouble` strikes in the fourth round of a block of the victim, `times` times over all processes.

    marks  a folder in which the strikes are counted
    slow   device on which every run takes longer
    """

    trouble: str = ""
    marks: Path = Path()
    times: int = 0
    slow: str = ""
    base: str = BASE

    def __call__(self, device):
        if device == "absent":
            raise RuntimeError("no device named absent")
        world = SteadyWorld()

        def measure(cell, config):
            time.sleep(0.004 if device == self.slow else 0)
            for step in world(cell, config):
                if step.index == 3 and str(config) == VICTIM and cell == Cell(2, 512):
                    self.strike()
                yield step

        return Instrument(measure, self.base, world.clock)

    def strike(self):
        done = len(list(self.marks.iterdir())) if self.trouble else self.times
        if done >= self.times:
            return
        (self.marks / str(done)).touch()
        if self.trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.trouble == "hang":
            time.sleep(600)
        elif self.trouble == "memory":
            raise MemoryError("the cache needs 123 bytes")
        else:
            raise RuntimeError("an illegal address was read")


def tuned(tmp_path, executor, plan, name="run", **options):
    database = Database(tmp_path / name / "db", IDENTITY, "tiny")
    policy = tune(plan, executor, IDENTITY, database, run_dir=tmp_path / name / "run", workload="prose", **options)
    return policy, list(Database(tmp_path / name / "db", IDENTITY, "tiny"))


def inline(plan, tmp_path, name="inline"):
    world = SteadyWorld()
    return tuned(tmp_path, Inline(world, world.clock), plan, name)


def by_processes(plan, tmp_path, recipe, devices=("cpu",), name="processes"):
    with Processes(recipe, devices, BASE, tmp_path / name, SHORT) as workers:
        return tuned(tmp_path, workers, plan, name)


def troubled(tmp_path, trouble, times):
    marks = tmp_path / "marks"
    marks.mkdir()
    return Synthetic(trouble, marks, times)


def decisions(policy):
    return policy.portfolio, [row.to_dict() for row in policy.table]


def results(records):
    """What was measured, whoever measured it; without what only minds the machine."""
    return {(m.key, m.status, str(dict(m.summary))) for m in records if m.kind != "sentinel" or not m.design.block}


def one_cell(**protocol):
    return small_plan(lengths=(512,), drafters=("ngram",), protocol=Protocol(**{**{
        "race_run_s": 0.05, "duel_run_s": 0.1, "race_blocks": 2, "pilot_blocks": 2, "max_trials": 4}, **protocol}))  # fmt: skip
