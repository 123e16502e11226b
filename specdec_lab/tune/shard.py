"""A part of a plan's cells for one process of many that never meet: a job array, machines without a network between them.

Cells are dealt in turn, by size, so that every shard gets small and large ones. A cell starts from what its own shard has
found, so results depend on the number of shards, and neither on who measured them nor on the order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..records import Cell

ALL = 0


@dataclass(frozen=True, slots=True)
class CellShard:
    """Shard `index` of `count`, from 1; ALL = every shard, one process doing what `count` would."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a shard of cells is written i/n with n at least 1, for example 2/8, got {self}")
        if not ALL <= self.index <= self.count:
            raise ValueError(f"shard {self} does not exist: i goes from 1 to {self.count}")

    @classmethod
    def parse(cls, text: str) -> CellShard:
        """`2/8`, or `all/8`; the inverse of str."""
        match = re.fullmatch(r"(\d+|all)/(\d+)", text.strip())
        if match is None:
            raise ValueError(f"a shard of cells is written i/n, for example 2/8 for the second of eight, got {text!r}")
        if match[1] != "all" and int(match[1]) == ALL:
            raise ValueError(f"shard {match[0]} does not exist: i goes from 1 to {match[2]}; where jobs count from 0, add 1")
        return cls(ALL if match[1] == "all" else int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index or 'all'}/{self.count}"

    @property
    def is_whole(self) -> bool:
        """Whether all shards are meant."""
        return self.index == ALL

    @property
    def suffix(self) -> str:
        """What the names of its folders and files end in; empty for all shards."""
        return "" if self.is_whole else f"-{self.index}of{self.count}"


WHOLE = CellShard(ALL, 1)


def by_size(cell: Cell) -> tuple[int, Cell]:
    """Sorts the cells that cost least first."""
    return cell.batch * cell.length, cell


def deal(cells: Sequence[Cell], count: int) -> dict[Cell, int]:
    """Which shard, from 1, each cell belongs to."""
    return {cell: place % count + 1 for place, cell in enumerate(sorted(cells, key=by_size))}
