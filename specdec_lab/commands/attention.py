"""`bench attention`: the kernel's own table, or the check that forbids one."""

from __future__ import annotations

from argparse import Namespace

from .bench_rows import keeper
from .lab import Lab
from .mistakes import asked
from .outcome import RED, Outcome
from .screen import Screen


def attention(lab: Lab, args: Namespace) -> Outcome:
    """Check, then time; `--save` appends a line per setting to the database's bench folder."""
    from ..bench.attention import AttentionIsRed
    from ..bench.attention import attention as measure

    lab.check_idle("bench")
    keep = keeper(args, "attention.jsonl")
    try:
        with asked():
            report = measure(
                args.shapes, queries=args.queries, tree=args.tree, dtypes=args.dtypes, threads=args.threads, blocks=args.blocks,
                say=Screen(lab.err).say,
            )
    except AttentionIsRed as red:
        return Outcome(None, f"{red}\nno speed is given", {"error": str(red)}, RED)
    keep(report.rows())
    return Outcome(report, report.to_markdown() if args.markdown else str(report), report.to_dict())
