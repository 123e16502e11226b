"""The data of `figures` as SVG text, for places where no script may run: the report and the picture in a saved notebook.

Colours of text and grid are greys with contrast on light and dark pages alike, so that a picture needs no theme.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from .figures import AcceptanceData, StripData
from .palette import AMBER_OUTLINE, COMPUTE, DRAFT, FAMILIES, KV

INK, GRID = (
    "#767676",
    "#8A8A8A55",
)  # readable on light and dark pages; `ink="currentColor"` follows an inline picture's page
XMLNS = ' xmlns="http://www.w3.org/2000/svg"'
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 28, 34
HATCH = (
    '<defs><pattern id="kv" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<rect width="6" height="6" fill="{KV.colour}" fill-opacity="0.35"/><rect width="3" height="6" fill="{KV.colour}"/>'
    "</pattern></defs>"
)


def ticks(top: float, about: int = 4) -> list[float]:
    """Round values from 0 up to `top`, roughly `about` of them."""
    if top <= 0:
        return [0.0]
    raw = top / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= 0.8 * raw)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def tick_words(values: Sequence[float]) -> list[str]:
    """The values with one number of digits for the whole axis."""
    digits = next(d for d in range(10) if d == 9 or all(abs(v * 10**d - round(v * 10**d)) < 1e-6 for v in values))
    return [f"{value:,.{digits}f}" for value in values]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def data_uri(svg: str) -> str:
    """The picture for the src of an <img>."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


class _Frame:
    """A plotting area: data coordinates to pixels, axes and their labels."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y_top: float, ink: str) -> None:
        self.width, self.height = size
        self.x, self.y_top, self.ink = x, y_top or 1.0, ink
        self.inner_width = self.width - LEFT - RIGHT
        self.inner_height = self.height - TOP - BOTTOM

    def px(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / ((high - low) or 1) * self.inner_width

    def py(self, y: float) -> float:
        return TOP + (1 - min(y, self.y_top) / self.y_top) * self.inner_height

    def text(self, x: float, y: float, words: str, anchor: str = "start", *, bold: bool = False) -> str:
        weight = ' font-weight="600"' if bold else ""
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{self.ink}"{weight}>{escape(words)}</text>'

    def y_axis(self, labels: dict[float, str]) -> str:
        out = []
        for value, label in labels.items():
            y = self.py(value)
            out.append(f'<path d="M{LEFT} {y:.1f}H{self.width - RIGHT}" stroke="{GRID}"/>')
            out.append(self.text(LEFT - 6, y + 4, label, "end"))
        return "".join(out)

    def close(self, title: str, body: str, x_label: str) -> str:
        words = self.text(LEFT, 16, title, bold=True) + self.text(
            LEFT + self.inner_width / 2, self.height - 4, x_label, "middle"
        )
        return (
            f'<svg{XMLNS} viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label="{escape(title)}" '
            f'font-family="system-ui,sans-serif" font-size="12">{HATCH}{body}{words}</svg>'
        )


def strip_svg(data: StripData, size: tuple[int, int] = (760, 220), ink: str = INK) -> str:
    """The stacked step strip: KV floor at the bottom, hatched because it is modelled."""
    total = data.total_ms
    title = f"ms per round (hatched: modelled) · {data.title}"
    if not total:
        return _Frame(size, (0, 1), 1, ink).close(f"{title}: no round yet", "", "")
    top = percentile(total, 0.97) * 1.15
    frame = _Frame(size, (data.step[0], data.step[-1] + data.count[-1]), top, ink)
    layers, base = [], [0.0] * len(total)
    for family in FAMILIES:
        if not any(data.stack[family.key]):
            continue
        upper = [a + b for a, b in zip(base, data.stack[family.key], strict=True)]
        fill = "url(#kv)" if family.modelled else family.colour
        layers.append(f'<path d="{_area(frame, data, base, upper)}" fill="{fill}"/>')
        base = upper
    marks = ticks(top)
    axis = frame.y_axis(dict(zip(marks, tick_words(marks), strict=True)))
    blocks = "".join(_separator(frame, step) for step, _ in data.starts[1:])
    spikes = "".join(_spike(frame, x + n / 2) for x, n, y in zip(data.step, data.count, total, strict=True) if y > top)
    return frame.close(title, axis + "".join(layers) + blocks + spikes + _x_axis(frame), "round")


def _area(frame: _Frame, data: StripData, lower: Sequence[float], upper: Sequence[float]) -> str:
    """A stepped area between two curves."""
    spans = [(frame.px(x), frame.px(x + n)) for x, n in zip(data.step, data.count, strict=True)]
    up = [
        f"{'L' if i else 'M'}{a:.1f} {frame.py(y):.1f}H{b:.1f}" for i, ((a, b), y) in enumerate(zip(spans, upper, strict=True))
    ]
    down = [f"L{b:.1f} {frame.py(y):.1f}H{a:.1f}" for (a, b), y in zip(spans[::-1], lower[::-1], strict=True)]
    return "".join((*up, *down, "Z"))


def _separator(frame: _Frame, step: int) -> str:
    return f'<path d="M{frame.px(step):.1f} {TOP}v{frame.inner_height}" stroke="{frame.ink}" stroke-dasharray="2 3"/>'


def _spike(frame: _Frame, x: float) -> str:
    """A triangle where a round is higher than the picture."""
    return f'<path d="M{frame.px(x):.1f} {TOP - 5}l4 6h-8z" fill="{frame.ink}"/>'


def _x_axis(frame: _Frame) -> str:
    low, high = frame.x
    marks = [low + t for t in ticks(high - low, 6) if t == int(t)]
    return "".join(frame.text(frame.px(x), frame.height - BOTTOM + 14, f"{x:,.0f}", "middle") for x in marks)


def acceptance_svg(data: AcceptanceData, size: tuple[int, int] = (340, 220), ink: str = INK) -> str:
    """Bars per draft position with Wilson intervals, and the geometric curve of the fitted alpha as rings."""
    alpha = "" if data.alpha is None else f"; rings: {data.alpha:.2f} each"
    frame = _Frame(size, (0.5, max(len(data.rate), 1) + 0.5), 1.0, ink)
    axis = frame.y_axis({share / 4: f"{share * 25}%" for share in range(5)})
    title = f"acceptance per position{f' · {data.forced}' if data.forced else ''}"
    if not data.rate:
        return frame.close(title, axis, "plain decoding drafts nothing")
    bars = "".join(_bar(frame, data, i) for i in range(len(data.rate)))
    rings = "".join(_ring(frame, i + 1, y) for i, y in enumerate(data.curve))
    return frame.close(
        title + alpha, axis + bars + rings, f"draft position, of {data.num_drafts[0]:,} drafts"
    )


def _ring(frame: _Frame, x: float, y: float) -> str:
    ring = f'<circle cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="4" fill="none" stroke="{{}}" stroke-width="{{}}"/>'
    return ring.format(AMBER_OUTLINE, 3) + ring.format(DRAFT.colour, 1.5)


def _bar(frame: _Frame, data: AcceptanceData, i: int) -> str:
    x, half = frame.px(i + 1), min(28.0, 0.36 * (frame.px(1) - frame.px(0)))
    top, foot = frame.py(data.rate[i]), frame.py(0)
    low, high = frame.py(data.low[i]), frame.py(data.high[i])
    size = f'width="{2 * half:.1f}" height="{foot - top:.1f}"'
    whisker = f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
    label = f'<text x="{x:.1f}" y="{foot - 6:.1f}" text-anchor="middle" fill="#FFFFFF">{data.rate[i]:.0%}</text>'
    return (
        f'<rect x="{x - half:.1f}" y="{top:.1f}" {size} fill="{COMPUTE.colour}"/>'
        f'<path d="{whisker}" stroke="{frame.ink}" stroke-width="1.5"/>'
        + (label if half > 14 and foot - top > 18 else "")
        + frame.text(x, frame.height - BOTTOM + 14, str(i + 1), "middle")
    )
