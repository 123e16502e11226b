"""What the instrumentation costs: the same rounds with and without it, in turns, on the same pair and prompts.

A ratio is printed only if both emitted the same tokens. Not known here: where results are kept or shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ..engine.loop import Engine
from ..records import Cell, SpecConfig
from ..summary import PairedRatio, paired_ratio
from ..workload import Workload
from .provenance import made_with, provenance
from .sessions import Sessions

if TYPE_CHECKING:
    from ..engine.loop import OpenSession
    from ..engine.models.loading import ModelPair

SCHEMA = "specdec_lab.overhead/1"
WARM_UP_ROUNDS = 2  # per run, not counted
DEFAULT_CONFIGS = (SpecConfig.off(), SpecConfig.parse("self:4+60/chain3"))


class OutputsDiffer(Exception):
    """Instrumented and bare rounds emitted different tokens: a fault of the engine, and no ratio is worth printing."""


@dataclass(frozen=True, slots=True)
class Overhead:
    """One configuration. `ratio` is instrumented over bare step time: mean over blocks of the ratio of medians."""

    cell: Cell
    config: str
    ratio: PairedRatio
    median_ratio: float
    step_s: float  # median of the bare rounds
    rounds: int

    def __str__(self) -> str:
        low, high = self.ratio.low, self.ratio.high
        interval = f" [{low:.4f}, {high:.4f}]" if self.ratio.num_blocks > 1 else ", one block gives no interval"
        return (
            f"{self.cell} {self.config}: {self.median_ratio:.4f} (median of {self.ratio.num_blocks} blocks; mean "
            f"{self.ratio.mean:.4f}{interval}), bare step {self.step_s * 1e3:.3f} ms, {self.rounds} rounds a run"
        )


@dataclass(frozen=True, slots=True)
class OverheadReport:
    """All configurations, and what the numbers depend on."""

    results: tuple[Overhead, ...]
    header: dict[str, Any]

    def __str__(self) -> str:
        made = f"{self.header['device']}, {made_with(self.header)}"
        title = "step time with instrumentation over step time without (1 = free; 95% interval over blocks)"
        return "\n".join([title, *map(str, self.results), made])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, one row of the bench folder."""
        rows = [
            {"cell": str(r.cell), "config": r.config, "ratio": r.ratio.to_dict(), "median_ratio": r.median_ratio,
             "bare_step_s": r.step_s, "rounds": r.rounds}
            for r in self.results
        ]  # fmt: skip
        return {"schema": SCHEMA, **self.header, "results": rows}


def overhead(
    pair: ModelPair, cell: Cell, configs: Sequence[SpecConfig] = DEFAULT_CONFIGS, *, rounds: int = 50, blocks: int = 8,
    workload: str | Callable[[Cell], Workload] = "prose", backend: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> OverheadReport:
    """Step times of an instrumented and a bare engine, in blocks of four runs: with, without, without, with."""
    if rounds < 1 or blocks < 1:
        raise ValueError(f"overhead needs at least 1 round and 1 block, got {rounds} and {blocks}")
    engines = {flag: Engine(pair, backend, instrument=flag) for flag in (True, False)}
    longest = (rounds + WARM_UP_ROUNDS) * (1 + max(config.depth for config in configs))
    sessions = {flag: Sessions(engine, workload, max_new_tokens=longest).open(cell) for flag, engine in engines.items()}
    results = []
    for config in configs:
        results.append(_measure(sessions, cell, config, rounds, blocks))
        say(str(results[-1]))
    identity = engines[True].identity()
    header = {
        **provenance(), "device": identity.device, "base": dict(identity.base),
        "workload": workload if isinstance(workload, str) else "own",
    }  # fmt: skip
    return OverheadReport(tuple(results), header)


def _measure(sessions: dict[bool, OpenSession], cell: Cell, config: SpecConfig, rounds: int, blocks: int) -> Overhead:
    for session in sessions.values():
        _run(session, config, rounds)
    medians: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(blocks):
        walls: dict[bool, list[float]] = {True: [], False: []}
        tokens = []
        for is_instrumented in (True, False, False, True):
            spent, emitted = _run(sessions[is_instrumented], config, rounds)
            walls[is_instrumented] += spent
            tokens.append(emitted)
        if any(emitted != tokens[0] for emitted in tokens):
            raise OutputsDiffer(f"{cell} {config}: rounds with and without instrumentation emitted different tokens")
        for is_instrumented, spent in walls.items():
            medians[is_instrumented].append(median(spent))
    ratios = [with_s / bare_s for with_s, bare_s in zip(medians[True], medians[False], strict=True)]
    return Overhead(
        cell, str(config), paired_ratio(medians[False], medians[True]), median(ratios), median(medians[False]), rounds
    )


def _run(session: OpenSession, config: SpecConfig, rounds: int) -> tuple[list[float], list[tuple[tuple[int, ...], ...]]]:
    """Wall seconds of the rounds after the warm-up, and all tokens."""
    walls, tokens = [], []
    with session.steps(config) as stream:
        for step in stream:
            if step.kind == "round":
                walls.append(step.wall_s)
                tokens.append(step.tokens)
            if len(walls) == rounds + WARM_UP_ROUNDS:
                break
    if len(walls) <= WARM_UP_ROUNDS:
        raise ValueError(f"{config}: only {len(walls)} rounds ran, more than {WARM_UP_ROUNDS} are needed")
    return walls[WARM_UP_ROUNDS:], tokens
