"""How arguments are written: cells, configurations, counts, durations. Every reader says what is wrong and where.

argparse swallows the message of a ValueError; `spelled` makes it one that is shown.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..records import Cell, SpecConfig, parse_count

if TYPE_CHECKING:
    from ..tune import CellShard

T = TypeVar("T")
UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def spelled(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` as a type for argparse that keeps its message."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def split_cells(text: str) -> tuple[Cell, ...]:
    """`1x1024,8x4k`."""
    return tuple(Cell.parse(part) for part in _parts(text, "cell"))


def split_configs(text: str) -> tuple[SpecConfig, ...]:
    """`off,self:4+60/chain3,model:full/4,2,1`: a piece that is only a number continues the tree before it."""
    joined: list[str] = []
    for part in _parts(text, "configuration"):
        if joined and re.fullmatch(r"-?\d+", part):
            joined[-1] += f",{part}"
        else:
            joined.append(part)
    return tuple(SpecConfig.parse(part) for part in joined)


def split_counts(text: str) -> tuple[int, ...]:
    """`1,4,8` or `512,1k,4k`."""
    return tuple(parse_count(part) for part in _parts(text, "count"))


def split_names(text: str) -> tuple[str, ...]:
    """`ours,transformers/static`."""
    return tuple(_parts(text, "name"))


def seconds(text: str) -> float:
    """`90`, `90s`, `2m`, `0.5h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    value = float(match[1]) * UNITS_S[match[2]] if match else 0.0
    if not value > 0:
        raise ValueError(f"a duration above 0 is written 90s, 2m or 0.5h, got {text!r}")
    return value


def cells_shard(text: str) -> CellShard:
    """`2/8`, the second of eight; `all/8`."""
    from ..tune import CellShard

    return CellShard.parse(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"a number above 0 is needed, got {text!r}")
    return value


def _parts(text: str, what: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{text!r} holds an empty {what}: write them with one comma between each two")
    return parts
