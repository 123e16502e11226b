"""A Picture as SVG text for places where no script runs: a README, a report, an <img> in a saved notebook.

Greys of text and grid have contrast on light and dark pages alike, so one file serves both. Not known here: what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from .panels import COLOURS, DASHES, Curve, Panel, Picture, Points, count_words, log_ticks, wrap
from .svg import GRID, INK, XMLNS, tick_words, ticks

WIDTH, GAP, EDGE = 860, 18, 8
LEFT, RIGHT, PLOT = 40, 22, 168  # of a panel: room for tick words and the reference, and the height of the plot
LINE, BIG_LINE, ABOVE, FOOT = 16, 22, 9, 38
CHARACTER, BOLD_CHARACTER, TITLE_CHARACTER = 7.2, 8.3, 9.4  # pixels at 12, 13 and 15 px in a wide font
MARKER_R, DODGE = 4.2, 5.0
PAD = 0.08  # of the range, kept free at the ends of an axis


def picture_svg(picture: Picture, ink: str = INK) -> str:
    """The whole picture."""
    notes = [line for note in picture.notes for line in wrap(note, (WIDTH - 2 * EDGE) / CHARACTER)]
    title = wrap(picture.title, (WIDTH - 2 * EDGE) / TITLE_CHARACTER)
    body, y = [], EDGE + 14.0
    for line in title:
        body.append(_text(EDGE, y, line, ink, size=15, bold=True))
        y += BIG_LINE
    for line in notes:
        body.append(_text(EDGE, y, line, ink))
        y += LINE
    y += 6
    width = (WIDTH - 2 * EDGE - GAP * (picture.columns - 1)) / picture.columns
    for row in picture.rows:
        head = max(_head_lines(panel, width) for panel in row) * LINE
        for i, panel in enumerate(row):
            body.append(_Plot(panel, EDGE + i * (width + GAP), y, width, head, ink).draw())
        y += head + ABOVE + PLOT + FOOT + GAP
    height = round(y - GAP + EDGE)
    return (
        f'<svg{XMLNS} viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(picture.title)}" font-family="system-ui,sans-serif" font-size="12">'
        f"<title>{escape(picture.title)}</title><desc>{escape(' '.join(picture.notes))}</desc>{''.join(body)}</svg>\n"
    )


def _text(x: float, y: float, words: str, ink: str, anchor: str = "start", *, size: int = 12, bold: bool = False) -> str:
    font = (f' font-size="{size}"' if size != 12 else "") + (' font-weight="600"' if bold else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{ink}"{font}>{escape(words)}</text>'


# The legend of a panel: the same flow decides how many lines it takes and where its entries stand.


@dataclass(frozen=True, slots=True)
class _Entry:
    words: str
    style: int | None  # None: words only
    is_curve: bool = False

    @property
    def width(self) -> float:
        swatch = 0 if self.style is None else 30 if self.is_curve else 14
        return swatch + len(self.words) * CHARACTER + 9


def _entries(panel: Panel) -> list[_Entry]:
    found = [_Entry(panel.legend, None), *(_Entry(series.label, series.style) for series in panel.points)]
    return [*found, *([_Entry("fitted", panel.curves[0].style, is_curve=True)] if panel.curves else [])]


def _flow(panel: Panel, width: float) -> list[tuple[_Entry, float, int]]:
    """(entry, x within the panel, line) of the legend."""
    placed, x, line = [], 0.0, 0
    for entry in _entries(panel):
        if x and x + entry.width > width:
            x, line = 0.0, line + 1
        placed.append((entry, x, line))
        x += entry.width
    return placed


def _head_lines(panel: Panel, width: float) -> int:
    """Lines above the plot: title, legend, name of the y axis."""
    return len(wrap(panel.title, width / BOLD_CHARACTER)) + _flow(panel, width)[-1][2] + 1 + 1


class _Plot:
    """One panel at its place: data coordinates to pixels, axes, series."""

    def __init__(self, panel: Panel, x: float, y: float, width: float, head: float, ink: str) -> None:
        self._panel, self._x, self._y, self._width, self._ink = panel, x, y, width, ink
        self._left, self._right = x + LEFT, x + width - RIGHT
        self._top, self._foot = y + head + ABOVE, y + head + ABOVE + PLOT
        self._x_range = _padded(_log2(panel.x_ticks[0]), _log2(panel.x_ticks[-1]))
        low, high = panel.y_range
        if panel.is_y_log:
            self._y_range = _padded(math.log10(low), math.log10(max(high, low * 1.0001)))
        else:
            self._y_range = (0.0, 1.08 * high or 1.0)

    def px(self, x: float) -> float:
        low, high = self._x_range
        return self._left + (_log2(x) - low) / (high - low) * (self._right - self._left)

    def py(self, y: float) -> float:
        low, high = self._y_range
        value = math.log10(y) if self._panel.is_y_log else y
        return self._foot - (min(max(value, low), high) - low) / (high - low) * (self._foot - self._top)

    def draw(self) -> str:
        panel = self._panel
        shift = [DODGE * (i - (len(panel.points) - 1) / 2) if series.joined else 0.0 for i, series in enumerate(panel.points)]
        parts = [self._head(), self._y_axis(), self._x_axis(), self._reference()]
        parts += [self._curve(curve) for curve in panel.curves]
        parts += [self._series(series, by) for series, by in zip(panel.points, shift, strict=True)]
        return f"<g>{''.join(parts)}</g>"

    def _head(self) -> str:
        panel, y, out = self._panel, self._y + 12, []
        for line in wrap(panel.title, self._width / BOLD_CHARACTER):
            out.append(_text(self._x, y, line, self._ink, size=13, bold=True))
            y += LINE
        for entry, x, row in _flow(panel, self._width):
            out.append(self._entry(entry, self._x + x, y + row * LINE))
        out.append(_text(self._x, self._top - 12, panel.y_label, self._ink))
        return "".join(out)

    def _entry(self, entry: _Entry, x: float, y: float) -> str:
        if entry.style is None:
            return _text(x, y, entry.words, self._ink)
        if entry.is_curve:
            dash = 'stroke-width="1.6" stroke-dasharray="6 4"'
            line = f'<path d="M{x:.1f} {y - 4:.1f}h26" fill="none" stroke="{self._ink}" {dash}/>'
            return line + _text(x + 30, y, entry.words, self._ink)
        return _marker(entry.style, x + 5, y - 4, is_hollow=False) + _text(x + 14, y, entry.words, self._ink)

    def _y_axis(self) -> str:
        low, high = self._y_range
        if self._panel.is_y_log:
            marks = log_ticks(10**low, 10**high)
            words = [f"{mark:g}" for mark in marks]
        else:
            marks = ticks(high)
            words = tick_words(marks)
        out = []
        for mark, word in zip(marks, words, strict=True):
            y = self.py(mark)
            out.append(f'<path d="M{self._left:.1f} {y:.1f}H{self._right:.1f}" stroke="{GRID}"/>')
            out.append(_text(self._left - 5, y + 4, word, self._ink, "end"))
        return "".join(out)

    def _x_axis(self) -> str:
        out = [f'<path d="M{self._left:.1f} {self._foot:.1f}H{self._right:.1f}" stroke="{self._ink}"/>']
        for mark in _uncrowded(self._panel.x_ticks, self.px):
            out.append(f'<path d="M{self.px(mark):.1f} {self._foot:.1f}v4" stroke="{self._ink}"/>')
            out.append(_text(self.px(mark), self._foot + 17, count_words(mark), self._ink, "middle"))
        out.append(_text((self._left + self._right) / 2, self._foot + 33, self._panel.x_label, self._ink, "middle"))
        return "".join(out)

    def _reference(self) -> str:
        if self._panel.reference is None:
            return ""
        value, words = self._panel.reference
        y = self.py(value)
        line = f'<path d="M{self._left:.1f} {y:.1f}H{self._right:.1f}" stroke="{self._ink}" stroke-width="1.5"/>'
        return line + _text(self._right + 4, y + 4, words, self._ink)

    def _curve(self, curve: Curve) -> str:
        way = _path([(self.px(x), self.py(y)) for x, y in zip(curve.x, curve.y, strict=True)])
        colour, dash = COLOURS[curve.style % len(COLOURS)], DASHES[curve.style % len(DASHES)]
        return f'<path d="{way}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/>'

    def _series(self, series: Points, shift: float) -> str:
        colour = COLOURS[series.style % len(COLOURS)]
        at = [(self.px(x) + shift, self.py(y)) for x, y in zip(series.x, series.y, strict=True)]
        out = [f'<path d="{_path(at)}" fill="none" stroke="{colour}" stroke-width="1.4"/>'] if series.joined and at else []
        for (x, y), low, high, is_hollow in zip(at, series.low, series.high, series.hollow, strict=True):
            out.append(f'<path d="M{x:.1f} {self.py(low):.1f}V{self.py(high):.1f}" stroke="{colour}" stroke-width="1.6"/>')
            out.append(_marker(series.style, x, y, is_hollow))
        return "".join([*out, *self._beside(series, at)])

    def _beside(self, series: Points, at: Sequence[tuple[float, float]]) -> list[str]:
        """Words beside markers, series above and below in turn; and an unseen disc per point that says more when pointed at."""
        below = series.style % 2
        away = [17 if below and y + 17 < self._foot else -9 for _, y in at]
        words = [
            _text(x, y + by, word, self._ink, "middle")
            for (x, y), by, word in zip(at, away, series.words, strict=False) if word
        ]  # fmt: skip
        discs = [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill-opacity="0"><title>{escape(text)}</title></circle>'
            for (x, y), text in zip(at, series.hover, strict=False)
        ]
        return words + discs


def _log2(value: float) -> float:
    return math.log2(value)


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = PAD * ((high - low) or 1.0)
    return low - pad, high + pad


def _path(at: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)


def _uncrowded(marks: Sequence[float], px: Callable[[float], float]) -> list[float]:
    """Ticks whose words do not touch, the last one among them."""
    kept: list[float] = []
    for mark in reversed(marks):
        half = len(count_words(mark)) * CHARACTER / 2
        if not kept or px(mark) + half + 4 < px(kept[-1]) - len(count_words(kept[-1])) * CHARACTER / 2:
            kept.append(mark)
    return kept[::-1]


def _marker(style: int, x: float, y: float, is_hollow: bool) -> str:
    """The shapes of `panels.MARKERS`; the page's colour shows through a hollow one."""
    r, kind = MARKER_R, style % len(COLOURS)
    sides = (0, 4, 3, 4, 3, 5)[kind]
    colour = COLOURS[kind]
    paint = f'fill="{"none" if is_hollow else colour}" stroke="{colour}" stroke-width="1.6"'
    if not sides:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {paint}/>'
    turn = (0, 45, -90, 0, 90, -90)[kind]
    size = r * (1.1 if sides > 3 else 1.25)
    corners = [math.radians(turn + 360 * i / sides) for i in range(sides)]
    points = " ".join(f"{x + size * math.cos(a):.1f},{y + size * math.sin(a):.1f}" for a in corners)
    return f'<polygon points="{points}" {paint}/>'
