"""The main job from end to end on this machine: profile a cell where speculation can win and one where it loses, tune a
small grid, write everything down, and say in plain words what was found.

Everything that is said was measured in this run. Nothing of an earlier run is used, and the committed database is left
alone. Not known here: the command line.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..policy import Policy
from ..records import Cell, Run
from ..stream import record
from ..summary import Comparison, compare
from ..trace import write_perfetto, write_run
from .doctor import examine
from .profile import Mismatch, profile
from .tuning import prepare

if TYPE_CHECKING:
    from ..engine.loop import Engine
    from ..tune import Progress

WORKLOAD = "revision"  # a text, then an edited copy of it: much is worth copying, as in editing and quoting
WINS, LOSES = Cell(8, 4096), Cell(1, 1024)
CONFIGS = ("off", "self:4+60/chain3", "model:4+124/chain3", "ngram/chain6")
BLOCKS, BLOCK_S = 5, 0.5
GRID = ((1, 8), (1024, 4096))
BUDGET_S = 75.0
MARKER = "demo.json"  # what a folder of the demo is known by, before anything in it is replaced
PARTS = {
    "report": ("report.html", "tables and pictures of every block, for a browser"),
    "trace": ("trace.jsonl.gz", "every round of one block, to be replayed: specdec-lab replay"),
    "timeline": ("timeline.json.gz", "the same block for ui.perfetto.dev"),
    "policy": ("policy.json", "which configuration to run at which batch and length: specdec-lab policy show --policy"),
    "records": ("tuning_db", "every measurement of the tuner, one line each"),
}


class NotADemoFolder(ValueError):
    """A folder that holds something which the demo did not write."""


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found. `str()` says it in plain words."""

    machine: str
    comparisons: tuple[Comparison, ...]
    mismatches: tuple[Mismatch, ...]
    notices: tuple[str, ...]
    policy: Policy
    paths: dict[str, Path]
    seconds: float

    def __str__(self) -> str:
        cells = dict.fromkeys(c.cell for c in self.comparisons)
        found = [line for cell in cells for line in _cell_words(cell, [c for c in self.comparisons if c.cell == cell])]
        errors = [f"wrong tokens: {mismatch}" for mismatch in self.mismatches]
        notices = [line for line in self.notices if "skipped" in line]
        places = [f"  {self.paths[name]}  {what}" for name, (_, what) in PARTS.items()]
        return "\n".join([
            self.machine, "", *found, *notices, *errors, self.outcome(), "", *_policy_words(self.policy), "",
            "what was written:", *places, "", f"measured in {self.seconds:.0f} s",
        ])  # fmt: skip

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def outcome(self) -> str:
        """One sentence: where speculation won, or that it won nowhere, with the nearest miss."""
        measured = [c for c in self.comparisons if c.speedup is not None]
        won = [c for c in measured if c.speedup is not None and c.speedup.low > 1]
        if won:
            best = max(won, key=_mean)
            times = f"{_mean(best):.2f} times as fast as plain decoding"
            return f"Speculation won: {best.config} decoded {times} in cell {best.cell}."
        if not measured:
            return "Nothing could be compared with plain decoding."
        best = max(measured, key=_mean)
        return f"Speculation won in neither cell. The best was {best.config} in cell {best.cell}: {best.verdict}."

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "machine": self.machine, "outcome": self.outcome(), "seconds": self.seconds,
            "cells": [
                {"cell": str(c.cell), "config": c.config, "tokens_per_s": c.summary.tokens_per_s, "verdict": c.verdict,
                 "speedup": c.speedup.to_dict() if c.speedup else None}
                for c in self.comparisons
            ],
            "mismatches": [str(mismatch) for mismatch in self.mismatches], "policy": self.policy.headline(),
            "paths": {name: str(path) for name, path in self.paths.items()},
        }  # fmt: skip


def run_demo(
    engine: Engine, folder: Path, *, budget_s: float = BUDGET_S, say: Callable[[str], None] = lambda line: None
) -> DemoResult:
    """Do the main job with this engine and write everything below `folder`."""
    began = time.monotonic()
    paths = fresh_folder(folder)
    machine = examine(engine).headline
    say(f"1/4  {machine}")
    configs = [c for c in CONFIGS if c != CONFIGS[2] or engine.pair.draft is not None]
    blocks = profile(engine, (LOSES, WINS), configs, workload=WORKLOAD, blocks=BLOCKS, block_s=BLOCK_S)
    say(f"2/4  profiling {LOSES} and {WINS}: {', '.join(configs)}; {BLOCKS} interleaved blocks of {BLOCK_S:g} s each")
    runs = [record(stream) for stream in blocks]
    trusted = blocks.trusted(compare(runs))
    policy = _tune(engine, paths, folder, budget_s, say)
    say("4/4  writing")
    _write(runs, trusted, policy, paths)
    return DemoResult(
        machine, trusted, tuple(blocks.mismatches.values()), tuple(blocks.notices), policy, paths, time.monotonic() - began
    )


def fresh_folder(folder: Path) -> dict[str, Path]:
    """The places to write to, those of an earlier demo removed; a folder with anything else in it is refused."""
    paths = {name: folder / file for name, (file, _) in PARTS.items()}
    marker, ours = folder / MARKER, {MARKER, "tune", *(file for file, _ in PARTS.values())}
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found and (not marker.exists() or found - ours):
        strange = sorted(found - ours) or sorted(found)
        raise NotADemoFolder(f"{folder} holds {strange[0]}, which the demo did not write; name an empty folder with --out")
    for path in (*paths.values(), folder / "tune"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"schema": "specdec_lab.demo/1"}) + "\n")
    return paths


def _tune(engine: Engine, paths: dict[str, Path], folder: Path, budget_s: float, say: Callable[[str], None]) -> Policy:
    batches, lengths = GRID
    tuning = prepare(
        engine, batches, lengths, budget_s, workload=WORKLOAD, database=paths["records"], run_dir=folder / "tune"
    )
    say(f"3/4  tuning {len(tuning.plan.cells)} cells in at most {budget_s:.0f} s")

    def report(progress: Progress) -> None:
        if progress.stage == "cell":
            won = "plain decoding" if progress.best == "off" else f"{progress.best} {progress.speedup:.2f}x"
            say(f"     {progress.cell} {progress.status}: {won}")

    policy = tuning.run(report)
    policy.save(paths["policy"])
    return policy


def _write(runs: Sequence[Run], trusted: Sequence[Comparison], policy: Policy, paths: dict[str, Path]) -> None:
    """Report, and the trace and timeline of the block that shows most: the best configuration of the larger cell."""
    from ..view.report import write_report

    write_report(paths["report"], runs, comparisons=trusted, policy=policy.to_dict(), title="The demo: where speculation pays")
    candidates = [c for c in trusted if c.speedup is not None] or list(trusted)
    best = max(candidates, key=lambda c: (c.cell == WINS, _mean(c)))
    shown = next(run for run in runs if (run.header.cell, run.header.config) == (best.cell, best.config))
    write_run(shown, paths["trace"], overwrite=True)
    write_perfetto(shown, paths["timeline"])


def _mean(c: Comparison) -> float:
    return c.speedup.mean if c.speedup is not None else 0.0


def _cell_words(cell: Cell, comparisons: Sequence[Comparison]) -> list[str]:
    """A paragraph per cell: plain decoding first, then what every configuration did and why."""
    sequences = "1 sequence" if cell.batch == 1 else f"{cell.batch} sequences"
    lines = [f"{cell}: {sequences} of {cell.length} tokens"]
    for c in comparisons:
        if c.config == "off":
            labels = f" ({', '.join(c.summary.labels)})" if c.summary.labels else ""
            step_ms = sum(c.summary.parts_s.values()) * 1e3
            speed = f"{c.summary.tokens_per_s:,.0f} tokens/s, {step_ms:.2f} ms a step"
            lines.append(f"  {'off'.ljust(20)} {speed}: plain decoding{labels}")
    for c in comparisons:
        if c.config != "off":
            lines.append(f"  {c.config.ljust(20)} {c.summary.tokens_per_s:,.0f} tokens/s, {c.verdict}")
    return [*lines, ""]


def _policy_words(policy: Policy) -> list[str]:
    """What the tuner concluded, cell by cell."""
    lines = [f"The tuner's policy: {policy.headline()}."]
    for row in policy.table:
        if not row.is_decided:
            lines.append(f"  {row.cell}: {row.state}, {row.reason}")
        elif row.config == "off":
            lines.append(f"  {row.cell}: plain decoding; nothing was confirmed to be faster")
        else:
            low, high = row.speedup_ci95 or (0.0, 0.0)
            lines.append(f"  {row.cell}: {row.config}, {row.speedup:.2f}x (95% interval {low:.2f} to {high:.2f})")
    labels = [label for label in policy.header["labels"] if label != "KV fits in cache"]
    return [*lines, *([f"  read with care: {', '.join(labels)}"] if labels else [])]
