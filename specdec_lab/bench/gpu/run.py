"""Run stages one after another: each in its time, each row kept as it comes, a failure recorded and passed by.

On a GPU every stage has a process of its own, because a kernel that faults takes its process's GPU with it. Not known here:
what the stages measure.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from .context import Context, OutOfTime, Skipped
from .ledger import CUT, FAILED, OK, SKIPPED, Ledger, Row
from .plan import STARTS_S, Stage, seconds_of, whole_s
from .table import row_words

PATIENCE, PATIENCE_S = 1.5, 60.0  # a stage's process is ended after so much of its time and so many seconds

Do = Callable[[Stage, Ledger, float], None]  # run a stage in so many seconds; its rows and its end go into the ledger
Find = Callable[[str], Callable[[Context], Iterable[Row]]]


def run(
    stages: Sequence[Stage], ledger: Ledger, do: Do, *, minutes: float, again: bool = False,
    say: Callable[[str], None] = print, now: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Run what is not done yet, and say under which run the rows of each stage lie.

    again  also what these very sources have done before on this machine
    """
    started, runs, whole = now(), {}, whole_s(list(stages), minutes)
    for stage in stages:
        before = None if again else ledger.last_run_of(stage.name)
        if before is not None:
            say(f"{stage.name}: done before by run {before} of the same sources; --again does it anew")
            runs[stage.name] = before
            continue
        runs[stage.name] = ledger.run
        left = whole - (now() - started)
        if left < STARTS_S:
            ledger.end(stage.name, SKIPPED, 0.0, f"the {minutes:g} minutes of this run are over; run it alone, or give more")
            continue
        seconds = min(seconds_of(stage, minutes), left)
        say(f"{stage.name}: {stage.gives} (at most {seconds:.0f} s)")
        do(stage, ledger, seconds)
    return runs


def stage_of(name: str) -> Callable[[Context], Iterable[Row]]:
    """The function of a stage; its module is loaded only now."""
    found: Callable[[Context], Iterable[Row]] = import_module(f".stages.{name.replace('-', '_')}", __package__).stage
    return found


def here(stage: Stage, context: Context, find: Find = stage_of) -> None:
    """Run a stage in this process. Whatever ends it becomes its recorded end."""
    ledger, started = context.ledger, context.now()
    if stage.missing:
        ledger.end(stage.name, SKIPPED, 0.0, f"{', '.join(stage.missing)} is not installed in this Python")
        return
    with ThreadPoolExecutor(1, "specdec-lab-gpu-stage") as worker:
        # a thread hands over whatever ended its work, kernels' own errors included, as a value
        work = worker.submit(_drain, stage, context, find)
        try:
            error = work.exception()
        except KeyboardInterrupt:
            context.seconds = 0.0  # the stage ends at its next cell
            raise
    status, reason = _end(error)
    ledger.end(stage.name, status, context.now() - started, reason)
    context.say(f"{stage.name}: {status}{f', {reason}' if reason else ''}")


def _drain(stage: Stage, context: Context, find: Find) -> None:
    for row in find(stage.name)(context):
        context.ledger.write(stage.name, row)
        context.say(f"  {row_words(row.to_dict())}")


def _end(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return OK, ""
    words = " ".join(str(error).split())
    if isinstance(error, Skipped):
        return SKIPPED, words
    if isinstance(error, OutOfTime):
        return CUT, words
    return FAILED, f"{type(error).__name__}: {words}"[:600]


def apart(
    stage: Stage, ledger: Ledger, seconds: float, root: Path,
    spawn: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run, gpt_fast: Path | None = None,
    at_most: float = float("inf"),
) -> None:
    """Run a stage in a process of its own; one that dies or hangs is recorded as failed, and what it had found is kept.

    at_most  seconds after which its process is ended, however long it was meant to run
    """
    command = [sys.executable, "-m", __package__ or "", stage.name, "--out", str(root), "--seconds", f"{seconds:.1f}"]
    command += ["--run", ledger.run, *(("--gpt-fast", str(gpt_fast)) if gpt_fast else ())]
    try:
        done = spawn(command, check=False, timeout=min(PATIENCE * seconds + PATIENCE_S, at_most))
        how = _exit_words(done.returncode)
    except subprocess.TimeoutExpired as error:
        how = f"its process still ran after {error.timeout:.0f} s and was ended"
    if not any(row["kind"] == "stage" for row in ledger.of_run(ledger.run, stage.name)):
        ledger.end(stage.name, FAILED, seconds, how)


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"its process ended with code {code} before the stage did"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"
