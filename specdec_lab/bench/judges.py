"""What makes measured blocks unfit to be quoted: other tokens than plain decoding, a disturbed machine, text that loops.

Pure functions of tokens and times. Not known here: engines and sessions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..records import Cell, SpecConfig

OFF = SpecConfig.off()
GRAM = 8  # tokens of a run whose repetition is counted
DISTURBED = 1.5  # times as long as the same rounds of the same configuration took in its fastest block


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first place where a configuration left the tokens of plain decoding. `place` counts new tokens from 0."""

    cell: Cell
    config: str
    row: int
    place: int
    got: int
    expected: int

    def __str__(self) -> str:
        return (
            f"{self.cell} {self.config}: row {self.row} emits token {self.got} at new token {self.place}, plain decoding "
            f"{self.expected}; its speed means nothing"
        )


class TokenGate:
    """Compares the tokens of every configuration of a cell with those of plain decoding, as far as both went."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._longest: dict[str, list[list[int]]] = {}

    def take(self, config: SpecConfig, rows: list[list[int]]) -> None:
        """Remember a run; the longer one of equal configurations is kept, row by row."""
        known = self._longest.setdefault(str(config), [[] for _ in rows])
        self._longest[str(config)] = [max(pair, key=len) for pair in zip(known, rows, strict=True)]

    @property
    def plain(self) -> list[list[int]]:
        """The longest rows of plain decoding."""
        return self._longest.get(str(OFF), [])

    def find(self, config: SpecConfig) -> Mismatch | None:
        """Where this configuration and plain decoding differ; None if nowhere in what both emitted."""
        ours = self._longest.get(str(config), [])
        for row, (mine, right) in enumerate(zip(ours, self.plain, strict=False)):
            for place, (got, expected) in enumerate(zip(mine, right, strict=False)):
                if got != expected:
                    return Mismatch(self._cell, str(config), row, place, got, expected)
        return None


class BlockTimes:
    """Round times per configuration and block. Blocks repeat the same rounds, so a block that takes much longer than
    another of the same configuration was disturbed by something outside of the engine.
    """

    def __init__(self) -> None:
        self._walls: dict[str, dict[int, list[float]]] = {}

    def add(self, config: SpecConfig | str, block: int, walls: Sequence[float]) -> None:
        """Take the wall seconds of the rounds of one run; `config` is whatever was run, by its name."""
        self._walls.setdefault(str(config), {})[block] = list(walls)

    def slowdowns(self) -> dict[int, float]:
        """Per block, how much longer its rounds took than in the fastest block; the worst of all configurations."""
        worst: dict[int, float] = {}
        for blocks in self._walls.values():
            for block, slowdown in _slowdowns(blocks).items():
                worst[block] = max(worst.get(block, 1.0), slowdown)
        return worst

    def disturbed(self) -> frozenset[int]:
        """Blocks that no number should rest on."""
        return frozenset(block for block, slowdown in self.slowdowns().items() if slowdown > DISTURBED)


def _slowdowns(blocks: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Against the block that got furthest, over the rounds that both ran."""
    furthest = max(blocks.values(), key=lambda walls: (len(walls), -sum(walls)))
    ratios = {}
    for block, walls in blocks.items():
        rounds = min(len(walls), len(furthest))
        if rounds:
            ratios[block] = sum(walls[:rounds]) / sum(furthest[:rounds])
    return ratios


def repeated_share(rows: Sequence[Sequence[int]], gram: int = GRAM) -> float:
    """How many of the runs of `gram` tokens occurred before in their row, as a share: greedy text of small models loops."""
    grams = [[tuple(row[i : i + gram]) for i in range(len(row) - gram + 1)] for row in rows]
    total = sum(map(len, grams))
    return 1 - sum(len(set(found)) for found in grams) / total if total else 0.0
