"""`tune`: search, confirm, write a policy; progress with the time left."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .files import writable_file
from .generation import sampling_of
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import INTERRUPTED, NOTHING_WON, OK, PARTIAL, Outcome
from .policies import policy_words

if TYPE_CHECKING:
    from ..bench.tuning import Tuning
    from ..policy import Policy
    from ..tune import Progress


@dataclass(frozen=True, slots=True)
class TuneJob:
    """A tuning to be run in this thread or in the background; `conclude` writes the policy and says the result."""

    title: str
    tuning: Tuning
    out: Path
    name: str = "tune"

    def run(self, report: Callable[[Progress], None], stop: Callable[[], bool] = lambda: False) -> Policy:
        """Measure, and write the policy where it was asked for."""
        policy = self.tuning.run(report, stop)
        with asked():
            policy.save(self.out)
        return policy

    def conclude(self, policy: Policy) -> Outcome:
        """What a shell prints."""
        paths = {"policy": str(self.out), "database": str(self.tuning.database.folder), "run": str(self.tuning.run_dir)}
        places = [f"{name}: {path}" for name, path in paths.items()]
        words = "\n".join([policy_words(policy), "", *places, _next_step(policy, self)])
        return Outcome(policy, words, {"policy": policy.to_dict(), "paths": paths}, exit_code(policy))


def tune(lab: Lab, args: Namespace) -> TuneJob | Outcome:
    """The tuning as a job, or with `--dry-run` its plan."""
    lab.check_idle("tune")
    engine = lab.engine_for(args)
    with asked():
        from ..bench.tuning import prepare

        tuning = prepare(
            engine, args.batches, args.lengths, args.budget, workload=args.workload, database=args.db, run_dir=args.run,
            sampling=sampling_of(args), allow_forced=args.allow_forced,
        )
        plan = tuning.plan
        if args.dry_run:
            return Outcome(plan, plan.describe(), {**plan.to_dict(), "budget_s": plan.budget_s})
        if not plan.cells:
            raise UserMistake(f"none of these cells can run. {'; '.join(f'{c}: {why}' for c, why in plan.infeasible.items())}")
        out = writable_file(args.out, ".json")
        tuning.check()
    return TuneJob(f"tuning {len(plan.cells)} cells of {args.workload}", tuning, out)


def exit_code(policy: Policy) -> int:
    """0: it speculates somewhere; 3: cells are missing; 4: plain decoding won everywhere; 130: interrupted."""
    labels = policy.header["labels"]
    if "interrupted" in labels:
        return INTERRUPTED
    if "partial" in labels:
        return PARTIAL
    return OK if any(row.is_decided and row.config != "off" for row in policy.table) else NOTHING_WON


def _next_step(policy: Policy, job: TuneJob) -> str:
    if exit_code(policy) in (INTERRUPTED, PARTIAL):
        return "Run the same command again to go on; recorded measurements are not repeated"
    return f"Use it: run --config {job.out}, or policy explain 4x2k --policy {job.out}"


def progress_line(progress: Progress) -> str:
    """Where a tuning is, and how long it still takes."""
    p = progress
    left = "?" if p.eta_s == float("inf") else f"{p.eta_s:.0f} s"
    best = f"best {p.best} {p.speedup:.2f}x" if p.best != "off" else "best so far: plain decoding"
    head = f"{p.done}/{p.total} cells, {p.elapsed_s:.0f} s, {left} left"
    if p.stage == "cell":
        return f"{head} | {p.cell} {p.status}: {best}"
    return f"{head} | {p.cell} {p.stage} {p.config} block {p.block} | {best}"
