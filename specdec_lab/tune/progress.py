"""What a tuning tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..records import Cell


@dataclass(frozen=True, slots=True)
class Progress:
    """What is going on, reported before and after each block.

    stage    probe (parts of a cell), search, duel, fill, or cell (a cell is finished, or with status `reopened` begun anew)
    done     cells finished, of `total`
    best     leader of this cell, or its result, with its speed-up over plain decoding so far (1.0 = `off`)
    block    of this configuration; None of `status` before it is measured
    """

    cell: Cell
    config: str
    stage: str
    done: int
    total: int
    elapsed_s: float
    eta_s: float
    best: str
    speedup: float
    block: int = 0
    status: str | None = None
    log_speedup: float | None = None


Report = Callable[[Progress], None]
