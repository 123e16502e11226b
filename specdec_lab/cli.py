"""The shell's door: `specdec-lab VERB ...`.

Exit codes: 0 done; 1 measured, and a check is red; 2 a mistake in what was asked; 3 the budget ended, the policy is
partial; 4 nothing beats plain decoding, a policy is written all the same; 130 interrupted, what was recorded is kept.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from .commands.lab import Lab
from .commands.mistakes import UserMistake, asked
from .commands.outcome import INTERRUPTED, MISTAKE, OK, Outcome, StreamJob
from .commands.parser import SHELL, Finished, build_parser
from .commands.ranks import among_ranks, follow, follows, is_first_rank
from .commands.screen import Screen, drain
from .commands.verbs import handle

if TYPE_CHECKING:
    from .commands.tuning import TuneJob
    from .tune import Progress


def main(
    argv: Sequence[str] | None = None, *, load: Callable[..., Any] | None = None, out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Run one verb and return its exit code; `load`, `out` and `err` are injected in tests."""
    speaks = is_first_rank()
    out, err = out or (sys.stdout if speaks else io.StringIO()), err or sys.stderr
    with among_ranks(err) as ends:
        try:
            with _short_warnings(err):
                return _run(argv, Lab(load, out=out, err=err))
        except Finished:
            return OK
        except UserMistake as mistake:
            return ends.say(f"{SHELL}: error: {mistake}", MISTAKE)
        except KeyboardInterrupt:
            return ends.say(f"{SHELL}: interrupted", INTERRUPTED)
        except BrokenPipeError:  # whoever read our output went away, as `| head` does: the rest goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return OK


def _run(argv: Sequence[str] | None, lab: Lab) -> int:
    args = build_parser(SHELL).parse_args(argv)
    given = follow(lab, args) if follows(args) else handle(lab, args)
    outcome = given if isinstance(given, Outcome) else _work(given, Screen(lab.err))
    words = json.dumps(outcome.data, indent=1, allow_nan=False) if args.json else outcome.words
    lab.out.write(f"{words}\n")
    lab.out.flush()
    return outcome.code


def _work(job: StreamJob | TuneJob, screen: Screen) -> Outcome:
    """Do a job in this thread. Files that cannot be written are the user's to mend, so they end it in one line."""
    with _disk_errors():
        if not isinstance(job, StreamJob):
            return job.conclude(job.run(_progress(screen)))
        drained = drain(job, screen)
        outcome = job.conclude(drained.runs)
        if drained.error is not None:
            screen.say(f"{SHELL}: error: {drained.error}")
            return replace(outcome, code=MISTAKE)
        return replace(outcome, code=INTERRUPTED) if drained.is_interrupted else outcome


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError:
        with asked():  # a full disk, a database that went read-only: our message says what is kept
            raise


def _progress(screen: Screen) -> Callable[[Progress], None]:
    """A line that stays per finished cell, and one that is renewed per block."""

    def report(progress: Progress) -> None:
        from .commands.tuning import progress_line

        if progress.stage == "cell":
            screen.say(progress_line(progress))
        else:
            screen.draw(lambda: progress_line(progress))

    return report


@contextmanager
def _short_warnings(err: TextIO) -> Iterator[None]:
    """Warnings as one line each, without the place in our code that a user cannot use."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        err.write(f"{SHELL}: note: {' '.join(str(message).split())}\n")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
