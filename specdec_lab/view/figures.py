"""Records to plain data to plotly figures: one function that gives the data, one that draws it.

Tests, the report and the fallback pictures use the data functions; plotly is imported by the drawing functions only.
Titles say what is measured and what is modelled; modelled parts are hatched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from ..records import PHASES, Run, forced_label
from ..summary import Comparison, acceptance, check_one_acceptance, wilson_interval
from .palette import COMPUTE, FAMILIES, KV
from .rows import CONTEXT, COUNT, FIRST_PHASE, KV_FLOOR, SEGMENT, STEP, TOKENS, Row, at_most, families, row_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

PLOTLY_CONFIG = {"showSendToCloud": False, "displaylogo": False}
MAX_POINTS = 1000
MAX_NAMED_STARTS = 6
HATCH = {
    "shape": "/",
    "fgcolor": KV.colour,
    "bgcolor": "rgba(204,51,17,0.22)",
    "fillmode": "overlay",
    "size": 8,
    "solidity": 0.5,
}
MODELLED = "hatched = modelled: KV bytes / measured read bandwidth"


@dataclass(frozen=True, slots=True)
class StripData:
    """Time of every round in four families (ms), and what the second strip shows; one entry per drawn row.

    starts  (round, label) at which another block, turn or configuration begins
    """

    title: str
    step: tuple[int, ...]
    count: tuple[int, ...]
    stack: Mapping[str, tuple[float, ...]]
    attention_ms: tuple[float, ...]
    kv_floor_ms: tuple[float, ...]
    kv_share: tuple[float, ...]  # of the verify forward
    context_tokens: tuple[float, ...]
    tokens_per_row: tuple[float, ...]
    starts: tuple[tuple[int, str], ...]

    @property
    def total_ms(self) -> tuple[float, ...]:
        """Measured time of each round."""
        return tuple(map(sum, zip(*self.stack.values(), strict=True)))


def step_strip(runs: Run | Iterable[Run], max_points: int = MAX_POINTS) -> StripData:
    """Rounds of one or more runs one after the other, neighbours merged until at most `max_points` remain."""
    runs = [runs] if isinstance(runs, Run) else list(runs)
    rows: list[Row] = []
    starts: list[tuple[int, str]] = []
    for number, run in enumerate(runs):
        starts.append((len(rows), _label(run)))
        rows += [row_of(step, len(rows) + i, number) for i, step in enumerate(run.rounds)]
    return _strip_of(_title(runs), at_most(rows, max_points), tuple(starts))


def _label(run: Run) -> str:
    block = "" if run.header.block is None else f" block {run.header.block}"
    return f"{run.header.config}{block}"


def _title(runs: Sequence[Run]) -> str:
    cells: dict[str, dict[str, None]] = {}
    for run in runs:
        cells.setdefault(str(run.header.cell), {})[run.header.config] = None
    words = "; ".join(f"{cell} {', '.join(configs)}" for cell, configs in cells.items()) or "no run"
    return titled(words, *(run.header.labels for run in runs))


def titled(words: str, *labels: Iterable[str]) -> str:
    """A title that says so where acceptance was forced."""
    forced = dict.fromkeys(label for some in labels if (label := forced_label(some)))
    return " · ".join([words, *forced])


def _strip_of(title: str, rows: Sequence[Row], starts: tuple[tuple[int, str], ...]) -> StripData:
    stacks = [families(row) for row in rows]
    verify = [row[FIRST_PHASE + 1] + row[FIRST_PHASE + 2] for row in rows]
    return StripData(
        title=title,
        step=tuple(int(row[STEP]) for row in rows),
        count=tuple(int(row[COUNT]) for row in rows),
        stack={family.key: tuple(stack[i] for stack in stacks) for i, family in enumerate(FAMILIES)},
        attention_ms=tuple(row[FIRST_PHASE + 2] for row in rows),
        kv_floor_ms=tuple(row[KV_FLOOR] for row in rows),
        kv_share=tuple(s[0] / v if v else 0.0 for s, v in zip(stacks, verify, strict=True)),
        context_tokens=tuple(row[CONTEXT] for row in rows),
        tokens_per_row=tuple(row[TOKENS] for row in rows),
        starts=starts if len({row[SEGMENT] for row in rows}) > 1 else (),
    )


def _high(values: Sequence[float]) -> float:
    """The upper end of an axis: the 99th percentile, so that one spike does not flatten everything else."""
    ordered = sorted(values)
    return 1.1 * ordered[int(0.99 * (len(ordered) - 1))] if ordered else 1.0


def step_strip_figure(data: StripData, *, dark: bool = False) -> go.Figure:
    """Stacked areas over the round index."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for family in FAMILIES:
        figure.add_scatter(
            x=data.step,
            y=data.stack[family.key],
            name=family.label,
            stackgroup="time",
            mode="lines",
            line={"width": 0, "shape": "hv", "color": family.colour},
            fillcolor=family.colour,
            fillpattern=HATCH if family.modelled else None,
            hovertemplate="%{y:.3f} ms",
        )
    for step, label in data.starts:
        named = {"annotation": {"text": label, "y": 1, "yanchor": "bottom", "xanchor": "left"}}
        figure.add_vline(x=step, line_width=1, line_dash="dot", **(named if len(data.starts) <= MAX_NAMED_STARTS else {}))
    figure.update_yaxes(range=[0, _high(data.total_ms)])
    return dress(figure, f"Time per round, measured: {data.title}<br><sup>{MODELLED}</sup>", "round", "ms per round", dark)


def kv_floor_figure(data: StripData, *, dark: bool = False) -> go.Figure:
    """Measured attention of verify over the round index, and the modelled floor under it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(x=data.step, y=data.attention_ms, name="attention (measured)", line={"color": COMPUTE.colour})
    figure.add_scatter(
        x=data.step,
        y=data.kv_floor_ms,
        name=KV.label,
        fill="tozeroy",
        line={"color": KV.colour, "dash": "dash"},
        fillcolor=KV.colour,
        fillpattern=HATCH,
    )
    figure.update_traces(hovertemplate="%{y:.3f} ms", mode="lines")
    return dress(
        figure, f"Attention of verify against its KV floor: {data.title}<br><sup>{MODELLED}</sup>", "round", "ms", dark
    )


@dataclass(frozen=True, slots=True)
class AcceptanceData:
    """Share of drafts whose first i+1 tokens were accepted, with its 95% interval, and the geometric curve of alpha.

    forced  the label of forced acceptance, None where it was measured
    """

    title: str
    rate: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_drafts: tuple[int, ...]
    alpha: float | None
    mean_length: float
    forced: str | None = None

    @property
    def heading(self) -> str:
        """What is shown, and whether it was measured."""
        return f"Acceptance per draft position, {'forced, not measured' if self.forced else 'measured'}"

    @property
    def curve(self) -> tuple[float, ...]:
        """What the rates would be if every position were accepted with chance alpha."""
        return () if self.alpha is None else tuple(self.alpha ** (i + 1) for i in range(len(self.rate)))


def acceptance_per_position(runs: Run | Iterable[Run]) -> AcceptanceData:
    """Pooled over the runs; rows cut by end of text or length limit are left out."""
    runs = [runs] if isinstance(runs, Run) else list(runs)
    forced = check_one_acceptance(runs)
    counts = acceptance(step for run in runs for step in run.steps)
    drafted = [n for n in counts.drafted_at if n]
    accepted = [round(rate * n) for rate, n in zip(counts.acceptance_rate_per_pos, drafted, strict=True)]
    intervals = [wilson_interval(k, n) for k, n in zip(accepted, drafted, strict=True)]
    return AcceptanceData(
        title=_title(runs),
        rate=counts.acceptance_rate_per_pos,
        low=tuple(low for low, _ in intervals),
        high=tuple(high for _, high in intervals),
        num_drafts=tuple(drafted),
        alpha=counts.alpha_censored,
        mean_length=counts.mean_acceptance_length,
        forced=forced,
    )


def acceptance_figure(data: AcceptanceData, *, dark: bool = False) -> go.Figure:
    """Bars with Wilson intervals; the label stands in the foot of the bar, clear of the interval."""
    import plotly.graph_objects as go

    position = list(range(1, len(data.rate) + 1))
    up = [high - rate for high, rate in zip(data.high, data.rate, strict=True)]
    down = [rate - low for low, rate in zip(data.low, data.rate, strict=True)]
    figure = go.Figure()
    figure.add_bar(
        x=position,
        y=data.rate,
        name="accepted",
        marker_color=COMPUTE.colour,
        customdata=data.num_drafts,
        error_y={"type": "data", "array": up, "arrayminus": down},
        text=[f"{rate:.0%}" for rate in data.rate],
        textposition="inside",
        insidetextanchor="start",
        hovertemplate="%{y:.1%} of %{customdata} drafts",
    )
    if data.curve:
        name = f"every position at {data.alpha:.2f} (fitted)"
        figure.add_scatter(x=position, y=data.curve, name=name, mode="lines+markers", line={"dash": "dot", "color": "#8A8A8A"})
    title = f"{data.heading}: {data.title}<br><sup>Wilson 95% intervals</sup>"
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    figure.update_xaxes(dtick=1)
    return dress(figure, title, "draft position", "accepted up to here", dark)


@dataclass(frozen=True, slots=True)
class PhaseBar:
    """Mean time of a round of one configuration in one cell, split into families (ms); labels of its runs."""

    cell: str
    config: str
    parts_ms: Mapping[str, float]
    labels: tuple[str, ...] = ()


def phase_bars(comparisons: Iterable[Comparison]) -> tuple[PhaseBar, ...]:
    """One bar per comparison; its parts sum to the mean measured round."""
    bars = []
    for c in comparisons:
        parts = [c.summary.parts_s[name] * 1e3 for name in PHASES]
        attention = c.summary.parts_s["attention_s"] * 1e3
        floor = attention * (c.summary.kv_floor_share or 0.0)
        row = (0, 1, 0, *parts, floor, 0, 0, 0)
        stack = dict(zip((f.key for f in FAMILIES), families(row), strict=True))
        bars.append(PhaseBar(str(c.cell), c.config, stack, c.summary.labels))
    return tuple(bars)


def phase_bars_figure(bars: Sequence[PhaseBar], *, dark: bool = False) -> go.Figure:
    """Horizontal stacked bars, grouped by cell."""
    import plotly.graph_objects as go

    figure = go.Figure()
    where = [[bar.cell for bar in bars], [bar.config for bar in bars]]
    for family in FAMILIES:
        figure.add_bar(
            y=where,
            x=[bar.parts_ms[family.key] for bar in bars],
            name=family.label,
            orientation="h",
            marker={"color": family.colour, "pattern": {"shape": "/" if family.modelled else ""}},
            hovertemplate="%{x:.3f} ms",
        )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed")
    title = titled("Mean time of a round, measured", *(bar.labels for bar in bars))
    return dress(figure, f"{title}<br><sup>{MODELLED}</sup>", "ms per round", "", dark)


def dress(figure: go.Figure, title: str, x: str, y: str, dark: bool) -> go.Figure:
    """The layout that all figures share."""
    figure.update_layout(
        template="plotly_dark" if dark else "plotly_white",
        title=title,
        xaxis_title=x,
        yaxis_title=y,
        hovermode="x unified",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
        legend={"orientation": "h", "y": -0.2},
        font={"size": 13},
    )
    return figure


def figure_bundle(figure: go.Figure, text: str) -> dict[str, Any]:
    """What to display for a figure: plotly's own form without its upload button; `text` where plotly cannot draw (GitHub)."""
    plot = json.loads(figure.to_json())
    return {
        "application/vnd.plotly.v1+json": {**plot, "config": PLOTLY_CONFIG},
        "text/html": f"<pre>{escape(text)}</pre>",
        "text/plain": text,
    }
