"""`bench trees`: tokens per round of trees, chains and plain trees of equal size."""

from __future__ import annotations

from argparse import Namespace

from .bench_rows import keeper
from .lab import Lab
from .mistakes import asked
from .outcome import OK, Outcome
from .screen import Screen

FILE = "trees.jsonl"


def trees(lab: Lab, args: Namespace) -> Outcome:
    """Measure; `--save` appends the row to the database's bench folder."""
    from ..bench.tree_yield import DRAFTINGS, measure_yields
    from ..trees import Drafting

    lab.check_idle("bench")
    with asked():
        draftings = tuple(map(Drafting.parse, args.drafts.split(","))) if args.drafts else DRAFTINGS
    keep = keeper(args, FILE)
    engine = lab.engine_for(args)
    with asked():
        report = measure_yields(
            engine, draftings, args.lengths, args.temperatures, batch=args.batch, sizes=args.sizes, workload=args.workload,
            new_tokens=args.new_tokens, seed=args.seed, verifier=args.verifier, say=Screen(lab.err).say,
        )
    keep([report.to_dict()])
    return Outcome(report, report.markdown if args.markdown else str(report), report.to_dict(), OK)
