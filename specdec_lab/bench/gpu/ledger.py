"""The rows of GPU runs: `<database>/<device>/gpu.jsonl`, append-only, each complete in itself; and what of a run is done.

Not known here: who measures.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ... import machine
from ...tune.db import append_lines

SCHEMA = "specdec_lab.gpu/1"
FILE = "gpu.jsonl"
OK, FAILED, SKIPPED, CUT = "ok", "failed", "skipped", "cut"  # how a stage ends; cut: its time was over, its rows are kept
PASS, AIM, MISS, RED = "pass", "aim", "miss", "RED"
SOURCES = Path(__file__).parents[2]
DIGITS = 6


@dataclass(frozen=True, slots=True)
class Row:
    """One finding of a stage.

    kind     of finding, within the stage
    what     it is about: a cell, a kernel, a configuration
    values   measured numbers, with their units in their names
    verdict  pass, aim (even the aim is reached), miss or RED (wrong), where there is a bar
    bar      in words
    flags    why a reader must be careful; one that begins with "invalid" takes the number away
    """

    kind: str
    what: str
    values: Mapping[str, Any] = field(default_factory=dict)
    verdict: str | None = None
    bar: str | None = None
    labels: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data without what is empty."""
        full = {
            "kind": self.kind, "what": self.what, "values": dict(self.values), "verdict": self.verdict, "bar": self.bar,
            "labels": list(self.labels), "flags": list(self.flags), "reason": self.reason,
        }  # fmt: skip
        return {name: value for name, value in full.items() if value not in (None, "", [], {})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of to_dict; other keys are left aside."""
        return cls(
            str(data["kind"]), str(data["what"]), data.get("values", {}), data.get("verdict"), data.get("bar"),
            tuple(data.get("labels", ())), tuple(data.get("flags", ())), data.get("reason", ""),
        )  # fmt: skip


def bar_verdict(value: float, passes: float, aim: float | None = None) -> str:
    """The larger the better."""
    return AIM if aim is not None and value >= aim else PASS if value >= passes else MISS


@cache
def sources() -> str:
    """12 hex digits over our Python and C files: what a measurement is a measurement of, checkout or not."""
    from specdec_kernels import build

    digest = hashlib.sha256()
    for root in (SOURCES, Path(build.__file__).parent):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".c")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Ledger:
    """Rows of one device.

    path    of the file
    run     of this call; all its rows carry it
    header  what every row says beside its own: device, driver, versions, commit, sources
    """

    path: Path
    run: str
    header: Mapping[str, Any]
    labels: tuple[str, ...] = ()

    def write(self, stage: str, row: Row) -> None:
        """Append a row and force it to disk."""
        data = row.to_dict()
        data["labels"] = [*self.labels, *data.get("labels", [])]
        whole = {"schema": SCHEMA, **self.header, "stage": stage, "run": self.run, "created": _now(), **data}
        append_lines(self.path, [json.dumps(_short(whole), separators=(",", ":"), allow_nan=False)])

    def end(self, stage: str, status: str, seconds: float, reason: str = "") -> None:
        """Say how a stage ended."""
        self.write(stage, Row("stage", stage, {"seconds": seconds, "status": status}, reason=reason))

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows of the file that are ours, oldest first."""
        if not self.path.exists():
            return
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue  # a writer that died left half a line
            if isinstance(data, dict) and data.get("schema") == SCHEMA:
                yield data

    def last_run_of(self, stage: str) -> str | None:
        """The newest run that ended this stage well with these very sources and versions, if any."""
        same = ("sources", "versions", "device")
        found = None
        for row in self.rows():
            ended = row.get("kind") == "stage" and row.get("stage") == stage and row["values"]["status"] == OK
            if ended and all(row.get(name) == self.header.get(name) for name in same):
                found = row.get("run")
        return found

    def of_run(self, run: str, stage: str) -> list[dict[str, Any]]:
        """The rows that a run wrote for a stage."""
        return [row for row in self.rows() if row.get("run") == run and row.get("stage") == stage]


def header_of(device: str, driver: str | None, versions: Mapping[str, str]) -> dict[str, Any]:
    """What every row of this machine and these sources says."""
    return {
        "device": device, "driver": driver, "versions": dict(versions), "commit": machine.commit(), "sources": sources(),
    }  # fmt: skip


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _short(value: Any) -> Any:
    """Six digits of every number: none is known better."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_short(item) for item in value]
    return value
