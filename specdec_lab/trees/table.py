"""The dynamic program of Sequoia: exact for every acceptance, also where it rises with rank.

    M_l[n] = 1 + W_1[n-1]                                       a node with l levels (its own counted) and n nodes
    W_k[m] = max over 1 <= j <= m of p_k * M_(l-1)[j] + W_(k+1)[m-j]      its children of rank k and above, m nodes

All sizes are "at most": a node that adds nothing is not drafted. Levels are built from the bottom up; one maximum over j is
one strip of a Toeplitz matrix, so the loops in Python run over levels and ranks only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..records import TreeShape
from .acceptance import Acceptance
from .shape import breadth_first

STRIP = 64  # rows of the Toeplitz matrix handled at once: a strip of 768 columns stays in the cache

Values = NDArray[np.float64]
Splits = NDArray[np.int16]


class TableSearch:
    """Best trees of up to `nodes` nodes and `levels` levels (root counted), for any smaller size and cap as well."""

    method = "dp"

    def __init__(self, acceptance: Acceptance, nodes: int, levels: int) -> None:
        self._acceptance, self._nodes, self._levels = acceptance, nodes, levels
        self._tables: dict[int, Table] = {}

    def tree(self, nodes: int, levels: int) -> TreeShape | None:
        """The best tree of at most `nodes` nodes and `levels` levels; None where no drafted node is ever accepted."""
        # A vector looks the same from every level, so one table answers every cap. A matrix needs one table per cap.
        cap = self._levels if self._acceptance.repeats else levels
        if cap not in self._tables:
            rows = [self._acceptance.useful(depth) for depth in range(cap - 1, 0, -1)]
            self._tables[cap] = Table(rows, self._nodes, repeats=self._acceptance.repeats)
        return self._tables[cap].tree(nodes, levels)


class Table:
    """Values and back-pointers of every level.

    rows     chances by rank, of the deepest level first; len(rows) + 1 levels
    repeats  all rows are equal: building stops once one more level changes nothing
    """

    def __init__(self, rows: Sequence[Sequence[float]], nodes: int, *, repeats: bool) -> None:
        leaf = np.ones(nodes + 1)
        leaf[0] = 0.0
        self.values: list[Values] = [leaf]
        self.splits: list[list[Splits]] = [[]]
        for row in rows:
            values, splits = _level(row, self.values[-1], nodes)
            self.values.append(values)
            self.splits.append(splits)
            if repeats and np.array_equal(values, self.values[-2]):
                break

    def tree(self, nodes: int, levels: int) -> TreeShape | None:
        """Follow the back-pointers from the root."""
        children: list[list[int]] = [[]]
        todo = [(0, min(levels, len(self.splits)) - 1, nodes - 1)]
        while todo:
            node, level, left = todo.pop()
            for split in self.splits[level]:
                size = int(split[left])
                if size == 0:
                    break
                children[node].append(len(children))
                todo.append((len(children), level - 1, size - 1))
                children.append([])
                left -= size
        return breadth_first(children)


def _level(row: Sequence[float], below: Values, nodes: int) -> tuple[Values, list[Splits]]:
    """M_l by number of nodes, and for every rank and number of nodes left how many go to that child."""
    splits: list[Splits] = []
    rest = np.zeros(nodes)
    for rank in range(min(len(row), nodes - 1), 0, -1):
        most = nodes - rank  # the root and the siblings before have taken the others
        rest, split = _best_split(row[rank - 1] * below[: most + 1], rest[:most])
        splits.append(split)
    values = np.zeros(nodes + 1)
    values[1:] = 1.0 + rest[:nodes]
    return values, splits[::-1]


def _best_split(child: Values, rest: Values) -> tuple[Values, Splits]:
    """For every m the largest child[j] + rest[m-j] over 1 <= j <= m, and the least j that reaches it; 0, 0 if none is > 0."""
    num = len(child)
    windows = sliding_window_view(np.concatenate([np.full(num, -np.inf), rest]), num)[:, ::-1]  # [m, j-1] = rest[m-j]
    values, splits = np.zeros(num), np.zeros(num, dtype=np.int16)
    for start in range(1, num, STRIP):
        stop = min(start + STRIP, num)
        sums = windows[start:stop, : stop - 1] + child[1:stop]
        best = sums.argmax(axis=1)
        values[start:stop] = sums[np.arange(stop - start), best]
        splits[start:stop] = best + 1
    splits[values <= 0] = 0
    return values, splits
