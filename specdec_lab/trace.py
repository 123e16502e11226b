"""Runs on disk: versioned JSONL that replays as the same stream, and a timeline for ui.perfetto.dev.

A trace holds one header line, one line per step and one end line; every line is written out whole before the next step
is taken. A file without an end line was cut, so its run reads as interrupted. Knows records and the stream only.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .records import PHASES, Run, RunHeader, StepRecord, forced_label
from .stream import Stream

PERFETTO_MAX_BYTES = 100_000_000  # the viewer loads plain JSON of this size with ease
_GZIP = 31  # zlib's window bits for the gzip format
_GZIP_PIECE = 64  # damage costs the piece it lies in, about one step


class TraceError(OSError):
    """A trace that cannot be written: where, why, and how many steps are safe in the file."""

    def __init__(self, path: Path, reason: str, num_kept: int) -> None:
        super().__init__(f"cannot write the trace {path}: {reason}; {num_kept} steps are kept in it")
        self.path = path
        self.reason = reason
        self.num_kept = num_kept


def _line(data: dict[str, Any], what: str) -> bytes:
    try:
        return json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    except ValueError:
        where = [name for name, value in data.items() if isinstance(value, float) and not math.isfinite(value)]
        raise ValueError(f"{what} holds an infinite or undefined number, which JSON cannot keep: {where}") from None


class TraceWriter:
    """A sink that writes a run as it happens; gzipped when the name ends in `.gz`.

    A failed write removes its own half line, closes the file and raises TraceError; earlier lines stay readable.
    """

    def __init__(self, path: str | os.PathLike[str], header: RunHeader, *, overwrite: bool = False) -> None:
        self.path = Path(path)
        self.num_steps = 0
        self._offset = 0
        first = _line(header.to_dict(), "the header")
        self._deflate = zlib.compressobj(wbits=_GZIP) if self.path.suffix == ".gz" else None
        try:
            # Unbuffered: what a failed write left behind is then in the file, where it can be cut off, not in a buffer.
            self._file: BinaryIO = open(self.path, "wb" if overwrite else "xb", buffering=0)  # noqa: SIM115 (kept open)
        except FileExistsError:
            reason = "the file exists; pass overwrite=True to replace it, or choose another name"
            raise TraceError(self.path, reason, 0) from None
        except OSError as error:
            raise TraceError(self.path, error.strerror or str(error), 0) from error
        self._write(self._pack(first))

    def __call__(self, step: StepRecord) -> None:
        """Append one step."""
        if self._file.closed:
            raise TraceError(self.path, "the trace is closed", self.num_steps)
        self._write(self._pack(_line(step.to_dict(), f"step {step.index}")))
        self.num_steps += 1

    def _pack(self, line: bytes) -> bytes:
        if self._deflate is None:
            return line
        return self._deflate.compress(line) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._abandon()
            raise TraceError(self.path, error.strerror or str(error), self.num_steps) from error
        self._offset += len(data)

    def _abandon(self) -> None:
        """Cut the half line off and close; a file that refuses even that keeps a half line, which readers skip."""
        with contextlib.suppress(OSError):
            self._file.truncate(self._offset)
        self._file.close()
        if self._offset == 0 and self.path.is_file():  # not even the header: leave no file that blocks the next try
            self.path.unlink()

    def close(self, *, interrupted: bool = False) -> None:
        """Write the end line; closing again does nothing. `record` hides interrupts: pass on its run.interrupted."""
        if self._file.closed:
            return
        last = self._pack(_line({"end": {"num_steps": self.num_steps, "interrupted": interrupted}}, "the end"))
        self._write(last if self._deflate is None else last + self._deflate.flush())
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close(interrupted=kind is not None)


def write_run(run: Run, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Save a finished run; `read_run` gives it back unchanged."""
    with TraceWriter(path, run.header, overwrite=overwrite) as writer:
        for step in run.steps:
            writer(step)
        writer.close(interrupted=run.interrupted)
    return writer.path


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A run read back, and how many lines were skipped because they were cut or are not ours."""

    run: Run
    num_skipped: int


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 14):
            yield chunk


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress as far as the bytes reach: a cut file is no error here."""
    inflate = zlib.decompressobj(_GZIP)
    for rest in (chunk[i : i + _GZIP_PIECE] for chunk in chunks for i in range(0, len(chunk), _GZIP_PIECE)):
        while rest:
            inflate = zlib.decompressobj(_GZIP) if inflate.eof else inflate
            try:
                yield inflate.decompress(rest)
            except zlib.error:
                yield b"\0"  # no JSON: the damaged rest counts as one skipped line
                return
            rest = inflate.unused_data


def _lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends; the last one may be cut."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    rest = b""
    for chunk in _gunzip(_chunks(path)) if is_gzip else _chunks(path):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    yield rest


@dataclass(frozen=True, slots=True)
class _End:
    interrupted: bool


def _open(path: Path) -> tuple[RunHeader, Iterator[StepRecord | _End | None]]:
    """The header, and what follows: a step, the end, or None for a line that is not ours."""
    lines = _lines(path)
    first = next(lines)
    try:
        data = json.loads(first)
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
        header = RunHeader.from_dict(data)
    except (ValueError, TypeError, AttributeError) as error:
        found = f"{first[:60]!r}" if first else "an empty line"
        raise ValueError(f"{path} is no trace: a run header must come first, found {found} ({error})") from None
    return header, _entries(lines, header.cell.batch)


def _entries(lines: Iterator[bytes], batch: int) -> Iterator[StepRecord | _End | None]:
    ended = False
    for line in lines:
        if line.strip():
            entry = None if ended else _entry(line, batch)
            ended = ended or isinstance(entry, _End)
            yield entry


def _entry(line: bytes, batch: int) -> StepRecord | _End | None:
    try:
        data = json.loads(line)
        if not isinstance(data, dict):
            return None
        if "end" in data:
            return _End(bool(data["end"]["interrupted"]))
        step = StepRecord.from_dict(data)
    except (ValueError, TypeError, KeyError):
        return None
    return step if step.batch == batch else None


def read_run(path: str | os.PathLike[str]) -> ReadResult:
    """Read a trace. Cut or foreign lines are skipped and counted, the file is never touched.

    ValueError when the first line is no run header of a known schema. Without an end line the run is interrupted.
    """
    header, entries = _open(Path(path))
    steps: list[StepRecord] = []
    num_skipped, interrupted = 0, True
    for entry in entries:
        if isinstance(entry, StepRecord):
            steps.append(entry)
        elif entry is None:
            num_skipped += 1
        else:
            interrupted = entry.interrupted
    return ReadResult(Run(header, tuple(steps), interrupted), num_skipped)


def replay(path: str | os.PathLike[str]) -> Stream:
    """The same stream again, step by step as it is asked for; a warning at its end tells of skipped lines."""
    header, entries = _open(Path(path))
    return Stream(header, _replayed(Path(path), entries))


def _replayed(path: Path, entries: Iterator[StepRecord | _End | None]) -> Iterator[StepRecord]:
    num_skipped = 0
    for entry in entries:
        if isinstance(entry, StepRecord):
            yield entry
        num_skipped += entry is None
    if num_skipped:
        warnings.warn(f"{path}: {num_skipped} lines were cut or are not ours and were skipped", stacklevel=2)


# --- the timeline ---

_PID, _ROUNDS, _PHASES = 0, 1, 2


def _ticks(seconds: float) -> int:
    """Times are kept in 1/8 us, exact in binary and decimal: the viewer's rounding can then not make slices overlap."""
    return round(seconds * 8e6)


def _metadata(name: str, value: str, thread: int = 0) -> dict[str, Any]:
    key = "labels" if name == "process_labels" else "name"
    return {"ph": "M", "pid": _PID, "tid": thread, "name": name, "args": {key: value}}


def _slice(name: str, track: int, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    where = {"ph": "X", "pid": _PID, "tid": track, "ts": start / 8, "dur": (end - start) / 8}
    return {"name": name, **where, "args": args}


def _counter(name: str, start: int, value: float) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": _PID, "ts": start / 8, "args": {"value": value}}


def _round_slice(step: StepRecord, start: int, end: int) -> dict[str, Any]:
    args: dict[str, Any] = {
        "index": step.index,
        "config": step.config,
        "measured wall_s": step.wall_s,
        "drafted": list(step.drafted),
        "accepted": list(step.accepted),
        "emitted tokens": step.num_emitted,
        "context tokens": list(step.context_tokens),
        "flags": list(step.flags),
    }
    if step.context_cost_s is not None:
        args["sampled context_cost_s"] = step.context_cost_s
    return _slice("prefill" if step.kind == "prefill" else step.config, _ROUNDS, start, end, args)


def _phase_slices(step: StepRecord, start: int, end: int) -> Iterator[dict[str, Any]]:
    """Phases end to end within the round, in the order in which bars are stacked; phases of no time are left out."""
    modelled = {
        "attention_s": {"modelled kv_floor_s": step.kv_floor_s, "modelled kv_read_bytes": step.kv_read_bytes},
        "draft_s": {"modelled kv_floor_s": step.draft_kv_floor_s, "modelled kv_read_bytes": step.draft_kv_read_bytes},
    }
    at, elapsed_s = start, 0.0
    for name in PHASES:
        seconds = getattr(step, name)
        elapsed_s += seconds
        until = min(start + _ticks(elapsed_s), end)
        if until > at:
            yield _slice(name.removesuffix("_s"), _PHASES, at, until, {"measured_s": seconds, **modelled.get(name, {})})
        at = until


def _counters(step: StepRecord, start: int, forced: bool) -> Iterator[dict[str, Any]]:
    live = [tokens for tokens, is_live in zip(step.context_tokens, step.live, strict=True) if is_live]
    if step.kind == "round" and live:
        name = "tokens per live row (acceptance: forced)" if forced else "tokens per live row"
        yield _counter(name, start, step.num_emitted / len(live))
        yield _counter("context tokens, mean of live rows", start, sum(live) / len(live))
    if step.attention_s and step.kv_read_bytes:
        rate = step.kv_read_bytes / step.attention_s
        yield _counter("KV bytes/s of verify (modelled bytes, measured time)", start, rate)


def perfetto(run: Run) -> dict[str, Any]:
    """The run in Chrome trace JSON: tracks `rounds` and `phases`, counters, the header under `otherData`.

    Measured and modelled values are named so. Times are microseconds since the start of the run.
    """
    header = run.header
    forced = forced_label(header.labels)
    title = f"specdec_lab {header.target.get('name', 'target')} {header.cell} {header.config}"
    title += f" ({forced})" if forced else ""
    events = [_metadata("process_name", title)]
    events += [_metadata("process_labels", ", ".join(header.labels))] if header.labels else []
    events += [_metadata("thread_name", "rounds", _ROUNDS), _metadata("thread_name", "phases", _PHASES)]
    end = 0
    for step in run.steps:
        start = max(end, _ticks(step.start_s))
        end = start + _ticks(step.wall_s)
        events += [_round_slice(step, start, end), *_phase_slices(step, start, end)]
        events += _counters(step, start, forced is not None)
    other = {**header.to_dict(), "interrupted": run.interrupted}
    return {"displayTimeUnit": "ms", "distributedInfo": {"rank": 0}, "otherData": other, "traceEvents": events}


def write_perfetto(run: Run, path: str | os.PathLike[str]) -> Path:
    """Write the timeline, gzipped when the name ends in `.gz`; it is derived from the run, so it replaces a file.

    ValueError when plain JSON would pass 100 MB.
    """
    path = Path(path)
    data = _line(perfetto(run), "the run")
    if path.suffix == ".gz":
        deflate = zlib.compressobj(wbits=_GZIP)
        data = deflate.compress(data) + deflate.flush()
    elif len(data) > PERFETTO_MAX_BYTES:
        raise ValueError(f"the timeline has {len(data):,} bytes, more than the viewer likes: write to {path.name}.gz")
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
    return path
