"""`doctor`, `bench overhead` and `demo`: the machine, the engine's own cost, and the main job end to end."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from .bench_rows import keeper
from .files import writable_folder
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import OK, RED, Outcome
from .screen import Screen

if TYPE_CHECKING:
    from ..engine.loop import Engine


def doctor(lab: Lab, args: Namespace) -> Outcome:
    """Examine the machine, with the engine in use or the one that the arguments name."""
    from ..bench.doctor import examine

    engine: Engine | None = None
    reason = ""
    try:
        engine = lab.engine_for(args)
    except UserMistake as mistake:
        reason = str(mistake)
    diagnosis = examine(engine, reason)
    return Outcome(diagnosis, str(diagnosis), diagnosis.to_dict())


def overhead(lab: Lab, args: Namespace) -> Outcome:
    """Measure what the instrumentation costs; `--save` appends the row to the database's bench folder."""
    from ..bench.overhead import DEFAULT_CONFIGS, OutputsDiffer
    from ..bench.overhead import overhead as measure
    from ..bench.profile import check_configs

    lab.check_idle("bench")
    engine = lab.engine_for(args)
    keep = keeper(args, "overhead.jsonl")
    screen = Screen(lab.err)
    configs = args.config or DEFAULT_CONFIGS
    try:
        with asked():
            check_configs(engine, configs)
            report = measure(
                engine.pair, args.cell, configs, rounds=args.rounds, blocks=args.blocks, workload=args.workload,
                backend=args.backend or "auto", say=screen.say,
            )
    except OutputsDiffer as red:
        return Outcome(None, str(red), {"error": str(red)}, RED)
    keep([report.to_dict()])
    return Outcome(report, str(report), report.to_dict())


def demo(lab: Lab, args: Namespace) -> Outcome:
    """Profile, tune and explain; everything goes below `--out`."""
    from ..bench.demo_run import fresh_folder, run_demo

    lab.check_idle("demo")
    folder = writable_folder(args.out)
    with asked():
        fresh_folder(folder)
    engine = lab.engine_for(args)
    result = run_demo(engine, folder, budget_s=args.budget, say=Screen(lab.err).say)
    return Outcome(result, str(result), result.to_dict(), RED if result.mismatches else OK)


def lossless(lab: Lab, args: Namespace) -> Outcome:
    """Check the law of speculation; red if a check failed or a control was not told apart."""
    from ..bench.lossless import lossless as measure

    lab.check_idle("bench")
    keep = keeper(args, "lossless.jsonl")
    with asked():
        report = measure(samples=args.samples, backend=args.backend, say=Screen(lab.err).say)
    keep([report.to_dict()])
    return Outcome(report, str(report), report.to_dict(), RED if report.faults else OK)
