"""A GPU run from the outside: check the machine, run the stages, say what came out. A rehearsal goes the same way on the CPU.

Not known here: how stages work, and how words are printed.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import machine
from . import readiness, table
from .ledger import FILE, Ledger, header_of
from .plan import Stage, whole_s
from .run import apart, here, run

REHEARSAL = "rehearsal"
GRACE_S = 15.0  # after the end of the run's time, for a stage that is about to say its end
MEANS_NOTHING = "rehearsal: tiny shapes on a CPU; no time and no verdict on a speed means anything"


class CannotRun(ValueError):
    """This machine cannot do what was asked; the message says why and what it can do."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that is over.

    stages  their rows, by name, in the order of running
    """

    path: Path
    stages: dict[str, list[dict[str, Any]]]
    labels: tuple[str, ...] = ()

    @property
    def is_red(self) -> bool:
        """Whether a stage failed or a result was wrong."""
        return table.is_red(self.stages.values())

    def __str__(self) -> str:
        return table.summary(self.stages, str(self.path), [MEANS_NOTHING] if self.labels else [])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"path": str(self.path), "labels": list(self.labels), "is_red": self.is_red, "stages": self.stages}


def measure(
    root: Path, stages: Sequence[Stage], *, minutes: float, again: bool, say: Callable[[str], None],
    look: Callable[[], readiness.Machine] = readiness.look, gpt_fast: Path | None = None,
) -> Finished:
    """All of it on this machine's GPU; CannotRun where there is none that will do."""
    found = look()
    if (reason := readiness.why_not(found)) is not None:
        raise CannotRun(reason)
    from .forecast import lines  # which loads torch and the stages

    say(f"{found.name}, {found.memory_bytes / 1e9:.0f} GB, torch {found.torch} for CUDA {found.cuda}")
    for note in readiness.notes():
        say(f"note: {note}")
    for line in lines(stages, minutes):
        say(line)
    ledger = gpu_ledger(root, secrets.token_hex(4))
    end = time.monotonic() + whole_s(list(stages), minutes) + GRACE_S

    def do(stage: Stage, ledger: Ledger, seconds: float) -> None:
        apart(stage, ledger, seconds, root, gpt_fast=gpt_fast, at_most=end - time.monotonic())

    runs = run(stages, ledger, do, minutes=minutes, again=again, say=say)
    return Finished(ledger.path, {name: ledger.of_run(made, name) for name, made in runs.items()})


def rehearse(
    root: Path | None, stages: Sequence[Stage], *, minutes: float, again: bool, say: Callable[[str], None],
    database: Path | None = None, gpt_fast: Path | None = None,
) -> Finished:
    """All of it with tiny shapes on the CPU, into a temporary folder or `root`, which must not be the `database`."""
    import torch

    from .context import Context
    from .forecast import lines
    from .sizes import TINY

    if root is not None and database is not None and root.resolve() == database.resolve():
        raise CannotRun(f"a rehearsal is not written into a tuning database ({root}): name another folder, or leave out --out")
    folder = root or Path(tempfile.mkdtemp(prefix="specdec_lab_rehearsal_"))
    say("a GPU run of these stages:")
    for line in lines(stages, minutes):
        say(line)
    device = machine.device_name(None, torch.get_num_threads())
    ledger = Ledger(
        folder / device / FILE, secrets.token_hex(4), header_of(device, None, machine.versions()), (REHEARSAL,)
    )

    def do(stage: Stage, ledger: Ledger, seconds: float) -> None:
        here(stage, Context(torch.device("cpu"), TINY, ledger, seconds, say, gpt_fast=gpt_fast))

    runs = run(stages, ledger, do, minutes=minutes, again=again, say=say)
    return Finished(ledger.path, {name: ledger.of_run(made, name) for name, made in runs.items()}, (REHEARSAL,))


def gpu_ledger(root: Path, name: str) -> Ledger:
    """Where rows of this GPU go; `name` is the run's."""
    import torch

    device = machine.device_name(torch.cuda.get_device_name(0), torch.get_num_threads())
    return Ledger(root / device / FILE, name, header_of(device, readiness.driver(), machine.versions()))


def gpu_context(root: Path, name: str, seconds: float, say: Callable[[str], None], gpt_fast: Path | None = None) -> Any:
    """For a stage in a process of its own."""
    import torch

    from .context import Context
    from .sizes import FULL

    return Context(torch.device("cuda"), FULL, gpu_ledger(root, name), seconds, say, gpt_fast=gpt_fast)
