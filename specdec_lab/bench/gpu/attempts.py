"""What goes wrong in one cell or with one contestant becomes words, and the rest of the stage goes on.

Foreign code (compilers, drivers, other people's engines) raises whatever it likes; a measurement of many cells answers all of
it in the same way: by a row. Not known here: what was tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType

import torch

from .context import Context, OutOfTime, Skipped, release
from .ledger import RED, Row

LONGEST = 300  # characters of a reason
OUT_OF_MEMORY = "out of memory"
ENDS_THE_STAGE = (OutOfTime, Skipped)


class Attempt:
    """A `with` block that ends with words where it would end with an error; the end of a stage passes through.

    reason      "" if nothing went wrong
    is_memory   whether memory was short: a fact about the machine, not a mistake
    """

    def __init__(self) -> None:
        self.reason = ""
        self.is_memory = False

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ENDS_THE_STAGE):
            return False
        self.is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        said = " ".join(str(error).split())[:LONGEST]
        self.reason = said if isinstance(error, MemoryError) else f"{type(error).__name__}: {said}".removesuffix(": ")
        return True  # with the error go the frames that hold what filled the memory


def one_by_one(context: Context, what: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one cell. If it runs out of memory or fails, one more row says so (red), and the next cell has its turn.

    A device that a fault has broken raises here: nothing measured after that would mean anything.
    """
    return _guarded(context, what, rows, Row("failed", what, verdict=RED, bar="runs"))


def one_of_theirs(context: Context, what: str, rows: Iterable[Row]) -> Iterator[Row]:
    """As one_by_one, for a contestant that is not ours: that it fails here is a finding, and nothing of ours is wrong."""
    return _guarded(context, what, rows, Row("failed", what))


def _guarded(context: Context, what: str, rows: Iterable[Row], failed: Row) -> Iterator[Row]:
    attempt = Attempt()
    with attempt:
        yield from rows
    if not attempt.reason:
        return
    del rows
    release(context.device)
    context.synchronize()
    if attempt.is_memory:
        yield Row("left out", what, reason=f"{OUT_OF_MEMORY}: {attempt.reason}")
    else:
        yield replace(failed, reason=attempt.reason)
