"""tuning_db: measurements as append-only JSONL, one line each, shared by any number of tuners; files are never rewritten.

A record is on disk before anybody acts on it. Not known here: who measures, what a policy is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import Cell, Identity, SpecConfig

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA_NAME, SCHEMA_VERSION = "specdec_lab.measurement", 1
SCHEMA = f"{SCHEMA_NAME}/{SCHEMA_VERSION}"
KINDS = ("verify", "draft", "acceptance", "pilot", "race", "duel", "sentinel")
STATUSES = ("ok", "throttled", "oom", "timeout", "mismatch", "infeasible", "crashed", "interrupted")


class DatabaseError(OSError):
    """Records that could not be written or read: the file, the reason, what is kept and what to do.

    measurements  the finished measurements that are not on disk; they stay in `Database.pending` as well
    """

    def __init__(self, path: Path, what: str, next_step: str, measurements: Sequence[Measurement] = ()) -> None:
        super().__init__(f"{path}: {what}. {next_step}")
        self.path, self.measurements = path, tuple(measurements)


@dataclass(frozen=True, slots=True)
class Design:
    """Where a measurement stands in its experiment.

    order     of the runs in the block: ABBA starts and ends with plain decoding, BAAB with the candidate
    pair_of   id of the plain run of the same block; of a sentinel: of the one before it, with which it is compared
    retry_of  id of the record of the attempt that lost its worker
    """

    block: int = 0
    order: str = ""
    pair_of: str | None = None
    seed: int = 0
    prompts: str = ""
    retry_of: str | None = None


Key = tuple[str, str, float, str, str, str, int]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One line of the database: what ran, where it stands in its experiment, what came out, or why nothing did.

    fp       "base.drafter" fingerprints: equal ones may be pooled, others never
    summary  of a block: see tune/blocks.py; other kinds carry their own
    env      when and how: utc, busy, labels; sentinel: id of its worker's last good one; concurrency: workers that measured
    """

    id: str
    kind: str
    run: str
    fp: str
    workload: str
    temperature: float
    cell: Cell
    config: str
    design: Design
    status: str = "ok"
    reason: str = ""
    worker: str = "main"
    summary: Mapping[str, Any] = field(default_factory=dict)
    warm: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    raw_sha256: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # keys of other writers, kept

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.status not in STATUSES:
            raise ValueError(f"measurement {self.id}: kind {self.kind!r} or status {self.status!r} is not one of ours")
        texts = (self.id, self.run, self.fp, self.workload, self.config)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.summary, Mapping):
            raise ValueError(f"measurement {self.id}: id, run, fp, workload and config must be texts, summary an object")
        SpecConfig.parse(self.config)

    @property
    def key(self) -> Key:
        """What is measured once: fingerprint, workload, temperature, cell, configuration, kind, block."""
        return self.fp, self.workload, self.temperature, str(self.cell), self.config, self.kind, self.design.block

    @property
    def reopens(self) -> str | None:
        """The sentinel since which nothing counts, because this one found the machine to be another."""
        return self.design.pair_of if self.kind == "sentinel" and self.status == "throttled" else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        names = ("id", "kind", "run", "worker", "fp", "workload", "temperature", "config", "status")
        data = {**self.extra, "schema": SCHEMA, **{name: getattr(self, name) for name in names}, "cell": str(self.cell)}
        design = {name: getattr(self.design, name) for name in Design.__dataclass_fields__}
        optional = {
            "summary": dict(self.summary), "warm": dict(self.warm), "env": dict(self.env), "reason": self.reason,
            "raw_sha256": self.raw_sha256, "design": {k: v for k, v in design.items() if v is not None},
        }  # fmt: skip
        return {**data, **{name: value for name, value in optional.items() if value}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of to_dict; ValueError when it is not a measurement."""
        known = {f for f in cls.__dataclass_fields__ if f != "extra"} | {"schema"}
        values = {name: value for name, value in data.items() if name in known and name != "schema"}
        try:
            values["cell"] = Cell.parse(values["cell"])
            design = values.get("design", {})
            values["design"] = Design(**{k: v for k, v in design.items() if k in Design.__dataclass_fields__})
            return cls(**values, extra={name: value for name, value in data.items() if name not in known})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a measurement: {error}") from None

    def line(self) -> str:
        """The line of the file, without its end."""
        return json.dumps(_short(self.to_dict()), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, Mapping):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list | tuple) else value


def measurement_id(*parts: object) -> str:
    """`m-` and 16 hex digits of the sha256 of what identifies a measurement; the same experiment gives the same id."""
    return "m-" + hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file holds. `skipped` counts lines that are not ours: truncated, foreign, newer, duplicate."""

    measurements: tuple[Measurement, ...]
    fingerprints: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, int]
    sha256: str
    num_bytes: int


def read_file(path: Path, num_bytes: int | None = None) -> Contents:
    """Read a JSONL file, or its first `num_bytes`. Lines that are not ours are counted and left as they are."""
    try:
        with path.open("rb") as stream, _locked(stream.fileno(), exclusive=False):
            raw = stream.read() if num_bytes is None else stream.read(num_bytes)
    except OSError as error:
        raise DatabaseError(path, f"cannot be read: {error.strerror}", "Check the path and its permissions") from error
    measurements: dict[str, Measurement] = {}
    fingerprints: dict[str, Mapping[str, Any]] = {}
    skipped: Counter[str] = Counter()
    for line in raw.decode("utf-8", errors="replace").splitlines():
        _read_line(line, measurements, fingerprints, skipped)
    return Contents(tuple(measurements.values()), fingerprints, dict(skipped), hashlib.sha256(raw).hexdigest(), len(raw))


def _read_line(
    line: str, measurements: dict[str, Measurement], fingerprints: dict[str, Mapping[str, Any]], skipped: Counter[str]
) -> None:
    if not line.strip():
        return
    try:
        data = json.loads(line)
    except ValueError:
        skipped["truncated"] += 1
        return
    schema = re.fullmatch(rf"{re.escape(SCHEMA_NAME)}/(\d+)", str(data.get("schema"))) if isinstance(data, dict) else None
    if schema is None or int(schema[1]) < 1:
        skipped["foreign"] += 1
    elif int(schema[1]) > SCHEMA_VERSION:
        skipped["newer"] += 1
    elif data.get("kind") == "fingerprint" and isinstance(data.get("fp"), str):
        fingerprints[data["fp"]] = data
    else:
        try:
            found = Measurement.from_dict(data)
        except ValueError:
            skipped["foreign"] += 1
            return
        skipped["duplicate"] += found.id in measurements
        measurements.setdefault(found.id, found)
        skipped += Counter()  # drops the zero


@contextmanager
def _locked(handle: int, exclusive: bool) -> Iterator[None]:
    """Hold the file's advisory lock, so that lines of several processes never mix."""
    if fcntl is None:
        warnings.warn("this platform has no file locks: run one tuner per database at a time", RuntimeWarning, stacklevel=4)
        yield
        return
    fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)


def append_lines(path: Path, lines: Sequence[str], once: Mapping[str, str] | None = None) -> None:
    """Append whole lines and force them to disk; either all are there afterwards or none is.

    once  mark -> line that is written before the others unless the file already has a line that contains the mark
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with _locked(handle, exclusive=True):
            size = os.fstat(handle).st_size
            before = os.pread(handle, size, 0) if once else os.pread(handle, 1, max(size - 1, 0))
            first = [line for mark, line in (once or {}).items() if mark.encode() not in before]
            # a writer that died in the middle left a line without end: close it, readers will count it as truncated
            start = "\n" if before and not before.endswith(b"\n") else ""
            _write_or_undo(handle, size, (start + "".join(f"{line}\n" for line in (*first, *lines))).encode())
    finally:
        os.close(handle)


def _write_or_undo(handle: int, size: int, data: bytes) -> None:
    done = False
    try:
        while data:
            data = data[os.write(handle, data) :]
        os.fsync(handle)
        done = True
    finally:
        if not done:
            with suppress(OSError):
                os.ftruncate(handle, size)


def fingerprint_mark(fp: str) -> str:
    """What a fingerprint line of `fp`, and no other line, contains."""
    return f'"fp":"{fp}","kind":"fingerprint"'


def fingerprint_line(data: Mapping[str, Any]) -> str:
    """The line that explains a fingerprint, keys sorted, so that its mark is found."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "unnamed"


def device_folder(root: Path, device: str) -> Path:
    """Where the records and policies of a device lie in a database."""
    return root / _slug(device)


class Database:
    """The measurements of one device and target below a root folder: `<root>/<device>/<target>--<drafter>.jsonl`.

    draft    name of the loaded draft model in file names
    pending  finished measurements that could not be written; every append tries them first
    skipped  lines that are not ours, by reason, over all files read
    """

    def __init__(self, root: Path | str, identity: Identity, target: str, draft: str = "model") -> None:
        self.root, self.identity, self.target = Path(root), identity, target
        self.folder = device_folder(self.root, identity.device)
        self._labels = {"model": _slug(draft)}
        self.pending: list[Measurement] = []
        self.skipped: Counter[str] = Counter()
        self._by_key: dict[Key, list[Measurement]] = {}
        self._reopened: set[str] = set()
        self._by_id: dict[str, Measurement] = {}
        self._announced: set[tuple[Path, str]] = set()
        for path in self.paths():
            contents = read_file(path)
            self.skipped.update(contents.skipped)
            for measurement in contents.measurements:
                self._index(measurement)

    def path_of(self, config: str) -> Path:
        """The file that holds measurements of this configuration."""
        kind = SpecConfig.parse(config).drafter
        return self.folder / f"{_slug(self.target)}--{self._labels.get(kind, kind)}.jsonl"

    def policy_path(self, workload: str, temperature: float = 0.0) -> Path:
        """Where the policy made from these measurements belongs."""
        suffix = f"-t{temperature:g}" if temperature else ""
        return self.folder / f"{_slug(self.target)}--{_slug(workload)}{suffix}.policy.json"

    def paths(self) -> tuple[Path, ...]:
        """The files of this device and target that exist."""
        names = ["off", "self", "ngram", self._labels["model"]]
        found = (self.folder / f"{_slug(self.target)}--{name}.jsonl" for name in dict.fromkeys(names))
        return tuple(path for path in found if path.exists())

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, identifier: str) -> bool:
        return identifier in self._by_id

    def standing(self) -> Iterator[Measurement]:
        """All measurements but those that a sentinel has re-opened."""
        return (m for m in self._by_id.values() if m.env.get("sentinel") not in self._reopened)

    def find(self, key: Key, run: str | None = None) -> Measurement | None:
        """The measurement of this key if it is recorded and stands: a good one before a failed one, the older one of two.

        run  that must have measured it; None = any
        """
        known = [m for m in self._by_key.get(key, ()) if m.env.get("sentinel") not in self._reopened and run in (None, m.run)]
        return next((m for m in known if m.status == "ok"), known[0] if known else None)

    def append(self, *measurements: Measurement) -> None:
        """Write lines and force them to disk; DatabaseError keeps those that could not be written in `pending`."""
        self.pending += [m for m in measurements if m.id not in self._by_id]
        for measurement in measurements:
            self._index(measurement)
        self.flush()

    def flush(self) -> None:
        """Write what is pending."""
        for path in dict.fromkeys(self.path_of(m.config) for m in self.pending):
            batch = [m for m in self.pending if self.path_of(m.config) == path]
            try:
                append_lines(path, [m.line() for m in batch], self._announcements(path, batch))
            except OSError as error:
                raise self._unwritten(path, error) from error
            self._announced |= {(path, m.fp) for m in batch}
            self.pending = [m for m in self.pending if m not in batch]

    def check_writable(self) -> None:
        """Raise DatabaseError now rather than after a measurement."""
        probe = self.path_of("off")
        try:
            append_lines(probe, ())
        except OSError as error:
            raise self._unwritten(probe, error) from error

    def _index(self, measurement: Measurement) -> None:
        if measurement.id in self._by_id:
            return
        self._by_id[measurement.id] = measurement
        self._by_key.setdefault(measurement.key, []).append(measurement)
        if measurement.reopens:
            self._reopened.add(measurement.reopens)

    def _announcements(self, path: Path, batch: Iterable[Measurement]) -> dict[str, str]:
        """Fingerprint lines for what this file has not explained yet: mark -> line."""
        fresh = [m for m in batch if (path, m.fp) not in self._announced]
        return {fingerprint_mark(m.fp): self._fingerprint_line(m) for m in fresh}

    def _fingerprint_line(self, measurement: Measurement) -> str:
        kind = SpecConfig.parse(measurement.config).drafter
        data = {
            "schema": SCHEMA, "kind": "fingerprint", "fp": measurement.fp, "device": self.identity.device,
            "target": self.target, "base": dict(self.identity.base), "drafter": dict(self.identity.drafters.get(kind, {})),
            "warn": dict(self.identity.warn),
        }  # fmt: skip
        return fingerprint_line(data)

    def _unwritten(self, path: Path, error: OSError) -> DatabaseError:
        reason = error.strerror or str(error)
        kept = f"; {len(self.pending)} finished measurements are kept in memory (error.measurements)" if self.pending else ""
        advice = "Free space or choose a writable database (--db PATH), then run again"
        if self.pending:
            advice += ": the next append to this database object writes them first"
        return DatabaseError(path, f"cannot be written: {reason}{kept}", advice, self.pending)
