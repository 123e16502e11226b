"""The attention kernel's own table: every back end, every number of queries, in turns, in one process.

No speed without a green check: first the conformance suite, then one row of every call that is going to be timed, against
float64. A plan is made outside the clock and used inside it, as the engine does. Not known here: how results are shown.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from .. import machine, sensors
from ..engine import conformance
from ..engine.attention import AttentionBackend, Need, Reads
from ..engine.cache import CacheTooLarge, KvCache
from ..engine.calibrate import calibrate
from ..engine.conformance import Corner, Situation, meaning
from ..engine.conformance.cases import ROUND_QUERIES, chain
from ..engine.conformance.judging import allowed_error, worst_row
from ..engine.conformance.report import NOTHING_RAN, RED, Report
from ..engine.threads import torch_threads
from ..records import KvView, TreeShape
from ..summary import spread
from .attention_results import BUSY, CACHE_UNKNOWN, FITS, TOO_FAST, AttentionReport, Setting, Timing
from .kernel_shapes import BLOCKS, CALLS, DTYPES, QUERIES, SHAPES, TREE, KernelShape
from .kernel_targets import contestants
from .neighbours import busy_s, other_cores
from .provenance import provenance

WARM_UP_BLOCKS = 1
COLD = 4  # times the last-level cache: what other layers bring through it before a layer is read again
MAX_LAYERS = 256
USUAL_CACHE_BYTES = 64 << 20  # taken where the machine does not tell
BUSY_SHARE, BUSY_CORES = 1 / 1.1, 0.2  # our CPU time over wall time below the one; cores that others had, above the other
FASTEST_SHARE = 1.03  # of the read stream: memory does not give more


class AttentionIsRed(Exception):
    """A back end computes something else than attention, so its speed means nothing; the message names the case."""


def read_ceiling(threads: int) -> float:
    """Bytes/s of a read stream on so many threads, measured once per process."""
    with torch_threads(threads):
        return calibrate("cpu", threads).read_bytes_per_s


def load_average() -> float | None:
    """Processes that ran or waited in the last minute, None where the system does not tell."""
    load = sensors.load_average()
    return None if isinstance(load, sensors.Absent) else load


@dataclass(frozen=True, slots=True)
class Instruments:
    """What the machine tells; injected in tests."""

    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.process_time
    read_bytes_per_s: Callable[[int], float] = read_ceiling
    cache_bytes: int | None = field(default_factory=lambda: machine.facts()["last_level_cache_bytes"])
    load: Callable[[], float | None] = load_average
    busy_s: Callable[[], float | None] = busy_s


def attention(
    shapes: Sequence[KernelShape] = SHAPES, *, queries: Sequence[int] = QUERIES, tree: TreeShape | None = TREE,
    dtypes: Sequence[str] = DTYPES, threads: Sequence[int] | None = None, blocks: int = BLOCKS,
    backends: Mapping[str, AttentionBackend] | None = None,
    check: Callable[[AttentionBackend], Report] = conformance.check, instruments: Instruments | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> AttentionReport:
    """Times of one attention call for chains of so many queries and for a tree; AttentionIsRed if a check is.

    threads   default: one, and all cores
    blocks    each makes every call CALLS times, in a shuffled order and in its reverse by turns
    backends  by name; default: contestants()
    """
    corners = _corners(queries, tree)
    if blocks < 1:
        raise ValueError(f"attention needs at least 1 block, got {blocks}")
    instruments = instruments or Instruments()
    load_before = instruments.load()
    able, checked, skipped = _checked(backends or contestants(), check, say)
    counts = tuple(dict.fromkeys(threads or (1, machine.usable_cores())))
    settings: list[Setting] = []
    for shape in shapes:
        for dtype in dtypes:
            try:
                settings += _measure_shape(shape, dtype, corners, able, counts, blocks, instruments, skipped, say)
            except CacheTooLarge as error:
                skipped[f"{shape} {dtype}"] = str(error)
    if not settings:
        raise ValueError("nothing could be timed. " + "; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    header = {**provenance(), "blocks": blocks, "load_average": [load_before, instruments.load()]}
    return AttentionReport(tuple(settings), header, checked, skipped)


def _measure_shape(
    shape: KernelShape, dtype: str, corners: Sequence[Corner], backends: Mapping[str, AttentionBackend], threads: Sequence[int],
    blocks: int, instruments: Instruments, skipped: dict[str, str], say: Callable[[str], None],
) -> list[Setting]:
    """The settings of one KV, which is freed when this returns."""
    stage = Stage(shape, dtype, corners, instruments.cache_bytes)
    runners = stage.choose(backends, skipped)
    stage.check(runners)
    settings = []
    for number in threads if runners else ():
        settings.append(_measure(stage, runners, number, blocks, instruments))
        say(str(settings[-1]))
    return settings


def _corners(queries: Sequence[int], tree: TreeShape | None) -> tuple[Corner, ...]:
    """Chains of so many queries, then the tree with its root."""
    corners = [chain(number) for number in dict.fromkeys(queries)]
    if tree is not None:
        parents = (-1, *(parent + 1 for parent in tree.parents))
        corners.append(Corner(f"tree {tree} ({len(parents)})", parents, tuple(range(len(parents)))))
    if not corners or any(not 1 <= len(corner.queries) <= ROUND_QUERIES for corner in corners):
        asked = ", ".join(corner.name for corner in corners) or "none"
        raise ValueError(f"attention is timed with 1 to {ROUND_QUERIES} queries per sequence, got {asked}")
    return tuple(corners)


def _checked(
    backends: Mapping[str, AttentionBackend], check: Callable[[AttentionBackend], Report], say: Callable[[str], None]
) -> tuple[dict[str, AttentionBackend], dict[str, Any], dict[str, str]]:
    """The back ends that can run here and are green, what their checks said, and why the others cannot run."""
    able, checked, skipped = {}, {}, {}
    for name, backend in backends.items():
        report = check(backend)
        say(str(report).partition("\n")[0])
        if report.verdict == RED:
            raise AttentionIsRed(str(report))
        if report.verdict == NOTHING_RAN:
            skipped[name] = "; ".join(report.refusals)
        else:
            able[name], checked[name] = backend, report.to_dict()
    return able, checked, skipped


class Stage:
    """KV of one shape, in so many layers that a layer is cold again when its turn comes, and queries in float32."""

    def __init__(self, shape: KernelShape, dtype: str, corners: Sequence[Corner], cache_bytes: int | None) -> None:
        self.shape, self.dtype, self.corners, self.cache_bytes = shape, dtype, corners, cache_bytes
        kind: torch.dtype = getattr(torch, dtype)
        cell, longest = shape.cell, max(len(corner.parents) for corner in corners)
        layer_bytes = shape.kv_bytes(longest, kind.itemsize)
        layers = min(MAX_LAYERS, -(-COLD * (cache_bytes or USUAL_CACHE_BYTES) // layer_bytes))
        place, draw = torch.device("cpu"), torch.Generator().manual_seed(0)
        self.cache = KvCache(layers, cell.batch, shape.kv_heads, cell.length + longest, shape.head_dim, kind, place)
        self.cache.kv.normal_(generator=draw)
        self.cache.committed = torch.full((cell.batch,), cell.length)
        self.kv_bytes = layers * layer_bytes
        self.situations = [self._situation(corner, draw) for corner in corners]
        self._turn = 0

    def _situation(self, corner: Corner, draw: torch.Generator) -> Situation:
        shape, committed = self.shape, self.cache.committed
        q = torch.randn(shape.cell.batch, len(corner.queries), shape.kv_heads * shape.group, shape.head_dim, generator=draw)
        nodes = corner.tensors(committed.device)
        reads = Reads(committed, *nodes, KvView.full(), shape.cell.length + len(corner.parents), True, corner.is_chain)
        return Situation(q, self.cache, reads, shape.group, None, shape.head_dim**-0.5)

    def next_layer(self) -> int:
        """Whose turn it is to be read."""
        self._turn = (self._turn + 1) % int(self.cache.kv.shape[0])
        return self._turn

    def choose(self, backends: Mapping[str, AttentionBackend], skipped: dict[str, str]) -> dict[str, AttentionBackend]:
        """Those that can run this; why the others cannot goes into `skipped`."""
        need = Need(
            "cpu", self.cache.kv.dtype, self.shape.head_dim, self.shape.group, max(len(c.queries) for c in self.corners),
            tree=not all(c.is_chain for c in self.corners), window=False,
        )  # fmt: skip
        reasons = {name: backend.why_not(need) for name, backend in backends.items()}
        skipped |= {f"{name} in {self.shape} {self.dtype}": reason for name, reason in reasons.items() if reason}
        return {name: backend for name, backend in backends.items() if reasons[name] is None}

    def check(self, backends: Mapping[str, AttentionBackend]) -> None:
        """Compare the last row of every call that will be timed with float64."""
        last, allowed = self.shape.cell.batch - 1, allowed_error(self.cache.kv.dtype, torch.float32)
        for corner, situation in zip(self.corners, self.situations, strict=True):
            right = meaning(situation.row(last, 1))
            for name, backend in backends.items():
                out = backend.attend(situation.q, self.cache, 0, situation.plan(backend), situation.scale)
                error = worst_row([out[last:]], right)
                if not error <= allowed:
                    where = f"{name} in {self.shape} {self.dtype}, {corner.name}"
                    raise AttentionIsRed(f"{where}: row {last} is wrong by {error:.2g}, {allowed:.0e} is allowed")


def _measure(
    stage: Stage, backends: Mapping[str, AttentionBackend], threads: int, blocks: int, instruments: Instruments
) -> Setting:
    """All back ends with all queries, in turns, on so many threads."""
    ceiling = instruments.read_bytes_per_s(threads)
    with torch_threads(threads):
        calls = [
            Call(name, backend, corner, situation, situation.plan(backend))
            for corner, situation in zip(stage.corners, stage.situations, strict=True)
            for name, backend in backends.items()
        ]
        busy, cpu, start = instruments.busy_s(), instruments.cpu_clock(), instruments.clock()
        for block in range(-WARM_UP_BLOCKS, blocks):
            order = random.Random(block).sample(calls, len(calls))
            for call in (*order, *reversed(order)) * (CALLS // 2):
                call.run(stage.next_layer(), instruments, is_counted=block >= 0)
        own_cpu, wall = instruments.cpu_clock() - cpu, instruments.clock() - start
    others = other_cores(busy, instruments.busy_s(), own_cpu, wall)
    timings = tuple(call.timing(stage, threads) for call in calls)
    setting = Setting(stage.shape, stage.dtype, threads, int(stage.cache.kv.shape[0]), ceiling, timings, others)
    return replace(setting, labels=tuple(_labels(setting, stage)))


@dataclass(slots=True)
class Call:
    """One back end with one set of queries, and how long its calls took so far."""

    name: str
    backend: AttentionBackend
    corner: Corner
    situation: Situation
    plan: Any
    walls: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def run(self, layer: int, instruments: Instruments, *, is_counted: bool) -> None:
        """Attend once."""
        s = self.situation
        cpu_start, start = instruments.cpu_clock(), instruments.clock()
        self.backend.attend(s.q, s.cache, layer, self.plan, s.scale)
        wall = instruments.clock() - start
        if is_counted:
            self.walls.append(wall)
            self.cpu_s += instruments.cpu_clock() - cpu_start

    def timing(self, stage: Stage, threads: int) -> Timing:
        """What became of it. Of a block the median counts, so that one call that other work cut in two does not."""
        blocks = tuple(median(self.walls[at : at + CALLS]) for at in range(0, len(self.walls), CALLS))
        kv_bytes = stage.shape.kv_bytes(len(self.corner.parents), stage.cache.kv.itemsize)
        share = self.cpu_s / sum(self.walls) / threads
        return Timing(self.name, self.corner.name, len(self.corner.queries), kv_bytes, blocks, spread(self.walls), share)


def _labels(setting: Setting, stage: Stage) -> Iterator[str]:
    """What a reader of these numbers must know."""
    if stage.cache_bytes is None:
        yield CACHE_UNKNOWN
    elif stage.kv_bytes <= stage.cache_bytes:
        yield FITS
    elif any(setting.read_share(timing) > FASTEST_SHARE for timing in setting.timings):
        yield TOO_FAST
    is_starved = median(timing.cpu_share for timing in setting.timings) < BUSY_SHARE
    if is_starved or (setting.other_cores or 0) > BUSY_CORES:
        yield BUSY
