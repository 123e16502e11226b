"""What a GPU run found, as text: one line per row while it runs, and a table of all bars at the end.

Works on rows as the ledger keeps them. Not known here: how they came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .ledger import FAILED, RED

UNITS = {"_bytes_per_s": (1e9, "GB/s"), "_flops_per_s": (1e12, "TFLOP/s"), "_tokens_per_s": (1.0, "tokens/s"),
         "_bytes": (1e6, "MB"), "_mhz": (1.0, "MHz"), "_j": (1.0, "J"), "_w": (1.0, "W")}
SHOWN = 6  # values of a row on the screen; all of them are in the file
LONGEST = 60
TOLD = ("headline", "layouts", "decode")  # kinds without a bar that the end of a run shows all the same


def quantity(name: str, value: Any) -> str:
    """A number with the unit that its name ends in."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name.endswith("_s") and not name.endswith("_per_s"):
        scale, unit = (1.0, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "us")
        return f"{value * scale:.4g} {unit}"
    for ending, (size, unit) in UNITS.items():
        if name.endswith(ending):
            return f"{value / size:.4g} {unit}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def row_words(row: Mapping[str, Any]) -> str:
    """One row in one line."""
    values = [f"{name} {quantity(name, value)}" for name, value in list(row.get("values", {}).items())[:SHOWN]]
    parts = [f"{row['kind']} {row['what']}"]
    parts += [", ".join(values)] if values else []
    parts += [f"{row['bar']}: {row['verdict']}"] if row.get("bar") else [row["verdict"]] if row.get("verdict") else []
    parts += [f"[{'; '.join(row['flags'])}]"] if row.get("flags") else []
    parts += [row["reason"]] if row.get("reason") else []
    return " | ".join(parts)


def summary(stages: Mapping[str, Sequence[Mapping[str, Any]]], path: str, labels: Sequence[str] = ()) -> str:
    """How every stage ended, what it found without a bar, then every bar with its verdict."""
    lines = [f"rows: {path}" + (f" [{'; '.join(labels)}]" if labels else ""), ""]
    lines += [_stage_line(name, rows) for name, rows in stages.items()]
    told = [row_words(row) for rows in stages.values() for row in rows if row["kind"] in TOLD]
    lines += ["", *told] if told else []
    barred = [(name, row) for name, rows in stages.items() for row in rows if row.get("verdict")]
    if not barred:
        return "\n".join([*lines, "", "no bar was reached or missed: nothing with a bar was measured"])
    cells = [("stage", "what", "bar", "verdict", "flags")]
    for name, row in barred:
        flags = "; ".join(row.get("flags", ()))
        cells.append((name, f"{row['kind']} {row['what']}"[:LONGEST], row.get("bar", "right"), row["verdict"], flags))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    table = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, "", *table])


def _stage_line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    ends = [row for row in rows if row["kind"] == "stage"]
    if not ends:
        return f"{name.ljust(12)} did not end"
    values = ends[-1]["values"]
    reason = f": {ends[-1]['reason']}" if ends[-1].get("reason") else ""
    return f"{name.ljust(12)} {values['status'].ljust(8)} {values['seconds']:6.1f} s, {len(rows) - len(ends)} rows{reason}"


def is_red(stages: Iterable[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether a stage failed or a result was wrong; a missed bar of speed is not red, it is a finding."""
    for rows in stages:
        for row in rows:
            if row.get("verdict") == RED or (row["kind"] == "stage" and row["values"]["status"] == FAILED):
                return True
    return False
