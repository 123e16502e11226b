"""The conversation of a worker with whoever started it: one JSON object per line, in on stdin, out on stdout.

Standard library only, and imported by its plain name: a worker is started as a script, in an environment without this
project. Not known here: any engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

MODES = ("plain", "draft", "lookup")


class CannotRun(Exception):
    """Why this peer cannot do what it was asked, in one sentence."""


@dataclass(frozen=True)
class Decoded:
    """What one decode gave: new tokens of every row, the seconds they took, and what else is worth a look."""

    tokens: list[list[int]]
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """One engine with its models loaded.

    positions  tokens that a row may hold, prompt and new ones together
    vocab      ids run from 0 to vocab - 1
    """

    name: str
    max_batch: int
    positions: int
    vocab: int

    def settings(self) -> dict[str, Any]: ...

    def prepare(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Read the prompts, all tokens but the last of each; seconds."""

    def decode(self) -> Decoded:
        """Continue greedily from the end of the prompts, whatever was decoded before."""

    def close(self) -> None: ...


@dataclass
class Desk:
    """Answers one request after another with one engine."""

    engine: Engine
    is_prepared: bool = False

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; CannotRun says in one sentence why there is none."""
        actions: dict[Any, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "hello": self._hello, "prepare": self._prepare, "decode": self._decode, "close": self._close,
        }  # fmt: skip
        wanted = request.get("do")
        if not isinstance(wanted, str) or wanted not in actions:
            raise CannotRun(f"unknown command {wanted!r}: use {', '.join(actions)}")
        return actions[wanted](request)

    def _hello(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"name": self.engine.name, "settings": self.engine.settings(), "max_batch": self.engine.max_batch}

    def _prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        prompts, new_tokens = request.get("prompts"), request.get("new_tokens")
        if not isinstance(new_tokens, int) or new_tokens < 1:
            raise CannotRun(f"new_tokens must be an integer of at least 1, got {new_tokens!r}")
        if not isinstance(prompts, list) or not prompts:
            raise CannotRun("prompts must be a list of at least one row of token ids")
        check_prompts(prompts, new_tokens, self.engine)
        self.is_prepared = False
        prefill_s = self.engine.prepare(prompts, new_tokens)
        self.is_prepared = True
        return {"prefill_s": prefill_s, "settings": self.engine.settings()}

    def _decode(self, request: dict[str, Any]) -> dict[str, Any]:
        if not self.is_prepared:
            raise CannotRun("nothing is prepared: send prepare with prompts first")
        decoded = self.engine.decode()
        return {"tokens": decoded.tokens, "seconds": decoded.seconds, "extra": decoded.extra}

    def _close(self, request: dict[str, Any]) -> dict[str, Any]:
        self.engine.close()
        return {}


def check_prompts(prompts: list[Any], new_tokens: int, engine: Engine) -> None:
    """Refuse what the engine cannot hold, with the row and the number."""
    if len(prompts) > engine.max_batch:
        raise CannotRun(f"{len(prompts)} rows were sent, {engine.name} takes at most {engine.max_batch}")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            raise CannotRun(f"row {row} is not a list of at least one token id")
        if min(prompt) < 0 or max(prompt) >= engine.vocab:
            strange = next(token for token in prompt if not 0 <= token < engine.vocab)
            raise CannotRun(f"row {row} holds token {strange}, ids run from 0 to {engine.vocab - 1}")
        if len(prompt) + new_tokens > engine.positions:
            raise CannotRun(
                f"row {row} needs {len(prompt)} + {new_tokens} positions, the model was trained for {engine.positions}"
            )


def serve(engine: Engine, lines: Iterable[str], out: TextIO) -> None:
    """Answer every line until close; the end of the input closes too."""
    desk = Desk(engine)
    for line in lines:
        try:
            request = read(line)
            send(out, {"ok": True} | desk.answer(request))
        except CannotRun as refusal:
            send(out, refused(refusal))
        else:
            if request["do"] == "close":
                return
    engine.close()


def read(line: str) -> dict[str, Any]:
    """One request; CannotRun where the line is none."""
    try:
        request = json.loads(line)
    except json.JSONDecodeError as error:
        raise CannotRun(f"the line is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise CannotRun(f"a request is a JSON object, got {type(request).__name__}")
    return request


def send(out: TextIO, answer: dict[str, Any]) -> None:
    """One line, seen at once by the reader."""
    out.write(json.dumps(answer) + "\n")
    out.flush()


def refused(refusal: CannotRun) -> dict[str, Any]:
    """The answer that says why not, on one line whatever a library wrote."""
    return {"ok": False, "why": " ".join(str(refusal).split())}


def claim_stdout() -> TextIO:
    """The real stdout for answers alone; whatever a library prints from now on, in C or in Python, goes to stderr."""
    sys.stdout.flush()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def options(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """What every worker is started with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="the converted target")
    parser.add_argument("--draft", help="the converted draft model, for --mode draft")
    parser.add_argument("--threads", type=int, required=True, help="of the engine, prompt and decoding alike")
    parser.add_argument("--mode", choices=MODES, default="plain")
    chosen = parser.parse_args(argv)
    if chosen.threads < 1:
        parser.error(f"--threads must be at least 1, got {chosen.threads}")
    if (chosen.mode == "draft") != (chosen.draft is not None):
        parser.error("--mode draft needs --draft PATH, and no other mode takes one")
    return chosen


def run(build: Callable[[argparse.Namespace], Engine], description: str) -> None:
    """A worker's main: build its engine, then answer; what cannot be built is the answer to the first request."""
    chosen = options(description)
    out = claim_stdout()
    try:
        engine = build(chosen)
    except CannotRun as refusal:
        sys.stdin.readline()
        send(out, refused(refusal))
        raise SystemExit(1) from refusal
    serve(engine, sys.stdin, out)
