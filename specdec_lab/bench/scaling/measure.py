"""Measure how times grow over a grid of batches and lengths: plain decoding and speculation in interleaved blocks per cell.

In a few spread cells chains of further lengths run in the same blocks, for the verify time at their widths: a round of
`chainN` verifies N + 1 tokens whoever drafted them. They are drafted by the draft model, which always proposes a whole chain
(a lookup drafter without a match proposes nothing), or by the target itself where none is loaded; only their verify time
is used. Not known here: what is concluded from the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import machine, sensors
from ...records import Cell, Run, RunHeader, SpecConfig, StepRecord
from ...stream import record
from ...summary import Comparison, acceptance, pool, spread, steady_rounds
from ...workload import Sampling, Workload
from ..judges import OFF
from ..profile import PROMPTS_READ, Profile, check_configs
from ..sessions import MAX_NEW_TOKENS, Sessions
from .samples import MIN_ROUNDS, Point, Scaling, VerifyTime

if TYPE_CHECKING:
    from ...engine.loop import Engine

BATCHES, LENGTHS = (1, 2, 4, 8, 16), (1024, 4096, 8192)
CONFIGS = tuple(map(SpecConfig.parse, ("self:4+60/chain3", "self:4+252/chain4", "model:4+124/chain3")))
WIDTHS = (1, 2, 4, 5, 8, 9, 16)  # verified tokens
PROBE_VIEW = "4+60"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How long each cell is measured: undisturbed blocks that are wanted, and engine seconds of one run in them."""

    blocks: int = 4
    block_s: float = 0.5
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self) -> None:
        if self.blocks < 1 or not self.block_s > 0:
            raise ValueError(f"scaling needs at least 1 block of more than 0 s, got {self.blocks} of {self.block_s} s")


def measure(
    engine: Engine, batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS,
    configs: Sequence[SpecConfig] = CONFIGS, *, widths: Sequence[int] = WIDTHS,
    workload: str | Callable[[Cell], Workload] = "prose", sampling: Sampling | None = None,
    protocol: Protocol | None = None, say: Callable[[str], None] = lambda line: None,
) -> Scaling:  # fmt: skip
    """Every configuration in every cell beside plain decoding. An interrupt ends it early and keeps what was measured.

    widths  verified tokens per sequence to be measured in the spread cells, whatever the configurations verify
    raises  ValueError or UnsupportedConfig, before anything is measured, for what cannot be measured or concluded from;
            KeyboardInterrupt when nothing was measured before the interrupt
    """
    protocol, sampling = protocol or Protocol(), sampling or {}
    configs = tuple(dict.fromkeys(c for c in configs if not c.is_off))
    _check_question(batches, lengths, configs, widths)
    probes = _probes(engine, configs, widths)
    check_configs(engine, (*configs, *probes))
    sessions = Sessions(engine, workload, max_new_tokens=protocol.max_new_tokens, sampling=sampling)
    cells = [Cell(b, n) for n in sorted(set(lengths)) for b in sorted(set(batches))]
    skipped = {str(cell): why for cell in cells if (why := sessions.why_not(cell)) is not None}
    runnable = [cell for cell in cells if str(cell) not in skipped]
    _check_runnable(runnable, skipped)
    spread = spread_cells(runnable)
    load_before = _load()
    work = _Work(engine, sessions, protocol, sampling, skipped, say)
    try:
        for cell in runnable:
            if not work.cell(cell, configs, probes if cell in spread else ()):
                break
    except KeyboardInterrupt:  # between two cells
        work.is_interrupted = True
    if not work.points:
        if work.is_interrupted:
            raise KeyboardInterrupt
        raise ValueError(f"no cell gave enough rounds. {'; '.join(work.notices)}")
    header = _header(work.headers[0], engine, protocol, (load_before, _load()))
    return Scaling(
        header, tuple(work.points), skipped, tuple(work.mismatches), tuple(work.busy), tuple(work.notices), work.is_interrupted
    )


def _check_question(
    batches: Sequence[int], lengths: Sequence[int], configs: Sequence[SpecConfig], widths: Sequence[int]
) -> None:
    for what, values, option in (("batch sizes", batches, "--batches 1,8"), ("lengths", lengths, "--lengths 1k,4k")):
        if len(set(values)) < 2:
            given = ", ".join(map(str, values)) or "none"
            raise ValueError(
                f"scaling needs at least 2 {what} to see how time grows with them, got {given}; for example {option}"
            )
    if not configs:
        raise ValueError("scaling compares speculation with plain decoding: name a configuration besides off")
    if any(not 1 <= width <= 64 for width in widths):
        raise ValueError(f"a round verifies 1 to 64 tokens here, got widths {', '.join(map(str, widths))}")


def _check_runnable(runnable: Sequence[Cell], skipped: dict[str, str]) -> None:
    reasons = "; ".join(f"{cell}: {why}" for cell, why in skipped.items())
    if not runnable:
        raise ValueError(f"none of these cells can run. {reasons}")
    if len({c.batch for c in runnable}) < 2 or len({c.length for c in runnable}) < 2:
        kept = ", ".join(map(str, runnable))
        raise ValueError(f"only {kept} can run here, which does not show growth with both batch and length. {reasons}")


def _probes(engine: Engine, configs: Sequence[SpecConfig], widths: Sequence[int]) -> tuple[SpecConfig, ...]:
    """Chains for the widths that neither plain decoding nor a configuration that always drafts in full verifies."""
    known = {1} | {c.num_nodes + 1 for c in configs if c.drafter != "ngram"}
    drafter = "model" if engine.pair.draft else "self"
    return tuple(SpecConfig.parse(f"{drafter}:{PROBE_VIEW}/chain{w - 1}") for w in sorted(set(widths)) if w not in known)


def spread_cells(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Where fixed time, computing and KV each dominate: least of both, many short sequences, most of both."""
    least = min(cells, key=lambda c: (c.batch * c.length, c.batch))
    short = max(cells, key=lambda c: (c.batch, -c.length))
    most = max(cells, key=lambda c: (c.batch * c.length, c.batch))
    return tuple(dict.fromkeys((least, short, most)))


class _Work:
    """Collects points cell by cell, so that whatever ends the measurement loses none that was finished."""

    def __init__(
        self, engine: Engine, sessions: Sessions, protocol: Protocol, sampling: Sampling, skipped: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._sessions, self._protocol, self._sampling = engine, sessions, protocol, sampling
        self._say = say
        self.skipped = skipped
        self.points: list[Point] = []
        self.headers: list[RunHeader] = []
        self.mismatches: list[str] = []
        self.busy: list[str] = []
        self.notices: list[str] = []
        self.is_interrupted = False

    def cell(self, cell: Cell, configs: Sequence[SpecConfig], probes: Sequence[SpecConfig]) -> bool:
        """Measure a cell; False when an interrupt asks to stop."""
        why_not = self._sessions.why_not(cell)  # free memory may have changed since the plan was made
        if why_not is not None:
            self.skipped[str(cell)] = why_not
            return True
        sampling = self._sampling
        blocks = Profile(
            (cell,), (OFF, *configs, *probes), self._sessions, blocks=self._protocol.blocks, block_s=self._protocol.block_s,
            seed=sampling.get("seed", 0),
            is_gated=sampling.get("temperature", 0.0) == 0 or sampling.get("verifier") == "coupled",
        )
        runs: list[Run] = []
        try:
            self._drain(blocks, runs)
        except KeyboardInterrupt:  # while prompts are read, or in a run: what ended before is used
            self.is_interrupted = True
            self.notices.append(f"{cell}: interrupted; the blocks before are used, later cells were not measured")
        except MemoryError as error:
            blocks.skipped[cell] = str(error)
        finally:
            self._sessions.forget(cell)
        self._take(cell, blocks, runs, probes)
        return not self.is_interrupted

    def _drain(self, blocks: Profile, runs: list[Run]) -> None:
        for stream in blocks:
            runs.append(record(stream))
            if runs[-1].interrupted:
                raise KeyboardInterrupt

    def _take(self, cell: Cell, blocks: Profile, runs: Sequence[Run], probes: Sequence[SpecConfig]) -> None:
        self.notices += [notice for notice in blocks.notices if PROMPTS_READ not in notice]
        self.mismatches += [str(found) for found in blocks.mismatches.values()]
        self.busy += [str(cell) for cell in blocks.busy]
        if cell in blocks.skipped:
            self.skipped[str(cell)] = blocks.skipped[cell]
            return
        kept = [run for run in runs if run.header.block not in blocks.disturbed.get(cell, ())]
        found = points_of(kept, blocks.comparisons(runs), tuple(map(str, blocks.configs)), frozenset(map(str, probes)))
        self.headers += [run.header for run in kept[:1]]
        self.points += found
        self._say(cell_line(cell, found))


def cell_line(cell: Cell, points: Sequence[Point]) -> str:
    """How far the measurement is, in one line."""
    plain = [f"plain step {p.step_s.median * 1e3:.3f} ms" for p in points if p.config == "off"]
    gains = [f"{p.config} {p.speedup.mean:.2f}x" for p in points if p.speedup and not p.is_probe]
    return f"{cell}: {', '.join([*plain, *gains]) or 'nothing measured'}"


def points_of(
    runs: Sequence[Run], comparisons: Sequence[Comparison], order: Sequence[str], probes: frozenset[str]
) -> tuple[Point, ...]:
    """The points of one cell: configurations that may be quoted and ran long enough; none without plain decoding.

    comparisons  of these runs; a configuration that is not among them emitted wrong tokens
    """
    points = []
    for comparison in sorted(comparisons, key=lambda c: order.index(c.config)):
        point = _point([run for run in runs if run.header.config == comparison.config], comparison)
        if point is not None:
            points.append(replace(point, is_probe=comparison.config in probes))
    return tuple(points) if any(point.config == "off" for point in points) else ()


def _point(runs: Sequence[Run], comparison: Comparison) -> Point | None:
    rounds = steady_rounds(runs)
    verify = _verify_times(rounds)
    if not verify:
        return None
    config = SpecConfig.parse(comparison.config)
    blocks = sorted({run.header.block for run in runs}, key=lambda block: -1 if block is None else block)
    return Point(
        cell=comparison.cell, config=comparison.config, step_s=spread([s.wall_s for s in rounds]), verify=verify,
        draft_s=None if config.is_off else spread([s.draft_s / config.depth for s in rounds]),
        draft_kv_bytes=0.0 if config.is_off else _mean([s.draft_kv_read_bytes / config.depth for s in rounds]),
        overhead_s=spread([s.accept_s + s.commit_s + s.host_s for s in rounds]),
        context_tokens=_mean([_mean(s.context_tokens) for s in rounds]),
        tokens_per_round=_mean([s.num_emitted / s.batch for s in rounds]),
        acceptance_histogram=acceptance(s for run in runs for s in run.rounds).histogram, speedup=comparison.speedup,
        block_tokens_per_s=tuple(pool([r for r in runs if r.header.block == block]).tokens_per_s for block in blocks),
        labels=comparison.summary.labels,
    )


def _verify_times(rounds: Sequence[StepRecord]) -> tuple[VerifyTime, ...]:
    """Per query width; a width of too few rounds is left out."""
    by_width: dict[int, list[StepRecord]] = {}
    for step in rounds:
        by_width.setdefault(step.query_tokens, []).append(step)
    return tuple(
        VerifyTime(width, spread([s.verify_s for s in steps]), _mean([s.kv_read_bytes for s in steps]))
        for width, steps in sorted(by_width.items())
        if len(steps) >= MIN_ROUNDS
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _load() -> float | None:
    load = sensors.load_average()
    return None if isinstance(load, sensors.Absent) else load


def _header(run: RunHeader, engine: Engine, protocol: Protocol, load: tuple[float | None, float | None]) -> dict[str, Any]:
    """What the numbers depend on, as plain data."""
    pair = engine.pair
    return {
        "created": machine.now(), "device": run.machine["device"],
        "machine": dict(run.machine), "versions": dict(run.versions), "commit": run.commit, "backend": run.backend,
        "workload": run.workload, "temperature": run.temperature, "verifier": run.verifier, "seed": run.seed,
        "target": {**run.target, "shape": asdict(pair.target.shape)},
        "draft": {**run.draft, "shape": asdict(pair.draft.shape)} if pair.draft and run.draft else None,
        "ceilings": dict(run.ceilings), "blocks": protocol.blocks, "block_s": protocol.block_s, "load_average": list(load),
    }  # fmt: skip
