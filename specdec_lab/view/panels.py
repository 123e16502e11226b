"""Small multiples as plain data, and their plotly figure: panels of measured points with spread and of fitted lines.

Whoever has numbers makes a Picture; `panels_svg` draws the same one without plotly. Series differ in marker and dash besides
hue, hollow markers mark points with a caveat, fitted lines are dashed and named. Not known here: what the numbers mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .palette import COMPUTE, KV

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Contrast of at least 3 on white and on dark pages (a test computes it). Markers and dashes differ as well.
COLOURS = (COMPUTE.colour, KV.colour, "#00876A", "#A34FA0", "#A66A00", "#7F7F7F")
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "pentagon")
DASHES = ("6 4", "2 3", "9 3 2 3", "12 3", "3 2", "6 2 1 2 1 2")
TALLEST = 1.5  # times the highest point: an interval that reaches higher is cut and does not flatten the panel
FITTED = "fitted (dashed)"
TITLE_WIDTH, NOTE_WIDTH = 32, 140  # characters of a line in a figure
NEXT_TICK = 1.2  # ratio of two ticks whose words do not touch


@dataclass(frozen=True, slots=True)
class Points:
    """Measured values with their spread, one series.

    style   index into colours, markers and dashes; a series and its fitted line share it
    hollow  per point: drawn hollow, for the caveat that the notes of the picture name
    joined  whether neighbours are joined by a line
    words   per point: a word beside its marker
    hover   per point: what who points at it reads, lines apart
    """

    label: str
    style: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    hollow: tuple[bool, ...]
    joined: bool = False
    words: tuple[str, ...] = ()
    hover: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """A modelled line of a series; drawn dashed."""

    label: str
    style: int
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot. x is logarithmic to base 2 and ticked at `x_ticks`; y is logarithmic, or linear from 0.

    legend     what the labels of the series are: "batch", "context"
    reference  a value of y with its name, drawn across
    """

    title: str
    x_label: str
    y_label: str
    legend: str
    x_ticks: tuple[float, ...]
    points: tuple[Points, ...]
    curves: tuple[Curve, ...] = ()
    is_y_log: bool = False
    reference: tuple[float, str] | None = None

    @property
    def y_range(self) -> tuple[float, float]:
        """Lowest and highest of what is drawn, reference included; intervals that blew up do not stretch it."""
        values = [value for series in self.points for value in (*series.y, *series.low)]
        values += [value for curve in self.curves for value in curve.y]
        values += [self.reference[0]] if self.reference else []
        if not values:
            return 0.0, 1.0
        top = max(values)
        highs = [high for series in self.points for high in series.high]
        return min(values), max([top, *(high for high in highs if high <= TALLEST * top)])


@dataclass(frozen=True, slots=True)
class Picture:
    """Panels in rows of `columns`, under a title that says what is measured and what modelled, and notes."""

    name: str
    title: str
    notes: tuple[str, ...]
    panels: tuple[Panel, ...]
    columns: int

    @property
    def rows(self) -> tuple[tuple[Panel, ...], ...]:
        """The panels row by row."""
        return tuple(self.panels[i : i + self.columns] for i in range(0, len(self.panels), self.columns))


def count_words(value: float) -> str:
    """`1,024` or `0.5`."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,g}"


def wrap(text: str, characters: float) -> list[str]:
    """Lines of at most about this many characters, broken at blanks."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > characters:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines


def picture_figure(picture: Picture, *, dark: bool = False) -> go.Figure:
    """The picture as one plotly figure."""
    from plotly.subplots import make_subplots

    num_rows = len(picture.rows)
    titles = ["<br>".join(wrap(panel.title, TITLE_WIDTH)) for panel in picture.panels]
    figure = make_subplots(
        num_rows, picture.columns, subplot_titles=titles, vertical_spacing=0.36 / num_rows, horizontal_spacing=0.09
    )
    shown: set[str] = set()
    for number, panel in enumerate(picture.panels):
        place = {"row": number // picture.columns + 1, "col": number % picture.columns + 1}
        for series in panel.points:
            _add_points(figure, panel, series, place, shown)
        for curve in panel.curves:
            _add_curve(figure, panel, curve, place, shown)
        _axes(figure, panel, place)
    notes = [line for note in picture.notes for line in wrap(note, NOTE_WIDTH)]
    words = "".join(f"<br><sup>{note}</sup>" for note in notes)
    return figure.update_layout(
        template="plotly_dark" if dark else "plotly_white",
        title={"text": picture.title + words, "y": 1, "yanchor": "top", "yref": "container", "pad": {"t": 18}},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"size": 13}, height=240 + 310 * num_rows,
        margin={"l": 60, "r": 20, "t": 90 + 22 * len(notes), "b": 60},
        legend={"orientation": "h", "y": -0.24 / num_rows, "yanchor": "top"},
    )  # fmt: skip


def _axes(figure: go.Figure, panel: Panel, place: dict[str, int]) -> None:
    if panel.reference is not None:
        figure.add_hline(panel.reference[0], line_dash="dot", line_width=1, **place, **_named(panel.reference[1]))
    marks = [x for x, after in zip(panel.x_ticks, (*panel.x_ticks[1:], math.inf), strict=True) if after > NEXT_TICK * x]
    figure.update_xaxes(
        type="log", tickvals=marks, ticktext=list(map(count_words, marks)), tickangle=0, title=panel.x_label, **place
    )
    low, high = panel.y_range
    scale: dict[str, Any] = {"range": [0, 1.08 * high]}
    if panel.is_y_log:
        values = log_ticks(low / 1.2, 1.2 * high)
        scale = {"type": "log", "tickvals": values, "ticktext": [f"{value:g}" for value in values]}
    figure.update_yaxes(title=panel.y_label, **scale, **place)


def _named(words: str) -> dict[str, str]:
    return {"annotation_text": words, "annotation_position": "bottom right"}


def _add_points(figure: go.Figure, panel: Panel, series: Points, place: dict[str, int], shown: set[str]) -> None:
    name = f"{panel.legend} {series.label}"
    colour = COLOURS[series.style % len(COLOURS)]
    symbol = MARKERS[series.style % len(MARKERS)]
    hover = [text.replace("\n", "<br>") for text in series.hover]
    figure.add_scatter(
        x=series.x, y=series.y, name=name, legendgroup=name, showlegend=name not in shown,
        mode=("lines+markers" if series.joined else "markers") + ("+text" if any(series.words) else ""),
        text=series.words or None, textposition=["top center", "bottom center"][series.style % 2], hovertext=hover or None,
        error_y={
            "type": "data", "array": [h - y for h, y in zip(series.high, series.y, strict=True)],
            "arrayminus": [y - low for low, y in zip(series.low, series.y, strict=True)], "thickness": 1.5, "width": 3,
        },
        marker={"color": colour, "size": 8, "symbol": [f"{symbol}-open" if h else symbol for h in series.hollow]},
        line={"color": colour, "width": 1.5}, hovertemplate="%{hovertext}" if hover else "%{y:.4g}",
        **place,
    )  # fmt: skip
    shown.add(name)


def _add_curve(figure: go.Figure, panel: Panel, curve: Curve, place: dict[str, int], shown: set[str]) -> None:
    """Shown and hidden with its series; one entry of the legend says what dashes mean."""
    line = {"color": COLOURS[curve.style % len(COLOURS)], "width": 1.5, "dash": "dash"}
    figure.add_scatter(
        x=curve.x, y=curve.y, name=FITTED, legendgroup=f"{panel.legend} {curve.label}", showlegend=FITTED not in shown,
        mode="lines", line=line, hovertemplate="%{y:.4g} fitted", **place,
    )  # fmt: skip
    shown.add(FITTED)


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Values 1, 2 and 5 times powers of ten within the range; thinned to powers of ten where they would crowd."""
    found: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        values = (m * 10.0**e for e in range(-12, 13) for m in steps)
        found = [v for v in values if low / (1 + 1e-9) <= v <= high * (1 + 1e-9)]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]

