"""The deliverable as a picture: which configuration wins in which cell, by how much, and how sure that is.

Reads the rows of a policy as plain data; it does not know the policy room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records import Cell
from .figures import dress, titled

if TYPE_CHECKING:
    import plotly.graph_objects as go


MODELLED = "modelled"
MEASURED_TITLE = "Speed-up over plain decoding, measured"
MEASURED_NOTE = "italic = the interval includes 1x; empty = not tuned"


@dataclass(frozen=True, slots=True)
class HeatCell:
    """What a policy says about one cell; `speedup` is None where nothing was measured."""

    cell: Cell
    state: str  # "tuned", "composed", "infeasible", "not_visited", "modelled"
    config: str | None = None
    speedup: float | None = None
    ci: tuple[float, float] | None = None
    reason: str = ""

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> HeatCell:
        """Read a row of a policy's table."""
        ci = row.get("speedup_ci95")
        return cls(
            Cell.parse(row["cell"]),
            row["state"],
            row.get("config"),
            row.get("speedup"),
            None if ci is None else (ci[0], ci[1]),
            row.get("reason", ""),
        )

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 1x out. What is modelled has none."""
        return self.state == MODELLED or self.ci is not None and (self.ci[0] > 1 or self.ci[1] < 1)

    @property
    def text(self) -> str:
        """`1.80x self:4+60/chain4`, or why there is no number."""
        if self.speedup is None:
            return {"infeasible": "does not fit", "not_visited": ""}.get(self.state, self.state)
        return f"{self.speedup:.2f}x {self.config}{self.caveat}"

    @property
    def caveat(self) -> str:
        """What a reader must know of a number that was not measured in this cell; a title says so of a whole picture."""
        return "" if self.state in ("tuned", MODELLED) else f" ({self.state})"


@dataclass(frozen=True, slots=True)
class HeatmapData:
    """Cells by batch (rows) and length (columns); None where the table says nothing."""

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    cells: tuple[tuple[HeatCell | None, ...], ...]
    labels: tuple[str, ...] = ()  # of the policy

    @property
    def log2(self) -> tuple[tuple[float | None, ...], ...]:
        """log2 of the speed-up: 0 is plain decoding, +1 twice as fast."""
        return tuple(tuple(math.log2(c.speedup) if c and c.speedup else None for c in row) for row in self.cells)


def speedup_heatmap(table: Iterable[HeatCell | Mapping[str, Any]], labels: Iterable[str] = ()) -> HeatmapData:
    """Rows of a policy's table, arranged; labels: those of its header."""
    cells = [row if isinstance(row, HeatCell) else HeatCell.from_dict(row) for row in table]
    batches = tuple(sorted({c.cell.batch for c in cells}))
    lengths = tuple(sorted({c.cell.length for c in cells}))
    found = {(c.cell.batch, c.cell.length): c for c in cells}
    return HeatmapData(batches, lengths, tuple(tuple(found.get((b, n)) for n in lengths) for b in batches), tuple(labels))


def heatmap_figure(
    data: HeatmapData, *, dark: bool = False, title: str = MEASURED_TITLE, note: str = MEASURED_NOTE
) -> go.Figure:
    """Blue is faster than plain decoding, red slower; italic where the interval includes 1x."""
    import plotly.graph_objects as go

    reach = max((abs(z) for row in data.log2 for z in row if z is not None), default=1.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=data.log2,
            zmid=0,
            zmin=-reach,
            zmax=reach,
            colorscale="RdBu",
            xgap=2,
            ygap=2,
            hoverongaps=False,
            text=[[_hover(c) for c in row] for row in data.cells],
            hovertemplate="%{text}<extra></extra>",
            colorbar={"title": "log2 speed-up"},
        )
    )
    for y, row in enumerate(data.cells):
        for x, cell in enumerate(row):
            figure.add_annotation(x=x, y=y, text=_cell_text(cell), showarrow=False, font=_font(cell, reach))
    # Positions, not numbers: a category named "1024" would be taken for the coordinate 1024.
    figure.update_xaxes(tickvals=list(range(len(data.lengths))), ticktext=[f"{n:,}" for n in data.lengths], showgrid=False)
    figure.update_yaxes(tickvals=list(range(len(data.batches))), ticktext=[str(b) for b in data.batches], showgrid=False)
    words = f"{titled(title, data.labels)}<br><sup>{note}</sup>"
    figure = dress(figure, words, "context tokens", "batch", dark)
    return figure.update_layout(hovermode="closest")


def _font(cell: HeatCell | None, reach: float) -> dict[str, Any]:
    """White on the dark ends of the scale, near-black in its light middle; the page's own colour outside of it."""
    if cell is None or cell.speedup is None:
        return {}
    return {"color": "#FFFFFF" if abs(math.log2(cell.speedup)) > 0.6 * reach else "#1A1A1A"}


def _cell_text(cell: HeatCell | None) -> str:
    if cell is None:
        return ""
    if cell.speedup is None:
        return cell.text
    text = f"<b>{cell.speedup:.2f}x</b>{cell.caveat}<br>{cell.config}"
    return text if cell.is_sure else f"<i>{text}</i>"


def _hover(cell: HeatCell | None) -> str:
    if cell is None:
        return ""
    interval = f" ({cell.ci[0]:.2f} to {cell.ci[1]:.2f})" if cell.ci else ""
    return f"{cell.cell}: {cell.text}{interval} {cell.reason}".strip()
