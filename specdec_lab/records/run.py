"""A finished stream, and the header without which no number of it travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .cell import Cell
from .step import StepRecord

STEP_SCHEMA = "specdec_lab.run/1"


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What a number needs to be believed: what ran, on what, with which model, versions and ceilings."""

    run_id: str
    created: str  # UTC, ISO 8601
    cell: Cell  # the batch, and the mean prompt length
    config: str  # a SpecConfig spelling, or "policy:<name>" / "function"
    workload: str
    target: Mapping[str, Any]  # name, fingerprint, runner, parameters, weight_bytes, kv_bytes_per_token, dtype
    draft: Mapping[str, Any] | None
    backend: str
    refused: Mapping[str, str]  # back end -> why it was passed over
    machine: Mapping[str, Any]  # device, cores, threads, memory_bytes, last_level_cache_bytes
    versions: Mapping[str, str]
    commit: str
    seed: int
    temperature: float
    verifier: str
    instrumented: bool
    ceilings: Mapping[str, float]  # read_bytes_per_s, gemm_flops_per_s
    labels: tuple[str, ...] = ()  # "forced", "random-weights", "modelled", "KV fits in cache", ...
    block: int | None = None  # blocks of one number ran interleaved and are compared with each other
    schema: str = STEP_SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "cell": str(self.cell), "labels": list(self.labels)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunHeader:
        """The inverse of to_dict; a header of another schema raises ValueError."""
        if data.get("schema") != STEP_SCHEMA:
            raise ValueError(f"this reader knows {STEP_SCHEMA}; the header says {data.get('schema')!r}")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        values["cell"] = Cell.parse(values.get("cell", ""))
        values["labels"] = tuple(values.get("labels", ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a run header: {error}") from None


@dataclass(frozen=True, slots=True)
class Run:
    """A finished stream: its header and all its steps."""

    header: RunHeader
    steps: tuple[StepRecord, ...]
    interrupted: bool = False

    @property
    def rounds(self) -> tuple[StepRecord, ...]:
        """The steps that are draft-verify-commit rounds."""
        return tuple(s for s in self.steps if s.kind == "round")

    def tokens(self) -> list[list[int]]:
        """New tokens per row, in order."""
        rows: list[list[int]] = [[] for _ in range(self.header.cell.batch)]
        for step in self.steps:
            for row, emitted in zip(rows, step.tokens, strict=True):
                row.extend(emitted)
        return rows
