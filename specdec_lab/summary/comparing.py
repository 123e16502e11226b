"""Configurations against plain decoding of the same cell, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Cell, Run, RunHeader, Summary
from .intervals import PairedRatio, paired_ratio
from .pooling import pool
from .verdicts import step_s, verdict


@dataclass(frozen=True, slots=True)
class Comparison:
    """One configuration in one cell against plain decoding of the same cell, block by block.

    speedup                       tokens/s over plain decoding; None for `off` and where no block holds both
    break_even_acceptance_length  mean round over mean plain step: the tokens per row a round must yield to pay
    tokens_per_round              tokens per row that a round did yield (rows without a draft included)
    """

    cell: Cell
    workload: str
    config: str
    summary: Summary
    speedup: PairedRatio | None
    break_even_acceptance_length: float | None
    tokens_per_round: float
    verdict: str


def _conditions(header: RunHeader) -> tuple[Any, ...]:
    """What must be equal for two runs to be compared, the configuration apart."""
    target = header.target.get("fingerprint") or header.target.get("name")
    machine = header.machine.get("device")
    return header.cell, header.workload, header.temperature, header.backend, header.instrumented, target, machine


def compare(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """Every (cell, configuration) of `runs` against `off`, in the order of first appearance.

    Runs are paired through `header.block`; several runs of one configuration in a block count as one, pooled. Only runs
    of equal workload, temperature, back end, instrumentation, target and device are paired.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(_conditions(run.header), {}).setdefault(run.header.config, []).append(run)
    return tuple(
        _comparison(members, configs.get("off", [])) for configs in groups.values() for members in configs.values()
    )


def _by_block(runs: Sequence[Run]) -> Mapping[int | None, Summary]:
    """Block -> pooled summary, blocks that measured no speed left out."""
    blocks: dict[int | None, list[Run]] = {}
    for run in runs:
        blocks.setdefault(run.header.block, []).append(run)
    pooled = {block: pool(members) for block, members in blocks.items()}
    return {block: summary for block, summary in pooled.items() if summary.tokens_per_s > 0}


def _comparison(runs: Sequence[Run], off_runs: Sequence[Run]) -> Comparison:
    header, summary = runs[0].header, pool(runs)
    identity = (header.cell, header.workload, header.config, summary)
    if header.config == "off":
        return Comparison(*identity, None, None, _tokens_per_round(summary, header), "plain decoding, the baseline")
    ours, plain = _by_block(runs), _by_block(off_runs)
    shared = [block for block in ours if block in plain]
    if not shared:
        words = "no verdict: no block measured plain decoding beside it"
        return Comparison(*identity, None, None, _tokens_per_round(summary, header), words)
    speedup = paired_ratio([plain[b].tokens_per_s for b in shared], [ours[b].tokens_per_s for b in shared])
    paired = pool([run for run in runs if run.header.block in shared])
    off_step_s = step_s(pool([run for run in off_runs if run.header.block in shared]))
    tokens = _tokens_per_round(paired, header)
    words = verdict(paired, speedup, off_step_s, tokens)
    return Comparison(*identity, speedup, step_s(paired) / off_step_s, tokens, words)


def _tokens_per_round(summary: Summary, header: RunHeader) -> float:
    return summary.tokens_per_s * step_s(summary) / header.cell.batch
