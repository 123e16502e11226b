"""Comparisons as tables: text for terminals, logs and screen readers, and HTML that survives an untrusted notebook.

The HTML uses inline styles only: JupyterLab's sanitiser drops <style>, <script> and <svg>.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from ..records import Summary
from ..summary import Comparison, PairedRatio
from .figures import phase_bars
from .palette import FAMILIES, Family

NOTHING_YET = "no finished run yet"
BAR_PX = 180


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table; `is_text` columns are aligned left."""

    title: str
    text: Callable[[Comparison], str]
    is_text: bool = False


def speedup_text(ratio: PairedRatio | None, config: str) -> str:
    """`1.31x [1.28, 1.34] n=6`; without an interval where one block was measured."""
    if ratio is None:
        return "baseline" if config == "off" else "not compared"
    interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if math.isfinite(ratio.high) else ""
    return f"{ratio.mean:.2f}x{interval} n={ratio.num_blocks}"


def shared_labels(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """The labels that every run carries; they are said once."""
    if not comparisons:
        return ()
    first = comparisons[0].summary.labels
    return tuple(label for label in first if all(label in c.summary.labels for c in comparisons))


def note_text(c: Comparison, said: Sequence[str] = ()) -> str:
    """The labels of the run that were not `said` of all, and whether the ratio can be told from 1."""
    notes = [label for label in c.summary.labels if label not in said]
    if c.speedup is not None and not c.speedup.is_significant:
        notes.append("one block, no interval" if c.speedup.num_blocks == 1 else "interval includes 1x")
    if c.summary.busy_steps:
        notes.append(f"machine busy in {c.summary.busy_steps} rounds")
    return "; ".join(notes)


def quantity(value: float) -> str:
    """Three significant digits without an exponent: 4,178  312  41.2  0.0312."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def _part(*names: str) -> Callable[[Comparison], str]:
    return lambda c: quantity(sum(c.summary.parts_s[name] for name in names) * 1e3)


def _share(summary: Summary) -> str:
    return "-" if summary.kv_floor_share is None else f"{summary.kv_floor_share:.0%}"


COLUMNS = (
    Column("cell", lambda c: str(c.cell), is_text=True),
    Column("config", lambda c: c.config, is_text=True),
    Column("tokens/s", lambda c: quantity(c.summary.tokens_per_s)),
    Column("vs plain decoding", lambda c: speedup_text(c.speedup, c.config), is_text=True),
    Column("accept. length", lambda c: f"{c.summary.mean_acceptance_length:.2f}"),
    Column("step ms", lambda c: quantity(sum(c.summary.parts_s.values()) * 1e3)),
    Column("draft", _part("draft_s")),
    Column("linear", _part("linear_s")),
    Column("attention", _part("attention_s")),
    Column("commit+accept", _part("commit_s", "accept_s")),
    Column("host", _part("host_s")),
    Column("KV floor", lambda c: _share(c.summary)),
)
LEGEND = (
    "step and its parts: mean ms per round, measured. KV floor: KV bytes / measured read bandwidth (modelled), as a share of "
    "measured attention. accept. length: tokens per row and round, bonus included. [95% interval], n = paired blocks."
)


def _columns(comparisons: Sequence[Comparison]) -> tuple[Column, ...]:
    """The columns, with one for notes where some row has its own."""
    said = shared_labels(comparisons)
    note = Column("note", lambda c: note_text(c, said), is_text=True)
    return (*COLUMNS, note) if any(map(note.text, comparisons)) else COLUMNS


def _labels_line(comparisons: Sequence[Comparison]) -> str:
    said = shared_labels(comparisons)
    return f"All runs: {'; '.join(said)}." if said else ""


def render_table(comparisons: Sequence[Comparison]) -> str:
    """The comparison as plain text, with a verdict per line under it."""
    if not comparisons:
        return NOTHING_YET
    columns = _columns(comparisons)
    body = [[column.text(c) for column in columns] for c in comparisons]
    widths = [max(map(len, cells)) for cells in zip([c.title for c in columns], *body, strict=True)]
    lines = [_line([c.title for c in columns], columns, widths), "  ".join("-" * width for width in widths)]
    lines += [_line(cells, columns, widths) for cells in body]
    verdicts = [f"{c.cell} {c.config}: {c.verdict}" for c in comparisons if c.config != "off"]
    said = _labels_line(comparisons)
    return "\n".join([*([said] if said else []), *lines, "", *verdicts, LEGEND])


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if column.is_text else cell.rjust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    )
    return "  ".join(padded).rstrip()


_NOTE = "min-width:130px;white-space:normal;font-size:12px"
_CELL = "padding:4px;text-align:{align};white-space:nowrap;border-bottom:1px solid #8A8A8A"


def html_table(comparisons: Sequence[Comparison]) -> str:
    """The same table for a notebook, with a bar of the four families per row."""
    if not comparisons:
        return f"<p>{NOTHING_YET}</p>"
    note = _columns(comparisons)[len(COLUMNS) :]  # the note stands last, after the bar, and may take several lines
    heads = [_html_cell("th", escape(c.title), c.is_text) for c in COLUMNS]
    heads += [_html_cell("th", words, True) for words in ("time of a round", *(c.title for c in note))]
    rows = [_html_row(c, note, _longest_s(c, comparisons)) for c in comparisons]
    said = _labels_line(comparisons)
    return (
        '<div style="font-size:13px">'
        + (f"<p><b>{escape(said)}</b></p>" if said else "")
        + '<table style="border-collapse:collapse">'
        + f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        + f"<p>{_legend()}</p>{_verdicts(comparisons)}<p>{escape(LEGEND)} Bars: to scale within a cell.</p></div>"
    )


def _longest_s(c: Comparison, comparisons: Sequence[Comparison]) -> float:
    """The longest mean round of the cell: bars are comparable within a cell."""
    return max(sum(other.summary.parts_s.values()) for other in comparisons if other.cell == c.cell) or 1.0


def _html_cell(tag: str, content: str, is_text: bool) -> str:
    return f'<{tag} style="{_CELL.format(align="left" if is_text else "right")}">{content}</{tag}>'


def _html_row(c: Comparison, note: Sequence[Column], longest_s: float) -> str:
    cells = [_html_cell("td", escape(column.text(c)), column.is_text) for column in COLUMNS]
    notes = (f'<div style="{_NOTE}">{escape(column.text(c))}</div>' for column in note)
    cells += [_html_cell("td", content, True) for content in (_bar(c, longest_s), *notes)]
    return f"<tr>{''.join(cells)}</tr>"


def _bar(c: Comparison, longest_s: float) -> str:
    parts_ms = phase_bars([c])[0].parts_ms
    pieces = (
        f'<div title="{f.label}: {quantity(parts_ms[f.key])} ms" '
        f'style="width:{parts_ms[f.key] / longest_s / 1e3 * BAR_PX:.1f}px;height:12px;{_fill(f)}"></div>'
        for f in FAMILIES
    )
    return f'<div style="display:flex;width:{BAR_PX}px">{"".join(pieces)}</div>'


def _legend() -> str:
    key = '<span style="white-space:nowrap"><span style="display:inline-block;width:10px;height:10px;{}"></span> {}</span>'
    return " &#160; ".join(key.format(_fill(f), escape(f"{f.label}: {f.meaning}")) for f in FAMILIES)


def _fill(family: Family) -> str:
    """The colour of a family; stripes where it is modelled, in the one form of gradient that the sanitiser lets through."""
    colour, fill = family.colour, f"background-color:{family.colour}"
    if not family.modelled:
        return fill
    stripes = f"linear-gradient(135deg,{colour} 25%,#F0C4BA 25%,#F0C4BA 50%,{colour} 50%,{colour} 75%,#F0C4BA 75%)"
    return f"{fill};background-image:{stripes};background-size:6px 6px"


def _verdicts(comparisons: Sequence[Comparison]) -> str:
    items = (f"<li><b>{c.cell} {escape(c.config)}</b>: {escape(c.verdict)}</li>" for c in comparisons if c.config != "off")
    return f"<ul>{''.join(items)}</ul>"
