"""What a scaling measurement is made of: one point per cell and configuration, and the row of the database that holds them all.

Everything that is fitted, tabulated or drawn follows from these, so a saved row can be examined again without a machine.
Not known here: engines, and what is concluded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...costs import Limits, ModelShape
from ...records import Cell, SpecConfig, Spread, forced_label
from ...summary import PairedRatio

SCHEMA = "specdec_lab.scaling/1"
MIN_ROUNDS = 3  # of one width, for its median to be used
IN_CACHE = "KV fits in cache"  # the engine's label for cells whose KV need not come from memory


@dataclass(frozen=True, slots=True)
class VerifyTime:
    """Forwards of the target with this many query tokens per sequence: measured seconds, and exact KV bytes of one."""

    query_tokens: int
    seconds: Spread
    kv_bytes: float


@dataclass(frozen=True, slots=True)
class Point:
    """One configuration in one cell, over the rounds in which all rows were live and none was cut.

    verify              linear + attention per query width, narrowest first; a lookup drafter has several widths
    draft_s             per drafted level: draft_s of a round over the depth of its tree; None for plain decoding
    draft_kv_bytes      of such a level, mean
    overhead_s          accept + commit + host
    context_tokens      committed before the round, mean
    tokens_per_round    per row and round, bonus included
    acceptance_histogram  row-rounds that accepted exactly j drafted tokens
    speedup             over plain decoding of the same blocks; None for plain decoding, and where no block holds both
    block_tokens_per_s  one entry per undisturbed block
    is_probe            measured for its verify width only
    """

    cell: Cell
    config: str
    step_s: Spread
    verify: tuple[VerifyTime, ...]
    draft_s: Spread | None
    draft_kv_bytes: float
    overhead_s: Spread
    context_tokens: float
    tokens_per_round: float
    acceptance_histogram: tuple[int, ...]
    speedup: PairedRatio | None
    block_tokens_per_s: tuple[float, ...]
    labels: tuple[str, ...] = ()
    is_probe: bool = False

    @property
    def spec(self) -> SpecConfig:
        """The configuration as a noun."""
        return SpecConfig.parse(self.config)

    @property
    def verify_s(self) -> float:
        """Median forward of the target; where widths differ, the mean of their medians over the rounds."""
        rounds = sum(time.seconds.count for time in self.verify)
        return sum(time.seconds.median * time.seconds.count for time in self.verify) / rounds

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "cell": str(self.cell), "speedup": self.speedup.to_dict() if self.speedup else None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Point:
        """The inverse of to_dict."""
        values = dict(data)
        values["cell"] = Cell.parse(values["cell"])
        for name in ("step_s", "draft_s", "overhead_s"):
            values[name] = None if values[name] is None else Spread(**values[name])
        values["verify"] = tuple(
            VerifyTime(time["query_tokens"], Spread(**time["seconds"]), time["kv_bytes"]) for time in values["verify"]
        )
        for name in ("acceptance_histogram", "block_tokens_per_s", "labels"):
            values[name] = tuple(values[name])
        ratio = values["speedup"]
        values["speedup"] = None if ratio is None else PairedRatio(**{**ratio, "high": _unbounded(ratio["high"])})
        return cls(**values)


def _unbounded(high: float | None) -> float:
    return math.inf if high is None else high


@dataclass(frozen=True, slots=True)
class Network:
    """A model as far as its times depend on it. Weights and KV have one element size."""

    name: str
    shape: ModelShape
    kv_bytes_per_token: int

    @property
    def element_bytes(self) -> int:
        """Of a weight and of a KV entry."""
        return self.kv_bytes_per_token // self.shape.kv_bytes_per_token(1)


@dataclass(frozen=True, slots=True)
class Scaling:
    """All points of one measurement, and what a reader needs to believe them.

    header      created, device, machine, versions, commit, load, workload, models with their shapes, ceilings, blocks
    skipped     cells that could not run, with the reason
    mismatches  configurations that emitted other tokens than plain decoding, in words; their points are left out
    busy        cells that other work on the machine disturbed throughout: quote no number of them
    notices     what else a reader must know
    """

    header: Mapping[str, Any]
    points: tuple[Point, ...]
    skipped: Mapping[str, str]
    mismatches: tuple[str, ...] = ()
    busy: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    is_interrupted: bool = False

    @property
    def target(self) -> Network:
        """The network that decodes and verifies."""
        return _network(self.header["target"])

    @property
    def draft(self) -> Network | None:
        """The network that `model` configurations draft with."""
        return _network(self.header["draft"]) if self.header["draft"] else None

    @property
    def limits(self) -> Limits:
        """The calibrated ceilings of the machine."""
        ceilings = self.header["ceilings"]
        return Limits(ceilings["read_bytes_per_s"], ceilings["gemm_flops_per_s"])

    @property
    def configs(self) -> tuple[str, ...]:
        """Speculative configurations, probes left out, in the order of first appearance."""
        return tuple(dict.fromkeys(p.config for p in self.points if not p.is_probe and p.config != "off"))

    @property
    def where(self) -> str:
        """The machine, as far as a title has room for it, and whether acceptance was forced."""
        forced = next((f", {label}" for p in self.points if (label := forced_label(p.labels))), "")
        return self._machine + forced

    @property
    def _machine(self) -> str:
        machine = self.header["machine"]
        if not str(machine.get("torch_device", "cpu")).startswith("cpu"):
            return str(self.header["device"])
        threads = machine.get("threads", 1)
        return f"{machine.get('cpu', self.header['device'])}, {threads} thread{'s' if threads != 1 else ''}"

    @property
    def made_with(self) -> str:
        """Software, text and time in one line."""
        h = self.header
        drawn = "greedy" if h["temperature"] == 0 else f"temperature {h['temperature']:g} {h['verifier']}"
        changed = " (changed)" if h["commit"].endswith("-dirty") else ""
        return (
            f"torch {h['versions'].get('torch', 'unknown')}, {h['target'].get('dtype', '')}, {h['backend']} attention, "
            f"{h['target']['name']}, {h['workload']} text, {drawn}, commit {h['commit'][:12]}{changed}, {h['created'][:10]}"
        )

    def point(self, cell: Cell, config: str) -> Point | None:
        """The point of a configuration in a cell, if it was measured."""
        return next((p for p in self.points if p.cell == cell and p.config == config), None)

    def to_dict(self) -> dict[str, Any]:
        """One row of the bench folder."""
        return {
            "schema": SCHEMA, **self.header, "points": [p.to_dict() for p in self.points], "skipped": dict(self.skipped),
            "mismatches": list(self.mismatches), "busy": list(self.busy), "notices": list(self.notices),
            "interrupted": self.is_interrupted,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scaling:
        """The inverse of to_dict; ValueError, with what is wrong, when it is not such a row."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"this reader knows {SCHEMA}; the row says {data.get('schema')!r}")
        rest = {"schema", "points", "skipped", "mismatches", "busy", "notices", "interrupted"}
        try:
            return cls(
                {name: value for name, value in data.items() if name not in rest},
                tuple(map(Point.from_dict, data["points"])), data["skipped"], tuple(data["mismatches"]), tuple(data["busy"]),
                tuple(data["notices"]), data["interrupted"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scaling row: {type(error).__name__} {error}") from None


def _network(facts: Mapping[str, Any]) -> Network:
    return Network(facts["name"], ModelShape(**facts["shape"]), facts["kv_bytes_per_token"])
