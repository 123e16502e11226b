"""Rank acceptance as the search reads it: checked once, then asked by depth.

p_k is the chance that the k-th child of an accepted node is the accepted one. Outcomes are disjoint, so the chances of a
node's children sum to at most 1 (Sequoia, Chen 2024, section 3: positional acceptance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records import MAX_DEPTH

RankChances = Sequence[float] | Sequence[Sequence[float]] | NDArray[np.floating]
SUM_SLACK = 1e-6  # chances kept in float32 sum to 1 with about this error


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Checked chances: rows[d-1][k-1] is p_k among nodes of depth d (children of the root have depth 1).

    repeats  one row stands for every depth (it came as a vector); otherwise nothing is known below the last row
    """

    rows: tuple[tuple[float, ...], ...]
    repeats: bool

    @classmethod
    def of(cls, chances: RankChances | Acceptance) -> Acceptance:
        """From a rank vector [K] or a depth x rank matrix [D, K]; ValueError says which number is no chance."""
        if isinstance(chances, Acceptance):
            return chances
        table = _table(chances)
        for depth, row in enumerate(np.atleast_2d(table), start=1):
            _check_row(row, "" if table.ndim == 1 else f" at depth {depth}")
        rows = tuple(tuple(map(float, row)) for row in np.atleast_2d(table)[:MAX_DEPTH])
        return cls(rows, repeats=table.ndim == 1)

    @property
    def max_levels(self) -> int:
        """Levels, root counted, of the deepest tree whose nodes all have a known chance."""
        return 1 + (MAX_DEPTH if self.repeats else len(self.rows))

    def row(self, depth: int) -> tuple[float, ...]:
        """Chances by rank among nodes of this depth."""
        return self.rows[0 if self.repeats else depth - 1]

    def useful(self, depth: int) -> tuple[float, ...]:
        """The same up to the last rank that is ever accepted: children beyond it are never worth drafting."""
        row = self.row(depth)
        return row[: max((rank for rank, chance in enumerate(row, start=1) if chance > 0), default=0)]


def why_not_heap(chances: RankChances | Acceptance) -> str | None:
    """Why the likeliest nodes need not form a tree, so that only the dynamic program is exact; None if they do."""
    for depth, row in enumerate(Acceptance.of(chances).rows, start=1):
        for rank in range(1, len(row)):
            if row[rank] > row[rank - 1]:
                where = f"from {row[rank - 1]:g} at rank {rank} to {row[rank]:g} at rank {rank + 1} (depth {depth})"
                return f"acceptance rises {where}, so the likeliest nodes need not form a tree"
    return None


def _table(chances: RankChances) -> NDArray[np.float64]:
    try:
        table = np.asarray(chances, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"acceptance must be numbers, all rows equally long ({error}); fill short rows with 0") from None
    if table.ndim not in (1, 2):
        raise ValueError(f"acceptance must be a rank vector or a depth x rank matrix, got {table.ndim} dimensions")
    if table.size == 0:
        raise ValueError(f"acceptance is empty (shape {table.shape}); give at least the chance of rank 1")
    return table


def _check_row(row: NDArray[np.float64], where: str) -> None:
    for rank, chance in enumerate(row, start=1):
        if not np.isfinite(chance):
            raise ValueError(f"acceptance of rank {rank}{where} is {chance}; leave out or set to 0 what was not measured")
        if not 0 <= chance <= 1:
            raise ValueError(f"acceptance of rank {rank}{where} is {chance:g}; a chance lies between 0 and 1")
    if row.sum() > 1 + SUM_SLACK:
        raise ValueError(
            f"acceptance{where} sums to {row.sum():g}; at most one child of a node is accepted, so ranks sum to at most 1: "
            "divide accepted ranks by examined nodes"
        )
