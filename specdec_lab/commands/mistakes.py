"""A mistake of the user is one line; a fault of the program keeps its traceback. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

OURS = __name__.partition(".")[0]


class UserMistake(Exception):
    """What was asked cannot be done; the message is one line that says what, why and what to do."""


@contextmanager
def asked() -> Iterator[None]:
    """Around what turns words of the user into objects: an error that our own code raised there is the user's mistake.

    Our code raises ValueError (bad values), OSError (files) and MemoryError or RuntimeError (a cache that does not fit, a
    back end that cannot) with messages made for reading. The same types from torch, say, are faults and pass through;
    an OSError with a file name is about that file whoever raised it.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if not (_is_raised_by_us(error.__traceback__) or _names_a_file(error)):
            raise
        raise UserMistake(one_line(error)) from error


def one_line(error: BaseException) -> str:
    """The message, or for a bare OSError `name: reason`."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _is_raised_by_us(traceback: TracebackType | None) -> bool:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback else ""
    return str(module).partition(".")[0] == OURS


def _names_a_file(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is not None
