"""One HTML file that explains runs to somebody who was not there: tables, pictures, and what every number depends on.

Self-contained: no script, no address, nothing to fetch. The pictures come from the same data functions as the live ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..records import Run, RunHeader, forced_label
from ..summary import Comparison, compare
from .events import event_words
from .figures import acceptance_per_position, step_strip, titled
from .heatmap import HeatCell, HeatmapData, speedup_heatmap
from .svg import XMLNS, acceptance_svg, strip_svg
from .tables import html_table, quantity

MAX_PICTURES = 60  # pairs of strip and acceptance
PICTURE_BYTES = 180_000  # of all strips together
BYTES_PER_POINT = 110

STYLE = """
:root { color-scheme: light dark; --line: #8A8A8A55; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 1180px; margin: 0 auto; padding: 24px; }
body { background: Canvas; color: CanvasText; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 8px; } h3 { font-size: 15px; margin: 18px 0 0; }
section > div { overflow-x: auto; } p, li { max-width: 80em; }
.pair { display: flex; flex-wrap: wrap; gap: 8px 20px; } .pair svg { max-width: 100%; height: auto; }
.facts th { text-align: left; font-weight: 400; padding: 2px 24px 2px 0; vertical-align: top; opacity: 0.8; }
.facts td { padding: 2px 0; overflow-wrap: anywhere; }
.heat { border-collapse: separate; border-spacing: 2px; font-size: 13px; }
.heat td { min-width: 96px; height: 48px; text-align: center; border: 1px solid var(--line); padding: 2px 6px; }
.heat th { font-weight: 600; padding: 2px 8px; } .heat small { display: block; font-size: 12px; }
"""
METHOD = (
    "Plain decoding and every configuration ran on the same engine in interleaved blocks. A speed-up is the geometric mean "
    "over paired blocks, with a 95% Student interval over those blocks; n is their number. One block gives no interval.",
    "Times are measured. The KV floor is modelled: KV bytes of the verify forward divided by the read bandwidth that was "
    "measured on this machine. It is hatched in the strips and never exceeds the measured attention it is drawn in.",
    "Acceptance per position is the share of drafts whose tokens up to that position were all accepted, with Wilson 95% "
    "intervals; rows cut by end of text or length limit are left out.",
)


def write_report(
    path: str | os.PathLike[str],
    runs: Sequence[Run] = (),
    *,
    comparisons: Sequence[Comparison] | None = None,
    policy: Mapping[str, Any] | None = None,
    title: str = "Speculative decoding report",
) -> Path:
    """Write the report and return its path.

    comparisons  of the runs; worked out from `runs` when left out
    policy       a policy as plain data, as in its JSON file
    """
    found = compare(runs) if comparisons is None else comparisons
    title = titled(title, *(run.header.labels for run in runs), (policy or {}).get("header", {}).get("labels", ()))
    sections = [
        _section("Against plain decoding", html_table(found)),
        *([_section("Best configuration per cell", _heat_section(policy))] if policy else []),
        *([_section("Round by round", "".join(_pictures(runs)))] if runs else []),
        _section("How it was measured", _method(runs, policy)),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{_standfirst(runs)}{''.join(sections)}</body></html>\n"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2><div>{body}</div></section>"


def _standfirst(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    header = runs[-1].header
    rounds = sum(len(run.rounds) for run in runs)
    labels = dict.fromkeys(label for run in runs for label in run.header.labels)
    target, device = header.target.get("name", "target"), header.machine.get("device", "this machine")
    words = f"{target} on {device}, {len(runs)} runs, {rounds:,} rounds"
    said = f" <b>{escape('; '.join(labels))}.</b>" if labels else ""
    return f"<p>{escape(words)}, {escape(header.created)}.{said}</p>"


# Pictures.


def _pictures(runs: Sequence[Run]) -> Iterable[str]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((str(run.header.cell), run.header.config), []).append(run)
    shown = dict(list(groups.items())[:MAX_PICTURES])
    points = max(24, min(240, PICTURE_BYTES // (BYTES_PER_POINT * max(1, len(shown)))))
    for (cell, config), members in shown.items():
        events = "".join(f"<li>{escape(line)}</li>" for run in members for step in run.rounds for line in event_words(step))
        strip = strip_svg(step_strip(members, points), ink="currentColor")
        bars = "" if config == "off" else acceptance_svg(acceptance_per_position(members), ink="currentColor")
        pictures = f"{strip}{bars}".replace(XMLNS, "")  # inline pictures need no name space, so no address is left
        yield f'<h3>{cell} {escape(config)}</h3><div class="pair">{pictures}</div>'
        if events:
            yield f"<p>The policy put drafts aside that stopped paying:</p><ul>{events}</ul>"
    if len(groups) > len(shown):
        yield f"<p>{len(groups) - len(shown)} more are in the table above; their pictures are left out for size.</p>"


def _heat_section(policy: Mapping[str, Any]) -> str:
    labels = policy.get("header", {}).get("labels", ())
    data = speedup_heatmap(policy.get("table", ()), labels)
    reach = max((abs(z) for row in data.log2 for z in row if z is not None), default=1.0) or 1.0
    note = (
        "<p>Blue is faster than plain decoding, red slower, measured; italic: the interval includes 1x; empty: not tuned.</p>"
    )
    return f"{_heat_table(data, reach)}{note}{_steady_note(policy)}{_forced_note(data.labels)}"


def _steady_note(policy: Mapping[str, Any]) -> str:
    """What the sentinel said of the machine, cell by cell where it said anything."""
    found = [(row["cell"], row["sentinel"]) for row in policy.get("table", ()) if row.get("sentinel")]
    items = [
        f"<li>{escape(cell)}: plain decoding repeated {s['repeats']} times"
        + (f" varied by {s['cv']:.1%}" if "cv" in s else "")
        + (f", the machine drifted by {s['drift']:.1%}" if "drift" in s else "")
        + f"; nothing below {max(s['least_speedup'], policy['lookup']['min_speedup']):.3f}x is claimed</li>"
        for cell, s in found
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _forced_note(labels: Iterable[str]) -> str:
    forced = forced_label(labels)
    return f"<p><b>{escape(forced)}: no model accepted so much.</b></p>" if forced else ""


def _heat_table(data: HeatmapData, reach: float) -> str:
    heads = "".join(f'<th scope="col">{n:,}</th>' for n in data.lengths)
    rows = "".join(
        f'<tr><th scope="row">{b}</th>{"".join(_heat_cell(cell, reach) for cell in row)}</tr>'
        for b, row in zip(data.batches, data.cells, strict=True)
    )
    corner = '<th scope="col">batch \\ context tokens</th>'
    return f'<table class="heat"><thead><tr>{corner}{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _heat_cell(cell: HeatCell | None, reach: float) -> str:
    if cell is None:
        return "<td></td>"
    if cell.speedup is None:
        return f'<td title="{escape(cell.reason)}">{escape(cell.text)}</td>'
    background, ink = diverging(math.log2(cell.speedup) / reach)
    interval = f"[{cell.ci[0]:.2f}, {cell.ci[1]:.2f}]" if cell.ci else "no interval"
    words = (
        f"<b>{cell.speedup:.2f}x</b>{escape(cell.caveat)}<small>{escape(cell.config or '')}</small><small>{interval}</small>"
    )
    words = words if cell.is_sure else f"<i>{words}</i>"
    return f'<td style="background:{background};color:{ink}">{words}</td>'


def diverging(position: float) -> tuple[str, str]:
    """Background and ink from red (-1) over near-white (0) to blue (+1)."""
    end = (0x21, 0x66, 0xAC) if position > 0 else (0xB2, 0x18, 0x2B)
    share = min(1.0, abs(position))
    red, green, blue = (round(0xF7 + (colour - 0xF7) * share) for colour in end)
    return f"#{red:02X}{green:02X}{blue:02X}", "#FFFFFF" if share > 0.6 else "#1A1A1A"


# What the numbers depend on.


def _method(runs: Sequence[Run], policy: Mapping[str, Any] | None) -> str:
    notes = "".join(f"<li>{note}</li>" for note in METHOD)
    headers: dict[tuple[str, ...], RunHeader] = {}
    for run in runs:
        headers.setdefault(_setting(run.header), run.header)
    tables = "".join(_facts(_header_facts(header)) for header in headers.values())
    if policy:
        header = {key: value for key, value in policy.get("header", {}).items() if value not in ("", None, [], {})}
        tables += f"<h3>Policy</h3>{_facts([(key, _words(value)) for key, value in header.items()])}"
    return f"<ul>{notes}</ul>{tables}"


def _setting(header: RunHeader) -> tuple[str, ...]:
    """What tells two ways of measuring apart, cell, configuration and block left aside."""
    target = header.target.get("fingerprint") or header.target.get("name")
    named = (header.workload, header.backend, header.temperature, header.verifier, header.seed, header.commit, target)
    return tuple(map(str, named))


# name in a header -> words, unit, what a unit is
CEILINGS = {
    "read_bytes_per_s": ("read", "GB/s", 1e9),
    "gemm_flops_per_s": ("gemm", "GFLOP/s", 1e9),
    "read_spread": ("spread of the read streams", "% of their median", 0.01),
    "copy_bytes_per_s": ("copy, reads and writes together", "GB/s", 1e9),
    "launch_gap_s": ("an empty kernel of a graph", "us", 1e-6),
    "timer_tick_s": ("tick of the kernels' clock", "us", 1e-6),
    "sm_mhz_before": ("clock before", "MHz", 1.0),
    "sm_mhz_after": ("clock after", "MHz", 1.0),
}


def _header_facts(header: RunHeader) -> list[tuple[str, str]]:
    facts = [
        ("target", _words(header.target)),
        ("draft model", _words(header.draft) if header.draft else "none loaded"),
        (
            "workload",
            f"{header.workload}, temperature {header.temperature}, verifier {header.verifier}, seed {header.seed}",
        ),
        ("back end", header.backend),
        *((f"passed over: {name}", why) for name, why in header.refused.items()),
        ("machine", _words(header.machine)),
        ("versions", _words(header.versions)),
        ("commit", header.commit),
    ]
    for name, value in header.ceilings.items():
        words, unit, scale = CEILINGS.get(name, (name, "", 1.0))
        facts.append((f"ceiling: {words}", f"{quantity(value / scale)} {unit}, measured at start"))
    facts.append(("instrumented", "yes" if header.instrumented else "no"))
    return facts


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(words)}</td></tr>" for name, words in facts)
    return f'<table class="facts">{rows}</table>'
