"""`gpu`: the GPU run, or its rehearsal on a CPU."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .files import writable_folder
from .lab import Lab
from .mistakes import asked
from .outcome import OK, RED, Outcome
from .screen import Screen


def gpu(lab: Lab, args: Namespace) -> Outcome:
    """Stages in order, every row kept as it comes; the exit code is 1 if a result is wrong or a stage failed."""
    from ..bench.gpu.plan import chosen
    from ..bench.gpu.session import measure, rehearse
    from ..tune import find_database

    lab.check_idle("gpu")
    say, database = Screen(lab.err).say, find_database().path
    with asked():
        stages = chosen(tuple(args.stages), ("--gpt-fast",) if args.gpt_fast else ())
        if args.rehearse:
            root = writable_folder(args.out) if args.out else None
            found = rehearse(root, stages, minutes=args.minutes, again=args.again, say=say, database=database,
                             gpt_fast=args.gpt_fast)
        else:
            found = measure(Path(args.out or database), stages, minutes=args.minutes, again=args.again, say=say,
                            gpt_fast=args.gpt_fast)
    return Outcome(found, str(found), found.to_dict(), RED if found.is_red else OK)
