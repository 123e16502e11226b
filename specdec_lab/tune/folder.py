"""The folder of one tuning run: one process at a time, one plan for ever, and which cells are finished."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..records import Cell, Identity, SpecConfig, fingerprint
from .assemble import State
from .db import DatabaseError
from .grid import Plan

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA = "specdec_lab.tune/1"


def _name(path: Path, plan: Plan, experiment: dict[str, Any]) -> str:
    if plan.shard.count == 1:
        return f"{path.name}-{secrets.token_hex(3)}"
    cells = sorted((*plan.all_cells, *plan.siblings))
    same = {**experiment, "cells": [str(cell) for cell in cells], "shards": plan.shard.count, "protocol": asdict(plan.protocol)}
    return f"{path.name.removesuffix(plan.shard.suffix)}-{fingerprint(same)[:6]}"


class PlanChanged(ValueError):
    """A run folder that holds another plan."""


class RunFolder:
    """Held while a run goes on.

    name      of the run in records; unique, so that folders of equal names never make equal ids. The shards of one tuning
              share one, made of what is tuned and of the folder's name without the shard's
    finished  cells that an earlier call of the same run has finished, with their states
    proposed  what the parts of a cell promised when its search began; a resumed search has the same candidates
    """

    def __init__(
        self, path: Path, plan: Plan, identity: Identity, workload: str, temperature: float, seed: int,
        remeasure: bool = False,
    ) -> None:  # fmt: skip
        self.path = path
        fingerprints = {kind: identity.drafter_fingerprint(kind) for kind in identity.drafters}
        experiment = {"workload": workload, "temperature": temperature, "seed": seed, "drafters": fingerprints}
        experiment |= {"remeasure": True} if remeasure else {}
        self._plan = {"schema": SCHEMA, "base": identity.base_fingerprint, **experiment, **plan.to_dict()}
        self.name = _name(path, plan, {"base": identity.base_fingerprint, **experiment})
        self.finished: dict[Cell, State] = {}
        self.proposed: dict[Cell, tuple[SpecConfig, ...]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("w")
            self._hold()
            self._resume()
        except OSError as error:
            self.close()
            if isinstance(error, DatabaseError):
                raise
            raise DatabaseError(self.path, f"cannot be used: {error.strerror}", "Choose a writable run folder") from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def finish(self, cell: Cell, state: State) -> None:
        """Remember that a cell needs nothing more."""
        self.finished[cell] = state
        self._write_finished()

    def propose(self, cell: Cell, configs: Sequence[SpecConfig]) -> None:
        """Remember what is added to the candidates of a cell."""
        self.proposed[cell] = tuple(configs)
        self._write_proposed()

    def reopen(self, cell: Cell) -> None:
        """Forget that a cell is finished, and what its parts promised."""
        if self.finished.pop(cell, None) is not None:
            self._write_finished()
        if self.proposed.pop(cell, None) is not None:
            self._write_proposed()

    def _write_finished(self) -> None:
        self._write("resume.json", {str(cell): list(state) for cell, state in self.finished.items()})

    def _write_proposed(self) -> None:
        self._write("proposed.json", {str(cell): list(map(str, configs)) for cell, configs in self.proposed.items()})

    def _hold(self) -> None:
        assert self._lock is not None
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatabaseError(
                self.path, "another tuner is running in this run folder", "Wait for it, or choose another folder"
            ) from error

    def _resume(self) -> None:
        path = self.path / "plan.json"
        if not path.exists():
            self._write("plan.json", {**self._plan, "run": self.name})
            return
        before, ours = self._read(path), json.loads(json.dumps(self._plan))
        self.name = before.pop("run", self.name)
        if changed := [key for key in {**before, **ours} if before.get(key) != ours.get(key)]:
            raise PlanChanged(
                f"{self.path} holds another plan ({', '.join(changed)} differ). Resume it with its own arguments, or choose "
                "another run folder; recorded measurements are used again by either"
            )
        if (resume := self.path / "resume.json").exists():
            states = self._read(resume)
            self.finished = {Cell.parse(cell): (state[0], state[1]) for cell, state in states.items()}
        if (proposed := self.path / "proposed.json").exists():
            found = self._read(proposed)
            self.proposed = {Cell.parse(cell): tuple(map(SpecConfig.parse, configs)) for cell, configs in found.items()}

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text())
        except ValueError as error:
            raise PlanChanged(f"{path} is not the JSON of a tuning run: {error}. Choose another run folder") from None
        if not isinstance(data, dict):
            raise PlanChanged(f"{path} is not the JSON of a tuning run. Choose another run folder")
        return data

    def _write(self, name: str, data: dict[str, Any]) -> None:
        new = self.path / f".{name}.new"
        new.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")
        os.replace(new, self.path / name)
