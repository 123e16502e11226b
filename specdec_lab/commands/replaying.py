"""`replay`: recorded runs as the streams they were."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..records import Run, StepRecord
from ..stream import Stream
from .files import writable_file
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import Outcome, StreamJob
from .profiling import comparison_data

TRACES = (".jsonl", ".jsonl.gz")


def replay(lab: Lab, args: Namespace) -> StreamJob:
    """The traces as streams in the order of their recording, at the pace they had then (times `--speed`), or at once."""
    from .. import trace

    paths = trace_files(args.traces)
    timeline = writable_file(args.perfetto, ".json", ".json.gz") if args.perfetto else None
    if timeline is not None and len(paths) != 1:
        raise UserMistake(f"--perfetto writes the timeline of one trace, {len(paths)} were given")
    speed = args.speed or (1.0 if lab.is_notebook else None)
    with asked():
        streams = sorted((trace.replay(path) for path in paths), key=lambda s: (s.header.created, s.header.block or 0))
    title = f"replay of {paths[0].name}" if len(paths) == 1 else f"replay of {len(paths)} recorded runs"
    paced_streams = [paced(stream, speed) for stream in streams] if speed else streams
    return StreamJob("replay", title, paced_streams, lambda runs: _conclude(runs, timeline))


def trace_files(names: Sequence[str]) -> list[Path]:
    """The files themselves, and those in folders by name."""
    paths: list[Path] = []
    for name in map(Path, names):
        found = sorted(p for p in name.iterdir() if p.name.endswith(TRACES)) if name.is_dir() else [name]
        if not found:
            raise UserMistake(f"the folder {name} holds no trace ({' or '.join(TRACES)})")
        paths += found
    for path in paths:
        if not path.is_file():
            raise UserMistake(f"there is no trace at {path}; run or profile with --trace writes one")
    return paths


def paced(stream: Stream, speed: float, wait: Callable[[float], None] = time.sleep) -> Stream:
    """The stream at `speed` times the pace at which it was recorded."""

    def steps() -> Iterator[StepRecord]:
        with stream:
            for step in stream:
                wait(step.wall_s / speed)
                yield step

    return Stream(stream.header, steps())


def _conclude(runs: Sequence[Run], timeline: Path | None) -> Outcome:
    from ..summary import compare
    from ..trace import write_perfetto
    from ..view.tables import render_table

    if timeline is not None and runs:
        write_perfetto(runs[0], timeline)
    comparisons = compare([run for run in runs if run.rounds])
    headers = [{"header": run.header.to_dict(), "num_steps": len(run.steps), "interrupted": run.interrupted} for run in runs]
    data = {"runs": headers, "comparisons": [comparison_data(c) for c in comparisons]}
    return Outcome(runs, render_table(comparisons), data)
