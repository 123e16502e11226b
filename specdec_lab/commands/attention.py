"""`bench attention`: the kernel's own table, or the check that forbids one."""

from __future__ import annotations

import json
from argparse import Namespace

from .files import writable_folder
from .lab import Lab
from .mistakes import asked
from .outcome import RED, Outcome
from .screen import Screen


def attention(lab: Lab, args: Namespace) -> Outcome:
    """Check, then time; `--save` appends a line per setting to the database's bench folder."""
    from ..bench.attention import AttentionIsRed
    from ..bench.attention import attention as measure
    from ..tune import find_database
    from ..tune.db import append_lines

    lab.check_idle("bench")
    folder = writable_folder(find_database(args.db).path / "bench") if args.save else None
    try:
        with asked():
            report = measure(
                args.shapes, queries=args.queries, tree=args.tree, dtypes=args.dtypes, threads=args.threads, blocks=args.blocks,
                say=Screen(lab.err).say,
            )
    except AttentionIsRed as red:
        return Outcome(None, f"{red}\nno speed is given", {"error": str(red)}, RED)
    if folder is not None:
        append_lines(folder / "attention.jsonl", [json.dumps(row, sort_keys=True) for row in report.rows()])
    return Outcome(report, report.to_markdown() if args.markdown else str(report), report.to_dict())
