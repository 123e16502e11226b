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
from .remembering import recall, remember

TOGETHER = (
    "workers side by side need a GPU each, by number, for example cuda:0,cuda:1; on one CPU they would disturb each other's "
    "timings"
)

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
        words = "\n".join([policy_words(policy), "", *places, *_next_steps(policy, self)])
        return Outcome(policy, words, {"policy": policy.to_dict(), "paths": paths}, exit_code(policy))


def tune(lab: Lab, args: Namespace) -> TuneJob | Outcome:
    """The tuning as a job, or with `--dry-run` its plan."""
    lab.check_idle("tune")
    devices, actors = _workers(args)
    engine = lab.engine_for(args)
    with asked():
        from ..bench.tuning import prepare

        tuning = prepare(
            engine, args.batches, args.lengths, args.budget, workload=args.workload, database=args.db, run_dir=args.run,
            sampling=sampling_of(args), allow_forced=args.allow_forced,
            recipe=_recipe(lab, args) if devices or actors else None, devices=devices, actors=actors, shard=args.cells_shard,
            remeasure=args.remeasure,
        )
        plan = tuning.plan
        if actors > 1 and engine.pair.target.device.type == "cpu":
            raise UserMistake(f"--workers {actors}: {TOGETHER}")
        if args.dry_run:
            words = f"{plan.describe()}\n{worker_words(devices, _num_gpus(), actors)}"
            return Outcome(plan, words, {**plan.to_dict(), "budget_s": plan.budget_s, "devices": list(devices)})
        if not plan.cells:
            raise UserMistake(f"none of these cells can run. {'; '.join(f'{c}: {why}' for c, why in plan.infeasible.items())}")
        out = writable_file(_out(args), ".json")
        tuning.check()
        remember(tuning.run_dir, lab, args)
    return TuneJob(f"tuning {len(plan.cells)} cells of {args.workload}", tuning, out)


def resume(lab: Lab, args: Namespace) -> TuneJob | Outcome:
    """The tuning of a run folder, from its own words."""
    with asked():
        again = recall(args.run)
    again.json = args.json
    again.budget = args.budget or again.budget
    return tune(lab, again)


def _out(args: Namespace) -> str:
    """Where the policy goes; that of a shard has the shard in its name, so that shards share a folder."""
    path = Path(args.out)
    return str(path.with_name(path.stem + args.cells_shard.suffix + path.suffix)) if args.cells_shard else args.out


def _workers(args: Namespace) -> tuple[tuple[str, ...], int]:
    """Devices of worker processes, or a number of Ray actors; neither: this process measures."""
    executor = args.executor or ("process" if args.devices is not None else "inline")
    if executor != "ray" and args.workers is not None:
        raise UserMistake(f"--workers {args.workers} belongs to --executor ray; processes are named by --devices")
    if executor == "ray":
        if args.devices is not None:
            raise UserMistake("--executor ray places its workers itself: say how many with --workers, and leave --devices out")
        from ..tune import WorkerCannotStart
        from ..tune.ray_workers import load_ray

        try:
            load_ray()
        except WorkerCannotStart as error:
            raise UserMistake(one_line(error)) from error
        return (), args.workers or 1
    if (executor == "process") != (args.devices is not None):
        raise UserMistake("--executor process needs --devices, for example cuda:0,cuda:1, and --executor inline has none")
    return _devices(args.devices), 0


def _devices(words: str | None) -> tuple[str, ...]:
    """The devices named, each once. On a CPU one at most: two workers would slow each other down and time that."""
    names = tuple(name.strip() for name in words.split(",")) if words is not None else ()
    if not all(names) or len(set(names)) != len(names):
        raise UserMistake(f"--devices needs different names, for example cuda:0,cuda:1, got {words!r}")
    if len(names) > 1 and not all(name.startswith("cuda:") for name in names):
        raise UserMistake(f"--devices {words}: {TOGETHER}")
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


def worker_words(devices: tuple[str, ...], num_gpus: int, actors: int = 0) -> str:
    """How many workers measure, and what would use the other GPUs."""
    if actors:
        return f"workers: {actors}, actors that Ray places, beside this process's own copy of the model"
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


def _next_steps(policy: Policy, job: TuneJob) -> list[str]:
    shard, folder = job.tuning.plan.shard, job.tuning.run_dir
    if exit_code(policy) in (INTERRUPTED, PARTIAL):
        return [f"Run the same command again to go on, or: resume {folder}. Recorded measurements are not repeated"]
    if not shard.suffix:
        return [f"Use it: run --config {job.out}, or policy explain 4x2k --policy {job.out}"]
    others = str(folder).removesuffix(shard.suffix)
    return [f"This is shard {shard}. When all are done: db merge {others}-*of{shard.count} --into tuning_db --out policy.json"]


def progress_line(progress: Progress) -> str:
    """Where a tuning is, and how long it still takes."""
    p = progress
    left = "?" if p.eta_s == float("inf") else f"{p.eta_s:.0f} s"
    best = f"best {p.best} {p.speedup:.2f}x" if p.best != "off" else "best so far: plain decoding"
    head = f"{p.done}/{p.total} cells, {p.elapsed_s:.0f} s, {left} left"
    if p.stage == "cell":
        return f"{head} | {p.cell} {p.status}: {best}"
    return f"{head} | {p.cell} {p.stage} {p.config} block {p.block} | {best}"
