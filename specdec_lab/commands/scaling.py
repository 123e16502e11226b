"""`bench scaling`: measure, or read a saved measurement again; then tables, SVG files and a row of the bench folder."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .bench_rows import keeper
from .files import writable_folder
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import INTERRUPTED, MISTAKE, OK, RED, Outcome
from .screen import Screen

if TYPE_CHECKING:
    from ..bench.scaling import Scaling

FILE = "scaling.jsonl"
# What describes a new measurement and so cannot go with --from. The parser leaves all of it at None.
OF_A_MEASUREMENT = (
    "batches", "lengths", "configs", "widths", "workload", "blocks", "block_seconds", "temperature", "verifier", "seed",
    "model", "draft", "device", "dtype", "kv_dtype", "runner", "draft_positions", "backend",
    "random_weights", "forced_acceptance", "tensor_parallel", "shard",
)  # fmt: skip


def scaling(lab: Lab, args: Namespace) -> Outcome:
    """The report; the exit code is 1 for wrong tokens, 2 for cells that could not run, 130 after an interrupt."""
    from ..bench.scaling import ScalingReport

    drawings = writable_folder(args.svg) if args.svg else None
    found = _measured(lab, args) if args.source is None else _saved(args)
    report = ScalingReport(found)
    paths = [] if drawings is None else [str(path) for path in report.write_svgs(drawings)]
    words = "\n".join([report.markdown if args.markdown else str(report), *(f"written: {path}" for path in paths)])
    return Outcome(report, words, {**report.to_dict(), "svg": paths}, _code(found, is_new=args.source is None))


def _code(found: Scaling, *, is_new: bool) -> int:
    if is_new and found.is_interrupted:
        return INTERRUPTED
    return RED if found.mismatches else MISTAKE if is_new and found.skipped else OK


def _saved(args: Namespace) -> Scaling:
    from ..bench.scaling import read_last

    given = [f"--{name.replace('_', '-')}" for name in OF_A_MEASUREMENT if getattr(args, name) is not None]
    given += ["--save"] if args.save else []
    if given:
        raise UserMistake(
            f"--from draws a saved measurement again and cannot change it: leave out {', '.join(given)}, or leave out --from"
        )
    with asked():
        return read_last(Path(args.source))


def _measured(lab: Lab, args: Namespace) -> Scaling:
    from ..bench.scaling import BATCHES, CONFIGS, LENGTHS, WIDTHS, Protocol, measure
    from ..workload import Sampling

    lab.check_idle("bench")
    keep = keeper(args, FILE)
    engine = lab.engine_for(args)
    with asked():
        usual = Protocol()
        found = measure(
            engine, args.batches or BATCHES, args.lengths or LENGTHS, CONFIGS if args.configs is None else args.configs,
            widths=args.widths or WIDTHS, workload=args.workload or "prose",
            sampling=Sampling(
                temperature=args.temperature or 0.0, seed=args.seed or 0, verifier=args.verifier or "rejection"
            ),
            protocol=Protocol(args.blocks or usual.blocks, args.block_seconds or usual.block_s), say=Screen(lab.err).say,
        )  # fmt: skip
    keep([found.to_dict()])  # before anything is drawn: a measurement costs minutes
    return found
