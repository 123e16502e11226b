"""`acceptance`: how often the k-th child is accepted, and which trees that is worth."""

from __future__ import annotations

from argparse import Namespace

from .bench_rows import keeper
from .lab import Lab
from .mistakes import asked
from .outcome import INTERRUPTED, OK, Outcome
from .screen import Screen

FILE = "acceptance.jsonl"


def acceptance(lab: Lab, args: Namespace) -> Outcome:
    """Measure; `--save` appends the row to the database's bench folder. An interrupt keeps what was counted."""
    from ..bench.acceptance import measure_acceptance
    from ..trees import Drafting
    from ..workload import Sampling

    lab.check_idle("acceptance")
    with asked():
        drafting = Drafting.parse(args.config)
    keep = keeper(args, FILE)
    engine = lab.engine_for(args)
    sampling = Sampling(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed, verifier=args.verifier
    )
    with asked():
        report = measure_acceptance(
            engine, drafting, args.cell, width=args.width, depth=args.depth, workload=args.workload, sampling=sampling,
            new_tokens=args.max_new_tokens, say=Screen(lab.err).say,
        )
    keep([report.to_dict()])
    return Outcome(report, str(report), report.to_dict(), INTERRUPTED if report.header["interrupted"] else OK)
