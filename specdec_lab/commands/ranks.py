"""What a command does where torchrun started several of it: one rank speaks and works, the others follow it."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ..engine.models.meeting import Meeting
from ..engine.models.meeting import meeting as of_this_process
from .mistakes import UserMistake
from .outcome import OK, Outcome

if TYPE_CHECKING:
    from ..engine.loop import Engine
    from .lab import Lab

FAULT = 1
VERBS = ("run", "profile", "tune")  # that are known to give under several ranks what they give in one process


def is_first_rank() -> bool:
    """Whether this process speaks and writes files: of those that torchrun started, one does."""
    return os.environ.get("RANK", "0") == "0"


def check_verb(args: Namespace) -> None:
    """Refuse --tensor-parallel where it has not been made to work."""
    if (getattr(args, "tensor_parallel", None) or 1) < 2:
        return
    if args.verb not in VERBS:
        raise UserMistake(f"--tensor-parallel is for {', '.join(VERBS)}, not for {args.verb}")
    if getattr(args, "devices", None) is not None:
        raise UserMistake("--devices starts processes of its own, which are no ranks: leave out --devices or --tensor-parallel")


def follows(args: Namespace) -> bool:
    """Whether another rank reads, decides and writes, and this one only takes part in the rounds."""
    return not is_first_rank() and (getattr(args, "tensor_parallel", None) or 1) > 1


def follow(lab: Lab, args: Namespace) -> Outcome:
    """Take part until the first rank is done."""
    from ..engine.ranks import follow as take_part

    take_part(lab.engine_for(args).pair)
    return Outcome(None, "", None, OK)


def lead(engine: Engine) -> None:
    """Let the other ranks, if there are any, follow whatever engines over this pair do."""
    if engine.pair.target.group is not None and is_first_rank():
        from ..engine.ranks import lead as give_orders

        give_orders(engine.pair)


class Ends:
    """How a command ends among its ranks: the words of the first that fails are shown, once."""

    def __init__(self, err: TextIO, meeting: Meeting | None) -> None:
        self._err, self._meeting = err, meeting

    def say(self, words: str, code: int) -> int:
        """The exit code; the words are shown unless another rank failed before."""
        if self._meeting is None or self._meeting.end(code):
            self._err.write(f"{words}\n")
        return code


@contextmanager
def among_ranks(err: TextIO) -> Iterator[Ends]:
    """Around a command. A fault of the program ends all ranks too, and is shown once."""
    meeting = of_this_process()
    try:
        yield Ends(err, meeting)
    except Exception:
        if meeting is None or meeting.end(FAULT):
            raise
        raise SystemExit(FAULT) from None

