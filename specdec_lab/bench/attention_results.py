"""What the attention bench found: timings, their ratios from paired blocks, and tables of them.

Not known here: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import machine
from ..records import Spread
from ..summary import PairedRatio, paired_ratio
from .kernel_shapes import KernelShape
from .provenance import made_with
from .tables import aligned, github

SCHEMA = "specdec_lab.attention/1"
FITS, CACHE_UNKNOWN, BUSY = "KV fits in cache", "size of the last-level cache unknown", "machine busy"
TOO_FAST = "faster than the read stream: part of the KV came from cache"
COMPARED = (("sdpa", "cpu"), ("cpu:avx2", "cpu:native"))  # candidate and what it is compared with
ENGINE = ("cpu", "sdpa")  # what the engine can attend with; the others are builds to be compared with each other
UNSURE = 10.0  # an interval that reaches so many times the mean says nothing


@dataclass(frozen=True, slots=True)
class Timing:
    """One back end with one set of queries.

    kv_bytes   that the call must read, each once
    blocks_s   per block the median of its calls; blocks of one setting are paired by number
    call_s     of all calls
    cpu_share  CPU time over wall time and threads; far below 1 somebody else had the cores
    """

    backend: str
    queries: str
    num_queries: int
    kv_bytes: int
    blocks_s: tuple[float, ...]
    call_s: Spread
    cpu_share: float

    @property
    def kv_bytes_per_s(self) -> float:
        """Achieved: exact KV bytes over the median."""
        return self.kv_bytes / self.call_s.median


@dataclass(frozen=True, slots=True)
class Setting:
    """One shape, KV dtype and thread count, measured in one go with all calls in turns.

    read_bytes_per_s  the calibrated read stream on as many threads, in this process
    other_cores       cores' worth of time that other processes had meanwhile; None where the system does not tell
    """

    shape: KernelShape
    dtype: str
    threads: int
    num_layers: int
    read_bytes_per_s: float
    timings: tuple[Timing, ...]
    other_cores: float | None = None
    labels: tuple[str, ...] = ()

    def __str__(self) -> str:
        one = self.timings[0].kv_bytes / 1e6
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        labels = f" [{'; '.join(self.labels)}]" if self.labels else ""
        return (
            f"{self.shape} {self.dtype}, {threads}: {one:.3g} MB of KV a call, {self.num_layers} layers in turn, read stream "
            f"{self.read_bytes_per_s / 1e9:.1f} GB/s{labels}"
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """Who was timed, in order."""
        return tuple(dict.fromkeys(t.backend for t in self.timings))

    def find(self, backend: str, queries: str) -> Timing | None:
        """The timing, if this back end was measured with these queries."""
        return next((t for t in self.timings if (t.backend, t.queries) == (backend, queries)), None)

    def over_one_query(self, timing: Timing) -> PairedRatio | None:
        """Its time over that of one query through the same back end; None where one query was not asked."""
        single = next((t for t in self.timings if t.backend == timing.backend and t.num_queries == 1), None)
        return paired_ratio(single.blocks_s, timing.blocks_s) if single and single is not timing else None

    def over(self, timing: Timing, backend: str) -> PairedRatio | None:
        """Its time over that of another back end with the same queries; None where that one was not measured."""
        other = self.find(backend, timing.queries)
        return paired_ratio(other.blocks_s, timing.blocks_s) if other and other is not timing else None

    def read_share(self, timing: Timing) -> float:
        """Achieved bytes/s as a share of the read stream."""
        return timing.kv_bytes_per_s / self.read_bytes_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: one line of the bench folder, without the header."""
        return {
            "device": machine.device_name(None, self.threads), "threads": self.threads, "shape": str(self.shape),
            "dtype": self.dtype, "num_layers": self.num_layers, "read_bytes_per_s": self.read_bytes_per_s,
            "other_cores": self.other_cores, "labels": list(self.labels),
            "results": [self._result(timing) for timing in self.timings],
        }  # fmt: skip

    def _result(self, t: Timing) -> dict[str, Any]:
        compared = {base: self.over(t, base) for base in _bases(t.backend)}
        single = self.over_one_query(t)
        return {
            "backend": t.backend, "queries": t.queries, "num_queries": t.num_queries, "kv_bytes": t.kv_bytes,
            "median_s": t.call_s.median, "p05_s": t.call_s.p05, "p95_s": t.call_s.p95, "calls": t.call_s.count,
            "over_one_query": single.to_dict() if single else None,
            "over": {base: ratio.to_dict() for base, ratio in compared.items() if ratio},
            "kv_bytes_per_s": t.kv_bytes_per_s, "read_share": self.read_share(t), "cpu_share": t.cpu_share,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """All settings and what they depend on.

    conformance  per back end what its check said; none is red, or there would be no report
    skipped      shapes and back ends that could not run, with the reason
    """

    settings: tuple[Setting, ...]
    header: dict[str, Any]
    conformance: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Lines for the bench folder, each complete in itself."""
        about = {"schema": SCHEMA, **self.header, "conformance": self.conformance}
        return [{**about, **setting.to_dict()} for setting in self.settings]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "schema": SCHEMA, **self.header, "conformance": self.conformance, "skipped": self.skipped,
            "settings": [setting.to_dict() for setting in self.settings],
        }  # fmt: skip

    def __str__(self) -> str:
        return self._words(text_table, "{}")

    def to_markdown(self) -> str:
        """The same with tables in Markdown."""
        return self._words(markdown_table, "**{}**\n")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _words(self, table: Callable[[Sequence[str], Sequence[Sequence[str]]], str], title: str) -> str:
        blocks = [f"{title.format(setting)}\n{table(*cells(setting))}" for setting in self.settings]
        return "\n\n".join([*blocks, *filter(None, ["\n".join(self._notes())]), EXPLAINED, self._made()])

    def _notes(self) -> Iterator[str]:
        for name, reason in self.skipped.items():
            yield f"not measured, {name}: {reason}"
        busy = [setting.other_cores or 0 for setting in self.settings if BUSY in setting.labels]
        if busy:
            tables = f"{len(busy)} of {len(self.settings)} tables"
            yield f"other work had up to {max(busy):.1f} cores in {tables}: do not quote those"

    def _made(self) -> str:
        about = self.header
        checked = "; ".join(f"{name} {report['cases']} cases" for name, report in self.conformance.items())
        before, after = ("?" if load is None else f"{load:.1f}" for load in about["load_average"])
        place, load = f"{about['machine']['cpu']}, {about['machine']['cores']} cores", f"load {before} before and {after} after"
        return f"{place}, {made_with(about)}, {load}\nconformance: {checked}, all green"


EXPLAINED = (
    "ms: median (5th to 95th percentile) of a call; x: mean ratio over paired blocks (95% interval); GB/s: exact KV bytes over "
    "the median; of read: share of the read stream"
)


def cells(setting: Setting) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, one row per set of queries."""
    main, *others = setting.backends
    titles = ["queries", f"{main} ms", "x 1 query", "GB/s", "of read"]
    for other in others:
        titles += [f"{other} ms", *["x 1 query"] * (other in ENGINE), *(f"x {base}" for base in _bases(other))]
    rows = []
    for queries in dict.fromkeys(t.queries for t in setting.timings):
        rows.append([queries, *_main_cells(setting, setting.find(main, queries))])
        for other in others:
            rows[-1] += _other_cells(setting, other, setting.find(other, queries))
    return titles, rows


def _main_cells(setting: Setting, timing: Timing | None) -> list[str]:
    assert timing is not None, "every set of queries was asked of every back end"
    rate, share = f"{timing.kv_bytes_per_s / 1e9:.1f}", f"{setting.read_share(timing):.0%}"
    return [_call_text(timing), _ratio_text(setting.over_one_query(timing)), rate, share]


def _other_cells(setting: Setting, name: str, timing: Timing | None) -> list[str]:
    assert timing is not None, "every set of queries was asked of every back end"
    single = [_ratio_text(setting.over_one_query(timing))] * (name in ENGINE)
    return [_call_text(timing), *single, *(_ratio_text(setting.over(timing, base)) for base in _bases(name))]


def _bases(name: str) -> tuple[str, ...]:
    return tuple(base for candidate, base in COMPARED if candidate == name)


def _call_text(timing: Timing) -> str:
    low, middle, high = (f"{s * 1e3:.2f}" for s in (timing.call_s.p05, timing.call_s.median, timing.call_s.p95))
    return f"{middle} ({low}-{high})"


def _ratio_text(ratio: PairedRatio | None) -> str:
    if ratio is None:
        return "-"
    if ratio.high > UNSURE * ratio.mean:
        return f"{ratio.mean:.2f} (unsure)"
    return f"{ratio.mean:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def text_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces, the first aligned left."""
    return "\n".join(aligned([titles, *rows], range(1, len(titles))))


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table, numbers aligned right."""
    return "\n".join(github([titles, *rows], range(1, len(titles))))
