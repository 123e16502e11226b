"""Synthetic headers, steps and runs for tests: every number is chosen by the test, none is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from specdec_lab.records import PHASES, Cell, Run, RunHeader, SpecConfig, StepRecord

# Dyadic seconds: their sums are exact, so that laws can be asserted with ==.
PARTS = dict(zip(PHASES, (0.25, 0.5, 0.125, 0.0625, 0.03125, 0.03125), strict=True))


def header(**overrides: Any) -> RunHeader:
    """A header of a self-drafting run over 2 sequences of 512 tokens; `cell` may be a spelling."""
    fields: dict[str, Any] = {
        "run_id": "r1",
        "created": "2026-01-02T03:04:05Z",
        "cell": "2x512",
        "config": "self:4+60/chain3",
        "workload": "prose",
        "target": {"name": "tiny", "fingerprint": "0" * 12, "weight_bytes": 1 << 20, "kv_bytes_per_token": 1024},
        "draft": None,
        "backend": "sdpa",
        "refused": {"triton": "no CUDA device"},
        "machine": {"device": "TEST_2t", "cores": 2},
        "versions": {"python": "3.11"},
        "commit": "unknown",
        "seed": 0,
        "temperature": 0.0,
        "verifier": "rejection",
        "instrumented": True,
        "ceilings": {"read_bytes_per_s": 1e10, "gemm_flops_per_s": 1e11},
        **overrides,
    }
    cell = fields["cell"]
    fields["cell"] = cell if isinstance(cell, Cell) else Cell.parse(cell)
    return RunHeader(**fields)


def _rows(value: int | Sequence[int], rows: int) -> tuple[int, ...]:
    return (value,) * rows if isinstance(value, int) else tuple(value)


def round_step(
    accepted: Sequence[int] = (1, 2),
    drafted: int | Sequence[int] | None = None,
    *,
    config: str = "self:4+60/chain3",
    index: int = 1,
    censored: Sequence[bool] | None = None,
    frozen: Iterable[int] = (),
    context_tokens: int | Sequence[int] = 512,
    scale: float = 1.0,
    **overrides: Any,
) -> StepRecord:
    """A round whose rows accepted these counts and emitted one token more; rows in `frozen` emitted nothing.

    drafted  nodes per row; left out = all nodes of the configuration
    scale    multiplies the phase times of PARTS; single phases and all other fields can be overridden, and wall_s
             follows as their sum
    """
    rows, frozen = len(accepted), frozenset(frozen)
    parts = {name: overrides.pop(name, seconds * scale) for name, seconds in PARTS.items()}
    live = [row not in frozen for row in range(rows)]
    nodes = SpecConfig.parse(config).num_nodes if drafted is None else drafted
    fields: dict[str, Any] = {
        "index": index,
        "kind": "round",
        "config": config,
        "start_s": float(index),
        "wall_s": sum(parts.values()),
        **parts,
        "cpu_s": sum(parts.values()),
        "context_tokens": _rows(context_tokens, rows),
        "drafted": tuple(n if on else 0 for n, on in zip(_rows(nodes, rows), live, strict=True)),
        "accepted": tuple(n if on else 0 for n, on in zip(accepted, live, strict=True)),
        "tokens": tuple(tuple(range(n + 1)) if on else () for n, on in zip(accepted, live, strict=True)),
        "censored": tuple(censored) if censored is not None else (False,) * rows,
        **overrides,
    }
    return StepRecord(**fields)


def off_step(rows: int = 2, **overrides: Any) -> StepRecord:
    """A round of plain decoding: one token per row, nothing drafted."""
    return round_step((0,) * rows, **{"config": "off", "draft_s": 0.0, **overrides})


def prefill_step(rows: int = 2, **overrides: Any) -> StepRecord:
    """The prefill that starts a turn; it emits the first token of every row."""
    return off_step(rows, **{"index": 0, "kind": "prefill", "context_tokens": 0, **overrides})


def run_of(*steps: StepRecord, interrupted: bool = False, **overrides: Any) -> Run:
    """A run of these steps; the header takes its batch and configuration from the last one unless told otherwise."""
    last = steps[-1] if steps else round_step()
    return Run(header(**{"cell": Cell(last.batch, 512), "config": last.config, **overrides}), steps, interrupted)
