"""`limits`: where speculation can pay at all on a machine, before anything is measured. Every number of it is modelled."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import Cell
from .files import writable_file
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import Outcome

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..costs import Draft, LimitRow, Machine, ModelShape

TITLE = "Speed-up over plain decoding at the physical limits, modelled"
HEAD = ("cell", "plain step", "KV share", "best", "speed-up", "tokens a round", "draft", "verify")


@dataclass(frozen=True, slots=True)
class LimitTable:
    """Cells at the limits of a machine; a notebook draws them, `str()` is the table."""

    model: str
    machine: Machine
    draft: str
    alpha: float
    rows: tuple[LimitRow, ...]
    half: tuple[tuple[int, float], ...]

    @property
    def about(self) -> str:
        """What all of it stands on."""
        limits, gib = self.machine.limits, self.machine.memory_bytes / 2**30
        return (
            f"{self.model}, 16 bit, on {self.machine.name}: reads {limits.read_bytes_per_s / 1e12:.3g} TB/s, computes "
            f"{limits.flops_per_s / 1e12:.4g} TFLOP/s, {gib:.0f} GiB ({self.machine.source}). Draft {self.draft}, each token "
            f"accepted with chance {self.alpha:g}: assumed."
        )

    def __str__(self) -> str:
        from ..bench.tables import aligned

        half = "; ".join(f"{length:,.0f} tokens at batch {batch}" for batch, length in self.half)
        lines = [f"{TITLE}: an upper bound, nothing was measured", self.about, "", *aligned([HEAD, *map(_texts, self.rows)])]
        return "\n".join([*lines, "", f"KV takes half of a plain step from here on: {half}"])

    def figure(self, *, dark: bool = False) -> go.Figure:
        """The speed-ups over batch and length."""
        from ..view.heatmap import MODELLED, HeatCell, heatmap_figure, speedup_heatmap

        cells = [
            HeatCell(r.cell, MODELLED if r.best else "infeasible", str(r.config) if r.best else None,
                     r.best.speedup if r.best else None, reason=_why_not(r))
            for r in self.rows
        ]  # fmt: skip
        return heatmap_figure(speedup_heatmap(cells), dark=dark, title=TITLE, note=self.about)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from ..view.figures import figure_bundle

        return figure_bundle(self.figure(), str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        limits = self.machine.limits
        return {
            "labels": ["modelled"], "model": self.model, "draft": self.draft, "alpha": self.alpha,
            "machine": {"name": self.machine.name, "read_bytes_per_s": limits.read_bytes_per_s,
                        "flops_per_s": limits.flops_per_s, "memory_bytes": self.machine.memory_bytes,
                        "source": self.machine.source},
            "cells": [_row_dict(row) for row in self.rows],
            "kv_half_length_tokens": {str(batch): round(length) for batch, length in self.half},
        }  # fmt: skip


def limits(lab: Lab, args: Namespace) -> Outcome:
    """Every (batch, length) at the limits of a machine."""
    path = writable_file(args.out, ".html") if args.out else None
    with asked():
        from ..costs import half_lengths, limit_rows

        shape, machine, draft = _shape(args.shape), _machine(args), _draft(args)
        cells = [Cell(batch, length) for batch in args.batches for length in args.lengths]
        rows = limit_rows(shape, machine, cells, draft, args.alpha)
    table = LimitTable(args.shape, machine, args.draft, args.alpha, rows, half_lengths(shape, machine.limits, args.batches))
    if path is not None:
        table.figure().write_html(path, include_plotlyjs=True, full_html=True)
    words = f"{table}\nwritten: {path}" if path else str(table)
    return Outcome(table, words, {**table.to_dict(), "written": args.out})


def _shape(name: str) -> ModelShape:
    """Of a published model by name, or of a folder."""
    from ..engine.models.random_weights import CONFIGS, config_of
    from ..engine.models.runner import shape_of

    if name.lower() in CONFIGS:
        return shape_of(config_of(name.lower()))
    if not (Path(name) / "config.json").is_file():
        raise UserMistake(f"no model is called {name!r} and it is no folder with a config.json; there are {', '.join(CONFIGS)}")
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(name, local_files_only=True))


def _machine(args: Namespace) -> Machine:
    from ..costs import MACHINES, Limits

    if args.machine.lower() not in MACHINES:
        raise UserMistake(
            f"no machine is called {args.machine!r}; there are {', '.join(MACHINES)}. Describe others with --read-bandwidth, "
            "--flops and --memory"
        )
    known = MACHINES[args.machine.lower()]
    given = (args.read_bandwidth, args.flops, args.memory)
    if not any(given):
        return known
    read, flops, memory = (
        value or usual
        for value, usual in zip(
            given, (known.limits.read_bytes_per_s, known.limits.flops_per_s, known.memory_bytes), strict=True
        )
    )
    name = "the machine described" if all(given) else f"{known.name}, changed"
    return replace(known, name=name, limits=Limits(read, flops), memory_bytes=memory, source="as given")


def _draft(args: Namespace) -> Draft:
    from ..costs import Draft

    return Draft.parse(args.draft, _shape(args.draft_shape) if args.draft_shape else None)


def _why_not(row: LimitRow) -> str:
    return "" if row.best else f"does not fit, batch {row.largest_batch} does"


def _texts(row: LimitRow) -> tuple[str, ...]:
    head = str(row.cell), f"{1e3 * row.plain_s:.2f} ms", f"{row.kv_share:.0%}"
    if row.best is None:
        return *head, _why_not(row), "", "", "", ""
    best, plain = row.best, row.plain_s
    parts = ("", "", "") if row.config.is_off else (
        f"{best.omega:.2f}", f"{best.draft_s / plain:.2f} steps", f"{best.verify_s / plain:.2f} steps"
    )  # fmt: skip
    return *head, str(row.config), f"{best.speedup:.2f}x", *parts


def _row_dict(row: LimitRow) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cell": str(row.cell), "plain_s": row.plain_s, "kv_share": row.kv_share, "largest_batch": row.largest_batch,
        "fits": row.best is not None,
    }  # fmt: skip
    if row.best is not None:
        found |= {"config": str(row.config), "speedup": row.best.speedup, "tokens_per_round": row.best.omega,
                  "draft_s": row.best.draft_s, "verify_s": row.best.verify_s}  # fmt: skip
    return found
