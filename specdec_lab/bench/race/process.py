"""Peers in a process and environment of their own: one JSON object per line in, one per line out (see PROTOCOL).

A worker that dies, hangs or refuses is one sentence, never an exception of another kind. Not known here: any engine.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...records import Cell
from .peer import Decoded, PeerFailed, Rows

PROTOCOL = """
-> {"do": "hello"}                                       <- {"ok": true, "name", "settings": {...}, "max_batch"}
-> {"do": "prepare", "prompts": [[ids]], "new_tokens"}   <- {"ok": true, "prefill_s"} (and "settings", if they changed)
-> {"do": "decode"}                                      <- {"ok": true, "tokens": [[ids]], "seconds", "extra": {...}}
-> {"do": "close"}                                       <- {"ok": true} and the worker ends
instead of any answer                                    <- {"ok": false, "why": "one sentence"}
"""
STRAY = ("PYTHONPATH", "PYTHONHOME")  # of our environment: another Python must find its own packages


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds that an answer may take."""

    hello_s: float = 120.0
    prepare_s: float = 600.0
    decode_s: float = 300.0
    close_s: float = 10.0


class ProcessPeer:
    """A worker process, started when it is first asked.

    name     what the row is called if the worker cannot say it
    command  program and arguments
    """

    def __init__(self, name: str, command: Sequence[str], *, goes_last: bool = False, patience: Patience | None = None) -> None:
        self.name, self.goes_last = name, goes_last
        self._command, self._patience = list(command), patience or Patience()
        self._worker: _Worker | None = None
        self._hello: dict[str, Any] = {}
        self._refusal: str | None = None

    def why_not(self, cell: Cell) -> str | None:
        try:
            self._greeted()
        except PeerFailed as reason:
            self._refusal = str(reason)
        if self._refusal is not None:
            return self._refusal
        most = self._hello.get("max_batch")
        return f"{self.name} takes at most {most} rows" if isinstance(most, int) and cell.batch > most else None

    def settings(self) -> dict[str, Any]:
        return dict(self._hello.get("settings", {}))

    def prepare(self, prompts: Rows, new_tokens: int) -> float:
        asked = {"do": "prepare", "prompts": prompts, "new_tokens": new_tokens}
        answer = self._ask(asked, self._patience.prepare_s)
        self._hello["settings"] = answer.get("settings", self._hello.get("settings", {}))
        return float(self._field(answer, "prefill_s", (int, float)))

    def decode(self) -> Decoded:
        answer = self._ask({"do": "decode"}, self._patience.decode_s)
        tokens, seconds = self._field(answer, "tokens", (list,)), float(self._field(answer, "seconds", (int, float)))
        if not seconds > 0:
            raise PeerFailed(f"{self.name} says that it decoded in {seconds} s")
        return Decoded([[int(token) for token in row] for row in tokens], seconds, dict(answer.get("extra") or {}))

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end(self._patience.close_s)

    def _greeted(self) -> _Worker:
        if self._refusal is not None:
            raise PeerFailed(self._refusal)
        if self._worker is None:
            self._worker = _Worker(self.name, self._command)
            self._hello = self._worker.ask({"do": "hello"}, self._patience.hello_s)
            self.name = str(self._hello.get("name", self.name))
        return self._worker

    def _ask(self, request: dict[str, Any], patience_s: float) -> dict[str, Any]:
        try:
            return self._greeted().ask(request, patience_s)
        except PeerFailed:
            self.close()
            raise

    def _field(self, answer: dict[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
        value = answer.get(name)
        if not isinstance(value, kinds):
            raise PeerFailed(f"{self.name} answered without a usable {name!r}: {str(answer)[:80]}")
        return value


class _Worker:
    """A running process, the lines that it wrote, and the last of what it complained about."""

    def __init__(self, name: str, command: list[str]) -> None:
        self._name = name
        # a file, because a pipe that nobody reads would stop the worker; `end` closes it
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        surroundings = {key: value for key, value in os.environ.items() if key not in STRAY}
        try:
            # a session of its own: an interrupt at the terminal is for us, and we end the worker in order
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, env=surroundings,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise PeerFailed(f"{name} could not be started: {command[0]}: {error.strerror}") from error
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"reads {name}", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")  # the end

    def ask(self, request: dict[str, Any], patience_s: float) -> dict[str, Any]:
        """The answer; PeerFailed when there is none, none in time, or a refusal."""
        wanted = request["do"]
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=patience_s)
        except OSError:
            line = b""
        except queue.Empty:
            self._process.kill()
            raise PeerFailed(f"{self._name} gave no answer to {wanted} in {patience_s:g} s and was stopped") from None
        if not line:
            raise PeerFailed(self._obituary(wanted))
        return self._understood(line, wanted)

    def _understood(self, line: bytes, wanted: str) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerFailed(f"{self._name} answered {wanted} with something that is no JSON object: {line[:80]!r}")
        if answer.get("ok") is not True:
            raise PeerFailed(f"{self._name}: {answer.get('why', 'refused without a reason')}")
        return answer

    def _obituary(self, wanted: str) -> str:
        try:
            code: int | str = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            code = "unknown, its output was closed"
            self._process.kill()
        self._complaints.seek(0)
        said = [line.strip() for line in self._complaints.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{self._name} died when asked to {wanted} (exit code {code}){f': {said[-1]}' if said else ''}"

    def end(self, patience_s: float) -> None:
        """Ask it to close; stop it if it does not."""
        try:
            self.ask({"do": "close"}, patience_s)
            self._process.wait(timeout=patience_s)
        except (PeerFailed, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._complaints):
            if pipe is not None and not pipe.closed:
                _close(pipe)


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # what was still to be written is for a worker that is gone
        return


def script(name: str) -> Path:
    """A stand-alone script that comes with this package."""
    return Path(__file__).parent / "workers" / name
