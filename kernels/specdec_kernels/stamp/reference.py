"""What a stamp is: the moment at which the work before it is done, in nanoseconds of one clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor


def stamp(table: Tensor, number: Tensor, column: int, now: Callable[[], int] = time.perf_counter_ns) -> None:
    """Write the time into table [rows, columns] int64, at row number [1] int64 modulo rows.

    Right on a CPU, where work is done when its call returns.
    """
    table[:, column].scatter_(0, number % table.shape[0], now())
