"""`profile`: configurations against plain decoding, with a table, traces and a report."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import Run, RunHeader
from ..stream import Sink
from .files import file_name, writable_file, writable_folder
from .generation import sampling_of
from .lab import Lab
from .mistakes import asked
from .outcome import INTERRUPTED, MISTAKE, OK, RED, Outcome, StreamJob

if TYPE_CHECKING:
    from ..bench.profile import Profile
    from ..summary import Comparison


def profile(lab: Lab, args: Namespace) -> StreamJob:
    """The blocks of a profile as a job; traces and report are written as and when it ends."""
    lab.check_idle("profile")
    folder = writable_folder(args.trace) if args.trace else None
    report = writable_file(args.report, ".html") if args.report else None
    engine = lab.engine_for(args)
    with asked():
        from ..bench.profile import profile as start

        blocks = start(
            engine, args.cells, args.configs, workload=args.workload, blocks=args.blocks, block_s=args.block_seconds,
            sampling=sampling_of(args),
        )
    title = f"profile of {args.workload}, {', '.join(str(c) for c in args.cells if c not in blocks.skipped)}"
    return StreamJob(
        "profile", title, blocks, lambda runs: _conclude(runs, blocks, report), _tracing(folder), compare=blocks.comparisons,
        notices=tuple(blocks.notices),
    )


def _tracing(folder: Path | None) -> Callable[[RunHeader], Sequence[Sink]]:
    def sinks_for(header: RunHeader) -> Sequence[Sink]:
        from ..trace import TraceWriter

        if folder is None:
            return ()
        name = file_name(header.cell, header.config, f"block{header.block}") + ".jsonl.gz"
        return (TraceWriter(folder / name, header, overwrite=True),)

    return sinks_for


def _conclude(runs: Sequence[Run], blocks: Profile, report: Path | None) -> Outcome:
    from ..view.report import write_report

    trusted = blocks.comparisons(runs)
    if report is not None:
        write_report(report, runs, comparisons=trusted)
    code = RED if blocks.mismatches else MISTAKE if blocks.skipped else OK
    code = INTERRUPTED if any(run.interrupted for run in runs) else code
    return Outcome(runs, words(trusted, blocks), data(runs, trusted, blocks), code)


def words(trusted: Sequence[Comparison], blocks: Profile) -> str:
    """The table, what is missing from it, and why."""
    from ..view.tables import render_table

    errors = [f"wrong tokens: {found}" for found in blocks.mismatches.values()]
    return "\n".join([render_table(trusted), "", *blocks.notices, *errors])


def data(runs: Sequence[Run], trusted: Sequence[Comparison], blocks: Profile) -> dict[str, Any]:
    """The same for machines."""
    return {
        "header": runs[0].header.to_dict() if runs else None,
        "comparisons": [comparison_data(c) for c in trusted],
        "skipped": {str(cell): reason for cell, reason in blocks.skipped.items()},
        "mismatches": [{**asdict(found), "cell": str(found.cell)} for found in blocks.mismatches.values()],
        "disturbed_blocks": {str(cell): sorted(found) for cell, found in blocks.disturbed.items()},
        "notices": blocks.notices,
    }


def comparison_data(c: Comparison) -> dict[str, Any]:
    """One row as plain data."""
    return {
        "cell": str(c.cell), "workload": c.workload, "config": c.config,
        "speedup": c.speedup.to_dict() if c.speedup else None,
        "break_even_acceptance_length": c.break_even_acceptance_length, "tokens_per_round": c.tokens_per_round,
        "verdict": c.verdict, "summary": c.summary.to_dict(),
    }  # fmt: skip
