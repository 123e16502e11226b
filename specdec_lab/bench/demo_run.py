"""The main job from end to end on this machine: profile a cell where speculation can win and one where it can lose, on text
that copies and on text that does not, tune a small grid, write everything down, and say in plain words what was found.

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
from ..summary import Comparison
from ..trace import write_perfetto, write_run
from ..workload import Sampling
from .doctor import examine
from .judges import Mismatch
from .profile import Profile, profile
from .tuning import prepare

if TYPE_CHECKING:
    from ..engine.loop import Engine
    from ..tune import Progress

WORKLOADS = {"prose": "the Python manual", "revision": "a text, then an edited copy of it: much is worth copying"}
TUNED = "revision"
# Greedy text of so small a model loops, which flatters every drafter. Coupled gives plain sampling's own tokens, to be checked.
SAMPLING = Sampling(temperature=0.8, verifier="coupled", seed=0)
SMALL, LARGE = Cell(1, 1024), Cell(8, 4096)  # KV that fits in a cache, and KV that is most of the time of a step
CONFIGS = ("off", "self:4+60/chain3", "model:4+124/chain3", "ngram/chain6")
BLOCKS, BLOCK_S = 4, 0.5
GRID = ((1, 8), (1024, 4096))
BUDGET_S, TOTAL_S = 120.0, 240.0
HOW = f"sampled at temperature {SAMPLING['temperature']:g}; every configuration must give the tokens of plain sampling"
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

    machine: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    mismatches: tuple[Mismatch, ...]
    notices: tuple[str, ...]
    busy: frozenset[tuple[Cell, str]]  # cell and workload of which no number should be quoted
    policy: Policy
    paths: dict[str, Path]
    seconds: float

    def __str__(self) -> str:
        places = dict.fromkeys((c.cell, c.workload) for c in self.comparisons)
        found = [_place_words([c for c in self.comparisons if (c.cell, c.workload) == place]) for place in places]
        errors = [f"wrong tokens: {mismatch}" for mismatch in self.mismatches]
        paths = [f"  {self.paths[name]}  {what}" for name, (_, what) in PARTS.items()]
        return "\n".join([
            *self.machine, HOW, "", *(f"{words}\n" for words in found), *self.notices, *errors, self.outcome(), "",
            *_policy_words(self.policy), "", "what was written:", *paths, "", f"measured in {self.seconds:.0f} s",
        ])  # fmt: skip

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def outcome(self) -> str:
        """Where speculation won and where it did not, by the best configuration of each place."""
        best: dict[tuple[Cell, str], Comparison] = {}
        for c in self.comparisons:
            place = (c.cell, c.workload)
            if c.speedup is not None and place not in self.busy:
                best[place] = max(best.get(place, c), c, key=_mean)
        won = [c for c in best.values() if c.speedup and c.speedup.low > 1]
        others = [c for c in best.values() if c not in won]
        lines = [f"  won in {c.cell} {c.workload}: {c.config} {_interval(c)} plain decoding" for c in won]
        lines += [f"  not in {c.cell} {c.workload}: the best was {c.config}, {c.verdict}" for c in others]
        lines += [f"  unknown in {cell} {workload}: other work kept this machine busy" for cell, workload in sorted(self.busy)]
        return "\n".join([f"Speculation paid in {len(won)} of {len(best) + len(self.busy)} places.", *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "machine": list(self.machine), "outcome": self.outcome(), "seconds": self.seconds,
            "busy": [f"{cell} {workload}" for cell, workload in sorted(self.busy)],
            "cells": [
                {"cell": str(c.cell), "workload": c.workload, "config": c.config, "tokens_per_s": c.summary.tokens_per_s,
                 "speedup": c.speedup.to_dict() if c.speedup else None, "verdict": c.verdict}
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
    machine = _machine_words(engine)
    for line in machine:
        say(f"1/4  {line}")
    runs, trusted, profiles = _profile(engine, say)
    left_s = TOTAL_S - (time.monotonic() - began)  # a busy machine, on which blocks are repeated, leaves less
    policy = _tune(engine, paths, folder, min(budget_s, max(left_s, budget_s / 2)), say)
    say("4/4  writing")
    _write(runs, trusted, policy, paths)
    mismatches = tuple(found for blocks in profiles for found in blocks.mismatches.values())
    told = [(name, line) for name, blocks in zip(WORKLOADS, profiles, strict=True) for line in blocks.notices]
    notices = tuple(f"{name} {line}" for name, line in told if "prompts read" not in line)
    busy = frozenset((cell, name) for name, blocks in zip(WORKLOADS, profiles, strict=True) for cell in blocks.busy)
    return DemoResult(machine, trusted, mismatches, notices, busy, policy, paths, time.monotonic() - began)


def _machine_words(engine: Engine) -> tuple[str, ...]:
    """What this machine is, and whether other work disturbs it."""
    diagnosis = examine(engine)
    disturbed = [f for f in diagnosis.findings if f.topic == "load" and f.advice]
    return diagnosis.headline, *(f"note: {f.what}. {f.advice}" for f in disturbed)


def _profile(engine: Engine, say: Callable[[str], None]) -> tuple[list[Run], tuple[Comparison, ...], list[Profile]]:
    """Every run of both workloads, the comparisons that may be trusted, and what the profiles noticed."""
    configs = [c for c in CONFIGS if engine.pair.draft is not None or not c.startswith("model")]
    say(f"2/4  profiling {', '.join(configs)} in {BLOCKS} interleaved blocks of {BLOCK_S:g} s, {HOW}")
    runs: list[Run] = []
    trusted: list[Comparison] = []
    profiles = []
    for name, meaning in WORKLOADS.items():
        say(f"     on {name}: {meaning}")
        blocks = profile(engine, (SMALL, LARGE), configs, workload=name, blocks=BLOCKS, block_s=BLOCK_S, sampling=SAMPLING)
        fresh = [record(stream) for stream in blocks]
        runs += fresh
        trusted += blocks.comparisons(fresh)
        profiles.append(blocks)
    return runs, tuple(trusted), profiles


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
        engine, batches, lengths, budget_s, workload=TUNED, database=paths["records"], run_dir=folder / "tune",
        sampling=SAMPLING,
    )
    say(f"3/4  tuning {len(tuning.plan.cells)} cells of {TUNED} in at most {budget_s:.0f} s")

    def report(progress: Progress) -> None:
        if progress.stage == "cell":
            won = "plain decoding" if progress.best == "off" else f"{progress.best} {progress.speedup:.2f}x"
            say(f"     {progress.cell} {progress.status}: {won}")

    policy = tuning.run(report)
    policy.save(paths["policy"])
    return policy


def _write(runs: Sequence[Run], trusted: Sequence[Comparison], policy: Policy, paths: dict[str, Path]) -> None:
    """Report, and the trace and timeline of one block: of the best configuration in the larger cell."""
    from ..view.report import write_report

    write_report(paths["report"], runs, comparisons=trusted, policy=policy.to_dict(), title="The demo: where speculation pays")
    candidates = [c for c in trusted if c.speedup is not None] or list(trusted)
    best = max(candidates, key=lambda c: (c.cell == LARGE, _mean(c)))
    wanted = (best.cell, best.workload, best.config)
    shown = next(run for run in runs if (run.header.cell, run.header.workload, run.header.config) == wanted)
    write_run(shown, paths["trace"], overwrite=True)
    write_perfetto(shown, paths["timeline"])


def _mean(c: Comparison) -> float:
    return c.speedup.mean if c.speedup is not None else 0.0


def _interval(c: Comparison) -> str:
    assert c.speedup is not None
    return f"{c.speedup.mean:.2f}x ({c.speedup.low:.2f} to {c.speedup.high:.2f})"


def _place_words(comparisons: Sequence[Comparison]) -> str:
    """A paragraph: plain decoding first, then what every configuration did and why."""
    cell, workload = comparisons[0].cell, comparisons[0].workload
    sequences = "1 sequence" if cell.batch == 1 else f"{cell.batch} sequences"
    lines = [f"{cell} {workload}: {sequences} of {cell.length} tokens, {WORKLOADS.get(workload, 'own text')}"]
    for c in sorted(comparisons, key=lambda c: (c.config != "off", c.config)):
        speed = f"  {c.config.ljust(20)} {c.summary.tokens_per_s:,.0f} tokens/s"
        if c.config == "off":
            labels = f" [{', '.join(c.summary.labels)}]" if c.summary.labels else ""
            lines.append(f"{speed}, {sum(c.summary.parts_s.values()) * 1e3:.2f} ms a step: plain decoding{labels}")
        else:
            lines.append(f"{speed}, {c.verdict}")
    return "\n".join(lines)


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
