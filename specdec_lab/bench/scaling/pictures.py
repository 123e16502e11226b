"""The two pictures of a scaling measurement as plain data: time per token against the fitted line, and MagicDec's own picture.

Not known here: how a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ...records import Cell, SpecConfig, Spread
from ...view.panels import Curve, Panel, Picture, Points
from .analysis import Analysis, PlainRow, SpecRow, fitted_speedup, omega_at, plain_fitted_s
from .lines import cost_model
from .samples import IN_CACHE, Point, Scaling

T = TypeVar("T")
CURVE_POINTS = 25
MAX_SERIES = 6  # as many as there are markers
HOLLOW = "Hollow: the KV of the cell fits in the processor's cache."


def pictures(analysis: Analysis) -> tuple[Picture, Picture]:
    """Both, for figures, SVG files and tests."""
    return time_picture(analysis), magicdec_picture(analysis)


# Time per token.


def time_picture(analysis: Analysis) -> Picture:
    """Three panels: plain decoding against context, and against batch; a verify forward against the tokens that it verifies."""
    scaling = analysis.scaling
    batches = _few(sorted({row.point.cell.batch for row in analysis.plain}))
    lengths = _few(sorted({row.point.cell.length for row in analysis.plain}))
    panels = (
        Panel(
            "Plain decoding against context", "context tokens", "ms per token of each sequence", "batch",
            tuple(map(float, lengths)),
            tuple(_plain_series([row for row in analysis.plain if row.point.cell.batch == b], _length, str(b), i)
                  for i, b in enumerate(batches)),
            _plain_curves(scaling, analysis, [[Cell(b, n) for n in _between(lengths)] for b in batches], _length),
            is_y_log=True,
        ),
        Panel(
            "Plain decoding against batch", "batch", "ms per token of each sequence", "context", tuple(map(float, batches)),
            tuple(_plain_series([row for row in analysis.plain if row.point.cell.length == n], _batch, f"{n:,}", i)
                  for i, n in enumerate(lengths)),
            _plain_curves(scaling, analysis, [[Cell(b, n) for b in _between(batches)] for n in lengths], _batch),
            is_y_log=True,
        ),
        _verify_panel(analysis),
    )  # fmt: skip
    notes = (
        "Markers: measured median, bar from the 5th to the 95th percentile of the rounds. " + _hollow(scaling)
        + "Dashed: fitted to all cells together, " + _fit_words(analysis),
        scaling.made_with,
    )
    title = f"Time per token, measured (markers), and the fitted cost line (dashed): {scaling.where}"
    return Picture("time_per_token", title, notes, panels, 3)


def _fit_words(analysis: Analysis) -> str:
    target = analysis.fits.target
    if target is None:
        return "no line: " + analysis.fits.why_not.get("target", "")
    error = "" if target.left_out is None else f"; largest leave-one-out error {target.left_out:.0%}"
    return f"T = a + b x batch x verified tokens + c x KV bytes (plain steps: with fitted overhead){error}."


def _hollow(scaling: Scaling) -> str:
    return f"{HOLLOW} " if any(IN_CACHE in p.labels for p in scaling.points) else ""


def _length(cell: Cell) -> int:
    return cell.length


def _batch(cell: Cell) -> int:
    return cell.batch


def _plain_series(rows: Iterable[PlainRow], x: Callable[[Cell], int], label: str, style: int) -> Points:
    found = sorted(rows, key=lambda row: row.point.cell)
    return _timed(label, style, [(float(x(row.point.cell)), row.point.step_s, row.point) for row in found])


def _timed(label: str, style: int, measured: Iterable[tuple[float, Spread, Point]]) -> Points:
    found = list(measured)
    return Points(
        label, style, tuple(x for x, _, _ in found), tuple(s.median * 1e3 for _, s, _ in found),
        tuple(s.p05 * 1e3 for _, s, _ in found), tuple(s.p95 * 1e3 for _, s, _ in found),
        tuple(IN_CACHE in point.labels for _, _, point in found),
    )  # fmt: skip


def _plain_curves(
    scaling: Scaling, analysis: Analysis, lines: Sequence[Sequence[Cell]], x: Callable[[Cell], int]
) -> tuple[Curve, ...]:
    curves = []
    for style, cells in enumerate(lines):
        times = [plain_fitted_s(scaling, analysis.fits, cell) for cell in cells]
        ms = tuple(t * 1e3 for t in times if t is not None)
        if ms:
            label = str(cells[0].batch) if len({c.batch for c in cells}) == 1 else f"{cells[0].length:,}"
            curves.append(Curve(label, style, tuple(float(x(cell)) for cell in cells), ms))
    return tuple(curves)


def _verify_panel(analysis: Analysis) -> Panel:
    """In the cells in which several widths were measured: those with probes, or else all that have more than one."""
    scaling = analysis.scaling
    widths: dict[Cell, dict[int, tuple[Spread, Point]]] = {}
    for point in scaling.points:
        for time in point.verify:
            known = widths.setdefault(point.cell, {}).get(time.query_tokens)
            if known is None or known[0].count < time.seconds.count:  # of two configurations, the one with more rounds
                widths[point.cell][time.query_tokens] = (time.seconds, point)
    most = max(map(len, widths.values()))
    cells = _few(sorted((c for c in widths if len(widths[c]) == most), key=lambda c: (c.batch * c.length, c.batch)), 3)
    series = tuple(
        _timed(str(cell), i, [(float(q), *widths[cell][q]) for q in sorted(widths[cell])]) for i, cell in enumerate(cells)
    )
    ticks = sorted({q for cell in cells for q in widths[cell]})
    return Panel(
        "One forward of the target against verified tokens", "verified tokens of each sequence", "ms per forward", "cell",
        tuple(map(float, ticks)), series, _verify_curves(analysis, cells, ticks), is_y_log=True,
    )


def _verify_curves(analysis: Analysis, cells: Sequence[Cell], ticks: Sequence[int]) -> tuple[Curve, ...]:
    target, kv = analysis.fits.target, analysis.scaling.target.kv_bytes_per_token
    if target is None:
        return ()
    widths = _between(ticks)
    return tuple(
        Curve(
            str(cell), style, tuple(map(float, widths)),
            tuple(1e3 * target.seconds(cell.batch, q, cell.batch * (cell.length + q) * kv) for q in widths),
        )
        for style, cell in enumerate(cells)
    )


def _between(values: Sequence[int]) -> list[int]:
    """Whole numbers from the first to the last, evenly in their logarithm."""
    low, high = min(values), max(values)
    steps = range(CURVE_POINTS)
    return sorted({round(low * (high / low) ** (i / (CURVE_POINTS - 1))) for i in steps} | set(values))


def _few(values: Sequence[T], most: int = MAX_SERIES) -> list[T]:
    """At most this many, first and last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


# MagicDec's picture.


def magicdec_picture(analysis: Analysis) -> Picture:
    """Per configuration T_D/T_T, T_V/T_T and the speed-up against batch, one series per context length."""
    scaling = analysis.scaling
    panels = [panel for config in scaling.configs for panel in _magicdec_row(analysis, config)]
    fitted = "Dashed: the identity with fitted times and the measured acceptance (modelled)." if analysis.fits.target else ""
    notes = (
        "As MagicDec draws it (arXiv 2408.11049). T_T: a step of plain decoding; T_D: one drafted token; T_V: the verify "
        "forward; medians. Speed-up: tokens per second over plain decoding in the same blocks, real acceptance, bar = 95% "
        "interval over blocks, cut where it leaves the panel. "
        + _hollow(scaling) + fitted,
        scaling.made_with,
    )
    title = f"Drafting, verifying and speed-up in plain steps: measured (markers), modelled (dashed): {scaling.where}"
    return Picture("magicdec", title, notes, tuple(panels), 3)


def _magicdec_row(analysis: Analysis, config: str) -> tuple[Panel, ...]:
    rows = [row for row in analysis.rows if row.point.config == config]
    lengths = _few(sorted({row.point.cell.length for row in rows}))
    batches = sorted({row.point.cell.batch for row in rows})
    ticks = tuple(map(float, batches))

    def series(value: Callable[[SpecRow], tuple[float, float, float] | None]) -> tuple[Points, ...]:
        return tuple(_against_batch(rows, n, i, value) for i, n in enumerate(lengths))

    name = f"{config}: "
    even = (1.0, "1x")
    return (
        Panel(f"{name}T_D / T_T", "batch", "plain steps per drafted token", "context", ticks,
              series(lambda row: _exactly(row.draft_ratio))),
        Panel(f"{name}T_V / T_T", "batch", "plain steps per verify forward", "context", ticks,
              series(lambda row: _exactly(row.verify_ratio)), reference=even),
        Panel(f"{name}speed-up", "batch", "times plain decoding", "context", ticks, series(_interval),
              _speedup_curves(analysis, config, lengths, batches), reference=even),
    )  # fmt: skip


def _exactly(value: float) -> tuple[float, float, float]:
    return value, value, value


def _interval(row: SpecRow) -> tuple[float, float, float] | None:
    ratio = row.speedup
    if ratio is None:
        return None
    return (ratio.mean, ratio.low, ratio.high) if ratio.num_blocks > 1 else _exactly(ratio.mean)


def _against_batch(
    rows: Sequence[SpecRow], length: int, style: int, value: Callable[[SpecRow], tuple[float, float, float] | None]
) -> Points:
    chosen = sorted((row for row in rows if row.point.cell.length == length), key=lambda row: row.point.cell.batch)
    found = [(row, values) for row in chosen if (values := value(row)) is not None]
    y, low, high = (tuple(values[i] for _, values in found) for i in range(3))
    return Points(
        f"{length:,}", style, tuple(float(row.point.cell.batch) for row, _ in found), y, low, high,
        tuple(IN_CACHE in row.point.labels for row, _ in found), joined=True,
    )


def _speedup_curves(analysis: Analysis, config: str, lengths: Sequence[int], batches: Sequence[int]) -> tuple[Curve, ...]:
    model, spec = cost_model(analysis.scaling, analysis.fits, config), SpecConfig.parse(config)
    if model is None:
        return ()
    curves = []
    for style, length in enumerate(lengths):
        omega = omega_at(analysis.scaling, config, length)
        gains = tuple(fitted_speedup(model, spec, Cell(b, length), omega) for b in _between(batches))
        curves.append(Curve(f"{length:,}", style, tuple(map(float, _between(batches))), gains))
    return tuple(curves)
