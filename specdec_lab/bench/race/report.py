"""A race in words: a table for a terminal, one for a README, JSON lines for the database. A red peer has no speed in any."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import machine
from ...summary import PairedRatio
from ..provenance import provenance
from ..tables import aligned, github
from .ours import GROUP, PLAIN
from .rows import SCHEMA, CellResult, Row

if TYPE_CHECKING:
    from ...engine.loop import Engine

SPINNING = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what decides how idle threads wait
HEAD = ("peer", "tokens/s", "p05 to p95", "our plain over it", "our best over it", "eta", "tokens/round", "note")
LEGEND = (
    "tokens/s: median over blocks, all rows together. Ratios: geometric mean over the same blocks, 95% interval. eta: share of "
    "the physical limit (modelled: bytes and FLOPs of these rounds at this machine's measured rates)."
)


@dataclass(frozen=True, slots=True)
class RaceReport:
    """The finished cells and what all of them depend on. `str()` is the table for a terminal."""

    header: dict[str, Any]
    results: tuple[CellResult, ...]
    is_interrupted: bool = False

    @property
    def is_red(self) -> bool:
        """Whether a check failed somewhere."""
        return any(result.is_red for result in self.results)

    def __str__(self) -> str:
        tables = [line for result in self.results for line in (*_cell_lines(result), "")]
        ended = ["interrupted: the cells above are complete"] if self.is_interrupted else []
        return "\n".join([*tables, *_notices(self.results), *ended, LEGEND, about(self.header)])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def markdown(self) -> str:
        """The same for a README: one table, what was not timed, and on what it ran."""
        head = ("cell", *HEAD)
        numbers = [i for i, name in enumerate(head) if name not in ("cell", "peer", "note")]
        rows = [(str(result.cell), *cells(row, result)) for result in self.results for row in result.rows if row.is_timed]
        labels = [f"{r.cell}: {', '.join(r.rows[0].labels)}" for r in self.results if r.rows and r.rows[0].labels]
        others = [f"- {line}" for line in (*labels, *_not_timed(self.results), *_notices(self.results))]
        table = github([head, *rows], numbers)
        return "\n".join([*table, "", *others, *([""] if others else []), LEGEND, "", about(self.header)]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "schema": SCHEMA, **self.header, "is_interrupted": self.is_interrupted,
            "cells": [result.to_dict() for result in self.results],
        }


def header_of(engine: Engine, *, workload: str, new_tokens: int, blocks: int, seed: int) -> dict[str, Any]:
    """What every row of a race depends on."""
    identity, pair = engine.identity(), engine.pair
    return {
        **provenance(), "run": secrets.token_hex(6), "device": identity.device, "base": dict(identity.base),
        "model": pair.target.name, "draft": pair.draft.name if pair.draft else None, "threads": identity.base["threads"],
        "ceilings": {
            "read_bytes_per_s": engine.ceilings.read_bytes_per_s, "gemm_flops_per_s": engine.ceilings.gemm_flops_per_s,
        },
        "environment": {name: os.environ[name] for name in SPINNING if name in os.environ},
        "workload": workload, "new_tokens": new_tokens, "blocks": blocks, "seed": seed,
    }  # fmt: skip


def rows_to_save(header: dict[str, Any], result: CellResult) -> list[dict[str, Any]]:
    """One row per peer of a finished cell, whole in itself; a cell that could not run is a row too."""
    if result.skipped is not None:
        rows: list[dict[str, Any]] = [{"cell": str(result.cell), "peer": GROUP, "state": "skipped", "reason": result.skipped}]
    else:
        shared = {"best_of_ours": result.best, "notices": list(result.notices)}
        rows = [{**row.to_dict(), **shared} for row in result.rows]
    return [{"schema": SCHEMA, **header, **row} for row in rows]


def about(header: dict[str, Any]) -> str:
    """On what, with what and on which text the numbers were measured, in one line."""
    known = header["versions"]
    versions = ", ".join(f"{name} {known[name]}" for name in ("torch", "transformers") if name in known)
    threads = "1 thread" if header["threads"] == 1 else f"{header['threads']} threads"
    text = f"{header['new_tokens']} greedy tokens after {header['workload']} prompts, {header['blocks']} blocks"
    return f"{header['device']}, {threads}, {versions}, commit {machine.short(header['commit'])}, {header['created']}; {text}"


def cells(row: Row, result: CellResult) -> tuple[str, ...]:
    """One row as texts; empty where there is no number, above all for a red peer."""
    speed = row.speed
    shown = ("", "") if speed is None else (f"{speed.median:,.0f}", f"{speed.p05:,.0f} to {speed.p95:,.0f}")
    return (
        row.peer, *shown, ratio_text(row.ratios.get(PLAIN)), ratio_text(row.ratios.get(result.best or "")),
        "" if row.eta is None else f"{row.eta:.0%}", "" if row.tokens_per_round is None else f"{row.tokens_per_round:.2f}",
        _note(row, result),
    )  # fmt: skip


def ratio_text(ratio: PairedRatio | None) -> str:
    """`1.31x (1.28 to 1.34)`; without an interval where one block was measured."""
    if ratio is None:
        return ""
    interval = f" ({ratio.low:.2f} to {ratio.high:.2f})" if math.isfinite(ratio.high) else ""
    return f"{ratio.mean:.2f}x{interval}"


def _note(row: Row, result: CellResult) -> str:
    notes = [row.words] if row.words else []
    if row.conditions.is_busy:
        notes.append("machine busy: do not quote")
    if row.peer == result.best:
        notes.append("our best")
    first = result.rows[0].labels
    return "; ".join([*notes, *(label for label in row.labels if label not in first)])


def _cell_lines(result: CellResult) -> list[str]:
    if result.skipped is not None:
        return [f"{result.cell}  skipped: {result.skipped}"]
    labels = f"  [{', '.join(result.rows[0].labels)}]" if result.rows[0].labels else ""
    timed = [cells(row, result) for row in result.rows if row.is_timed]
    table = aligned([HEAD, *timed]) if timed else []
    return [f"{result.cell}{labels}", *(f"  {line}" for line in table), *(f"  {line}" for line in _not_timed((result,), ""))]


def _not_timed(results: Sequence[CellResult], lead: str = "{cell} ") -> Iterable[str]:
    """Who has no speed, and why: `8x4096 transformers/lookup, skipped: ...`."""
    for result in results:
        if result.skipped is not None and lead:
            yield f"{result.cell}, skipped: {result.skipped}"
        for row in result.rows:
            if not row.is_timed:
                yield f"{lead.format(cell=result.cell)}{row.peer}, {row.state}: {row.words}"


def _notices(results: Sequence[CellResult]) -> list[str]:
    return [notice for result in results for notice in result.notices]
