"""What a notebook shows of a run without a widget: saved, printed, converted, untrusted, or with a dead kernel.

Tables with inline styles and pictures as data addresses: what JupyterLab's sanitiser lets through.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..records import Run
from ..summary import Comparison
from .figures import step_strip
from .forms import DisplayForm
from .svg import data_uri, strip_svg
from .tables import html_table

MAX_STRIPS = 4
STRIP_POINTS = 120


def run_html(headline: str, comparisons: Sequence[Comparison], ended: Sequence[Run], form: DisplayForm) -> str:
    """Headline, table, and a strip per cell of the runs that have ended."""
    reason = f"<p>No live view here: {escape(form.reason)}.</p>" if form.reason else ""
    return f"<p><b>{escape(headline)}</b></p>{reason}{html_table(comparisons)}{''.join(_strips(ended))}"


def _strips(runs: Sequence[Run]) -> Iterable[str]:
    cells = list(dict.fromkeys(str(run.header.cell) for run in runs))
    for cell in cells[:MAX_STRIPS]:
        strip = step_strip([run for run in runs if str(run.header.cell) == cell], STRIP_POINTS)
        if strip.step:
            words = f"Time per round in cell {cell}; {strip.title}"
            yield f'<p><img alt="{escape(words)}" src="{data_uri(strip_svg(strip))}"></p>'
