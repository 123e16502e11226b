"""How large a tree pays where: nodes and levels against length, a line per batch, and the marginal rule of every point.

Reads the rows of a policy as plain data; it does not know the policy room. Nodes and levels count the root, as papers do, so
plain decoding is 1 node and 1 level and a chain has as many levels as nodes. `panels` and `panels_svg` draw the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..records import Cell, SpecConfig
from .panels import COLOURS, Panel, Picture, Points

LONGEST = 60  # characters of a configuration in a picture
TITLE = "Tree size against context: what was confirmed to be fastest"
NOTES = (
    "Root counted: plain decoding (off) is 1 node and 1 level, a chain has as many levels as nodes; points without a "
    "word are trees that branch. Filled: confirmed by measurement. Hollow: composed from measured parts, not confirmed.",
    "A node pays if its chance to be on the accepted path exceeds the tokens that its time is worth at the pace of the whole.",
)


@dataclass(frozen=True, slots=True)
class TreeSize:
    """The answer of one cell. `how`: measured, or composed from parts where nothing was confirmed; `rule`: why in numbers."""

    cell: Cell
    config: str
    how: str
    speedup: float
    rule: str

    @property
    def kind(self) -> str:
        """off, chain or tree."""
        config = SpecConfig.parse(self.config)
        return "off" if config.is_off else "chain" if config.is_chain else "tree"

    @property
    def nodes(self) -> int:
        """Root counted."""
        return SpecConfig.parse(self.config).num_nodes + 1

    @property
    def levels(self) -> int:
        """Root's counted."""
        return SpecConfig.parse(self.config).depth + 1

    @property
    def words(self) -> str:
        """All of it, for who points at it."""
        head = f"{self.cell}: {self.kind}, {self.nodes} nodes, {self.levels} levels, {self.speedup:.2f}x ({self.how})"
        spelled = self.config if len(self.config) <= LONGEST else f"{self.config[:LONGEST]}..."
        return "\n".join(filter(None, (head, spelled, self.rule)))


def tree_sizes(table: Iterable[Mapping[str, Any]]) -> tuple[TreeSize, ...]:
    """Rows of a policy's table that answer: confirmed ones, and those whose parts promise something."""
    found = []
    for row in table:
        composed = row.get("composed")
        if "config" in row:
            config, how, speedup = row["config"], "measured" if row["state"] == "tuned" else row["state"], row["speedup"]
        elif composed is not None:
            config, how, speedup = composed["config"], "composed", composed["speedup"]
        else:
            continue
        found.append(TreeSize(Cell.parse(row["cell"]), config, how, speedup, _rule(config, row.get("why", ""), composed)))
    return tuple(sorted(found, key=lambda size: size.cell))


def _rule(config: str, why: str, composed: Mapping[str, Any] | None) -> str:
    """The marginal rule of the composed tree where that is the answer; else what was composed and lost."""
    if composed is None:
        return why
    if composed["config"] != config:
        return why
    words = [_node(name, composed.get(key)) for name, key in (("last node kept", "kept"), ("first left out", "left_out"))]
    return "\n".join(filter(None, (*words, why)))


def _node(name: str, margin: Mapping[str, float] | None) -> str:
    if margin is None:
        return ""
    chance, worth = margin["chance"], max(margin["worth"], 0.0)  # larger forwards that were timed shorter: noise, or a cliff
    return f"{name}: accepted with chance {chance:.4f} {'>' if chance > worth else '<'} {worth:.4f} tokens, its time's worth"


def sizes_picture(sizes: Iterable[TreeSize], where: str = "") -> Picture:
    """Two panels, nodes and levels, with the winning kind at every point of the first."""
    sizes = tuple(sizes)
    lengths = tuple(float(n) for n in sorted({size.cell.length for size in sizes})) or (1.0,)
    batches = sorted({size.cell.batch for size in sizes})
    lines = [tuple(size for size in sizes if size.cell.batch == batch) for batch in batches]
    panels = (
        Panel("Nodes", "context tokens", "nodes", "batch", lengths,
              tuple(_line(line, i, is_nodes=True) for i, line in enumerate(lines)), is_y_log=True),
        Panel("Levels", "context tokens", "levels", "batch", lengths,
              tuple(_line(line, i, is_nodes=False) for i, line in enumerate(lines))),
    )  # fmt: skip
    return Picture("tree_sizes", f"{TITLE}{': ' if where else ''}{where}", NOTES, panels, 2)


def _line(line: tuple[TreeSize, ...], style: int, *, is_nodes: bool) -> Points:
    y = tuple(float(size.nodes if is_nodes else size.levels) for size in line)
    return Points(
        str(line[0].cell.batch), style % len(COLOURS), tuple(float(size.cell.length) for size in line), y, y, y,
        tuple(size.how != "measured" for size in line), joined=True,
        words=tuple("" if size.kind == "tree" else size.kind for size in line), hover=tuple(size.words for size in line),
    )  # fmt: skip


def sizes_table(sizes: Iterable[TreeSize]) -> list[tuple[str, ...]]:
    """Head and rows as texts."""
    head = ("cell", "kind", "nodes", "levels", "speed-up", "how", "why")
    return [head, *(_texts(size) for size in sizes)]


def _texts(size: TreeSize) -> tuple[str, ...]:
    why = "; ".join(size.rule.splitlines())
    return str(size.cell), size.kind, str(size.nodes), str(size.levels), f"{size.speedup:.2f}x", size.how, why
