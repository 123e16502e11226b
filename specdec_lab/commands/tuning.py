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
from .mistakes import UserMistake, asked, one_line
from .outcome import INTERRUPTED, NOTHING_WON, OK, PARTIAL, Outcome
from .policies import policy_words

if TYPE_CHECKING:
    from ..bench.recipe import EngineRecipe
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
        from ..tune import WorkerCannotStart

        try:
            policy = self.tuning.run(report, stop)
        except WorkerCannotStart as error:
            raise UserMistake(one_line(error)) from error
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
    devices = _devices(args.devices)
    with asked():
        from ..bench.tuning import prepare

        tuning = prepare(
            engine, args.batches, args.lengths, args.budget, workload=args.workload, database=args.db, run_dir=args.run,
            sampling=sampling_of(args), allow_forced=args.allow_forced, recipe=_recipe(lab, args) if devices else None,
            devices=devices,
        )
        plan = tuning.plan
        if args.dry_run:
            words = f"{plan.describe()}\n{worker_words(devices, _num_gpus())}"
            return Outcome(plan, words, {**plan.to_dict(), "budget_s": plan.budget_s, "devices": list(devices)})
        if not plan.cells:
            raise UserMistake(f"none of these cells can run. {'; '.join(f'{c}: {why}' for c, why in plan.infeasible.items())}")
        out = writable_file(args.out, ".json")
        tuning.check()
    return TuneJob(f"tuning {len(plan.cells)} cells of {args.workload}", tuning, out)


def _devices(words: str | None) -> tuple[str, ...]:
    """The devices named, each once. On a CPU one at most: two workers would slow each other down and time that."""
    names = tuple(name.strip() for name in words.split(",")) if words is not None else ()
    if not all(names) or len(set(names)) != len(names):
        raise UserMistake(f"--devices needs different names, for example cuda:0,cuda:1, got {words!r}")
    if len(names) > 1 and not all(name.startswith("cuda:") for name in names):
        raise UserMistake(
            f"--devices {words}: workers side by side need a GPU each, by number, for example cuda:0,cuda:1; on one CPU they "
            "would disturb each other's timings"
        )
    known = [f"cuda:{i}" for i in range(_num_gpus())] if names else []
    if strange := [name for name in names if name.startswith("cuda:") and name not in known]:
        raise UserMistake(f"--devices {words}: torch sees {', '.join(known) or 'no GPU'} here, not {', '.join(strange)}")
    return names


def _recipe(lab: Lab, args: Namespace) -> EngineRecipe:
    """The engine in use, as words that another process can follow."""
    import torch

    from ..bench.recipe import EngineRecipe

    placement = {name: value for name, value in lab.placement.items() if name != "device"}
    threads = torch.get_num_threads()
    forced = lab.engine.forced if lab.engine is not None else None
    return EngineRecipe(
        *lab.source, lab.backend_name, args.workload, threads, placement, sampling_of(args),
        None if forced is None else str(forced), lab.rounds,
    )


def _num_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def worker_words(devices: tuple[str, ...], num_gpus: int) -> str:
    """How many workers measure, and what would use the other GPUs."""
    if devices:
        return f"workers: {len(devices)}, one process each on {', '.join(devices)}, beside this process's own copy of the model"
    if num_gpus < 2:
        return "workers: 1, this process"
    everything = ",".join(f"cuda:{i}" for i in range(num_gpus))
    return f"workers: 1, this process; {num_gpus} GPUs are attached: --devices {everything} measures {num_gpus} cells at a time"


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
