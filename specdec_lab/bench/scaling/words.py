"""The tables and sentences of a scaling measurement, for a terminal and as markdown. Every number is from the analysis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...costs import FittedCost
from ...view.tables import quantity, speedup_text
from ..tables import aligned, github, widths
from .analysis import Analysis, Flattening, SpecRow
from .samples import IN_CACHE, Point, Scaling


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table; the first `num_text` columns and the last one, if it is named `note`, are text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int = 1

    @property
    def numbers(self) -> list[int]:
        """The columns that are aligned right."""
        return [i for i, head in enumerate(self.heads) if i >= self.num_text and head != "note"]

    def text(self) -> str:
        """For a terminal."""
        head, *body = aligned([self.heads, *self.rows], self.numbers)
        rule = "  ".join("-" * width for width in widths([self.heads, *self.rows]))
        return "\n".join([self.title, head, rule, *body])

    def markdown(self) -> str:
        """For a README."""
        return "\n".join([f"**{self.title}**", "", *github([self.heads, *self.rows], self.numbers)])


def text(analysis: Analysis) -> str:
    """All tables and sentences for a terminal."""
    blocks = [*(table.text() for table in tables(analysis)), "\n".join(sentences(analysis))]
    return "\n\n".join([*blocks, "\n".join(warnings(analysis.scaling)), _made(analysis.scaling)])


def markdown(analysis: Analysis) -> str:
    """The same for a README."""
    blocks = [table.markdown() for table in tables(analysis)]
    blocks += ["\n".join(f"- {line}" for line in (*sentences(analysis), *warnings(analysis.scaling)))]
    return "\n\n".join([*blocks, f"{_made(analysis.scaling)}."])


def _made(scaling: Scaling) -> str:
    return f"Measured on {scaling.where}, {scaling.made_with}"


def tables(analysis: Analysis) -> tuple[Table, ...]:
    """Plain decoding, speculation, verify widths, fitted lines, half lengths; those that have rows."""
    found = (_plain(analysis), _speculation(analysis), _widths(analysis), _lines(analysis), _half_lengths(analysis))
    return tuple(table for table in found if table.rows)


def _plain(analysis: Analysis) -> Table:
    rows = tuple(
        (
            str(row.point.cell), _ms(row.step_s), f"{_ms(row.point.step_s.p05)} to {_ms(row.point.step_s.p95)}",
            _ms(row.fitted_s), _percent(row.residual), f"{row.efficiency:.2f}", _note(analysis.scaling, row.point),
        )
        for row in analysis.plain
    )  # fmt: skip
    heads = ("cell", "T_T, ms", "5 to 95%", "fitted, ms", "residual", "eta_AR", "note")
    return Table(
        "Plain decoding: median step, fitted step, measured over fitted - 1; eta_AR = floor at the calibrated ceilings / "
        "measured", heads, rows,
    )  # fmt: skip


def _speculation(analysis: Analysis) -> Table:
    efficiency = {row.point.cell: row.efficiency for row in analysis.plain}
    rows = tuple(_spec_row(row, efficiency[row.point.cell], analysis.scaling) for row in analysis.rows)
    heads = (
        "cell", "configuration", "T_D/T_T", "T_V/T_T", "T_ovh/T_T", "Omega", "speed-up, measured", "identity", "fitted",
        "S_ideal", "S/S_ideal", "eta_AR", "note",
    )
    return Table(
        "Speculation: parts in plain steps, real acceptance; identity = Omega T_T / (gamma T_D + T_V + T_ovh); fitted = the "
        "same from the fitted lines; S_ideal = measured Omega, every forward at its floor", heads, rows, 2,
    )  # fmt: skip


def _spec_row(row: SpecRow, efficiency: float, scaling: Scaling) -> tuple[str, ...]:
    parts = (row.draft_ratio, row.verify_ratio, row.overhead_ratio, row.omega)
    share = "-" if row.share_of_ideal is None else f"{row.share_of_ideal:.2f}"
    fitted = "-" if row.fitted_speedup is None else f"{row.fitted_speedup:.2f}x"
    return (
        str(row.point.cell), row.point.config, *(f"{part:.2f}" for part in parts), speedup_text(row.speedup, row.point.config),
        f"{row.identity:.2f}x", fitted, f"{row.ideal_speedup:.2f}x", share, f"{efficiency:.2f}", _note(scaling, row.point),
    )  # fmt: skip


def _widths(analysis: Analysis) -> Table:
    """Only the cells with probes: in the others the speculation table says it."""
    fits, scaling = analysis.fits, analysis.scaling
    probed = {p.cell for p in scaling.points if p.is_probe}
    rows = []
    for i, (cell, config, width) in enumerate(fits.sampled):
        if cell in probed:
            time = next(t for t in _point(scaling, cell, config).verify if t.query_tokens == width)
            residual = fits.target.residuals[i] if fits.target else None
            median = time.seconds.median
            rows.append(
                (str(cell), str(width), config, _ms(median), _ms(None if residual is None else median / (1 + residual)),
                 _percent(residual), _ms(median / width))
            )  # fmt: skip
    ordered = sorted(range(len(rows)), key=lambda i: (rows[i][0], int(rows[i][1])))
    heads = ("cell", "verified tokens", "drafted by", "T_V, ms", "fitted, ms", "residual", "ms per verified token")
    return Table("One forward of the target by verified tokens per sequence", heads, tuple(rows[i] for i in ordered))


def _point(scaling: Scaling, cell: object, config: str) -> Point:
    return next(p for p in scaling.points if p.cell == cell and p.config == config)


def _lines(analysis: Analysis) -> Table:
    fits = analysis.fits
    named: list[tuple[str, FittedCost | None]] = [("decode and verify: a, b, c", fits.target)]
    named.append(("the same, from the cells whose KV exceeds the cache", fits.beyond_cache))
    for drafter, line in fits.drafts.items():
        lumped = ", one window: its KV is in d1" if drafter in fits.one_window else ""
        named.append((f"drafted token, {drafter}: d0, d1, d2{lumped}", line))
    named += [("overhead of a round: o0, o1", fits.overhead), ("overhead of a plain step", fits.plain_overhead)]
    heads = ("line", "fixed, us", "per token, us", "per MB of KV, us", "samples", "worst residual", "leave-one-out")
    return Table("Fitted lines (relative least squares, no coefficient below 0)", heads,
                 tuple(_line_row(name, line) for name, line in named if line is not None))


def _line_row(name: str, line: FittedCost) -> tuple[str, ...]:
    return (
        name, quantity(line.fixed_s * 1e6), quantity(line.per_token_s * 1e6), quantity(line.per_kv_byte_s * 1e12),
        str(len(line.samples)), _percent(max(line.residuals, key=abs)),
        "-" if line.left_out is None else f"{line.left_out:.0%}",
    )  # fmt: skip


def _half_lengths(analysis: Analysis) -> Table:
    batches = sorted({batch for batch, _ in analysis.kv_half})
    widths = sorted({width for _, width in analysis.kv_half})
    lengths = [point.cell.length for point in analysis.scaling.points]
    measured = min(lengths, default=0), max(lengths, default=0)
    rows = tuple((str(b), *(_length(analysis.kv_half[b, q], measured) for q in widths)) for b in batches)
    heads = ("batch", *(f"{q} query token{'s' if q > 1 else ''}" for q in widths))
    return Table(
        "S_kv50: context tokens at which reading KV takes as long as all else of a forward (fitted; ~ = outside of the "
        "measured lengths)", heads, rows,
    )  # fmt: skip


def _length(tokens: float, measured: tuple[int, int]) -> str:
    if math.isinf(tokens):
        return "never"
    return f"{'' if measured[0] <= tokens <= measured[1] else '~'}{tokens:,.0f}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else quantity(seconds * 1e3)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.0%}"


def _note(scaling: Scaling, point: Point) -> str:
    busy = ["machine busy: do not quote"] if str(point.cell) in scaling.busy else []
    return "; ".join([*busy, *point.labels])


# Sentences.


def sentences(analysis: Analysis) -> tuple[str, ...]:
    """What the fit says, each with its numbers."""
    return (*_fit_sentences(analysis), *_inflections(analysis), *map(flattening_words, analysis.flattening))


def _fit_sentences(analysis: Analysis) -> Iterator[str]:
    for name, reason in analysis.fits.why_not.items():
        yield f"No fitted line for {name}: {reason}."
    ceiling = analysis.scaling.limits.read_bytes_per_s
    fits = analysis.fits
    for where, line in (("all cells", fits.target), ("the cells whose KV exceeds the cache", fits.beyond_cache)):
        if line is not None and line.per_kv_byte_s:
            rate = 1 / line.per_kv_byte_s
            yield (
                f"Effective bandwidth of KV reads, 1/c over {where}: {rate / 1e9:.1f} GB/s, {rate / ceiling:.0%} of the "
                f"calibrated read stream ({ceiling / 1e9:.1f} GB/s){_cache_words(analysis) if line is fits.target else ''}."
            )
        elif line is not None:
            yield f"The fit over {where} finds no cost of reading KV (c = 0)."
    if analysis.disagreement is not None:
        yield (
            "Self-drafted tokens and the line of the target, which they should follow, differ by up to "
            f"{analysis.disagreement:.0%}."
        )


def _cache_words(analysis: Analysis) -> str:
    cells = {p.cell for p in analysis.scaling.points}
    inside = {p.cell for p in analysis.scaling.points if IN_CACHE in p.labels}
    return f"; the KV of {len(inside)} of {len(cells)} cells fits in cache, not all of it comes from memory" if inside else ""


def _inflections(analysis: Analysis) -> Iterator[str]:
    lengths = sorted({p.cell.length for p in analysis.scaling.points})
    for config, length in analysis.inflection.items():
        if length is None:
            yield (
                f"{config} has no S_inflection between {lengths[0]:,} and {lengths[-1]:,} tokens (fitted): nowhere does it pay "
                "at every measured batch and gain with batch."
            )
        else:
            edge = " or less" if length == lengths[0] else ""
            yield (
                f"S_inflection of {config} is {length:,} tokens{edge} (fitted times, measured acceptance): there it pays at "
                "every measured batch and gains with batch."
            )


def flattening_words(f: Flattening) -> str:
    """Where the speed-up stops moving with batch, and which term decides."""
    if not f.fixed_s or not math.isfinite(f.batch) or not math.isfinite(f.limit):
        return f"{f.config} at {f.length:,} tokens (fitted): no fixed time or no cost per sequence, so batch changes nothing."
    larger, smaller = ("reading KV", "computing") if f.kv_s >= f.compute_s else ("computing", "reading KV")
    from_batch = f"From batch {f.batch:.1f} on" if f.batch > 1 else "At every batch"
    way = "rises" if f.limit > f.first else "falls"
    window = " (its draft's window included)" if f.is_one_window else ""
    return (
        f"{f.config} at {f.length:,} tokens (fitted): each sequence adds {_us(f.kv_s)} of KV reads, {_us(f.compute_s)} of "
        f"computing{window} and {_us(f.overhead_s)} of overhead to a round ({_us(f.draft_s)} to each drafted token), beside "
        f"{_us(f.fixed_s)} that do not grow with batch. {from_batch} the former outweigh the latter, and the speed-up, which "
        f"{way} with batch, flattens towards {f.limit:.2f}x{_measured_words(f)}. That limit is set by {larger} more than by "
        f"{smaller}; {_crossing(f)}, whatever the batch: both grow with it alike."
    )


def _measured_words(f: Flattening) -> str:
    ends = dict((f.measured[:1] + f.measured[-1:]) if f.measured else ())
    words = " and ".join(f"{gain:.2f}x at batch {batch}" for batch, gain in ends.items())
    return f" (measured: {words})" if words else ""


def _crossing(f: Flattening) -> str:
    if f.compute_length is None:
        return "computing exceeds reading KV at any context"
    if f.compute_length < 1:
        return "reading KV exceeds computing at any context"
    return f"computing exceeds reading KV below {f.compute_length:,.0f} tokens"


def _us(seconds: float) -> str:
    return f"{quantity(seconds * 1e6)} us"


def warnings(scaling: Scaling) -> tuple[str, ...]:
    """What a reader of the numbers must know besides them."""
    found = [f"{cell} was not measured: {why}" for cell, why in scaling.skipped.items()]
    found += [f"wrong tokens: {words}" for words in scaling.mismatches]
    loads = [load for load in scaling.header["load_average"] if load is not None]
    if loads:
        found.append(f"load average before and after: {', '.join(f'{load:.1f}' for load in loads)}")
    return (*found, *scaling.notices, *(["interrupted: later cells are missing"] if scaling.is_interrupted else []))
