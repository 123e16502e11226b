"""From recorded blocks to a policy, as a pure function: the same records give the same bytes, so a policy can be verified.

Claims come from confirming duels alone; other blocks only say what the winners of other cells are worth in a cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from ..policy import Estimate, Policy, Row, Rules
from ..records import Cell, SpecConfig, forced_label
from .compose import compose
from .db import Measurement
from .duel import Verdict, verdict
from .grid import Protocol
from .probe import KINDS as PART_KINDS
from .sentinel import KIND as SENTINEL
from .sentinel import Steadiness, crowding_label, standing, steadiness

MAX_PORTFOLIO = 8  # beside `off`; each configuration is a set of graphs and caches in an engine
PORTFOLIO_LOSS = 0.003  # mean log speed-up that may be lost by leaving winners out

State = tuple[str, str]  # a row's state, and the reason for it


@dataclass(frozen=True, slots=True)
class CellEvidence:
    """What is recorded of one cell: speed of plain decoding, blocks per configuration and kind; of the machine meanwhile."""

    cell: Cell
    plain: tuple[Measurement, ...]
    blocks: Mapping[str, Mapping[str, Sequence[Measurement]]]
    machine: Steadiness = Steadiness()

    @classmethod
    def of(cls, cell: Cell, measurements: Iterable[Measurement]) -> CellEvidence:
        """Sort the good records of a cell that stand. A configuration that once gave wrong tokens here has none.

        measurements  of this cell, and the sentinels of all; of other cells more may be there
        """
        measurements = tuple(measurements)
        here = sorted((m for m in standing(measurements) if m.cell == cell), key=lambda m: (m.design.block, m.id))
        wrong = {record.config for record in here if record.status == "mismatch"}
        good = [record for record in here if record.status == "ok" and record.config not in wrong]
        blocks: dict[str, dict[str, list[Measurement]]] = {}
        for record in good:
            if "log_speedup" in record.summary:
                blocks.setdefault(record.config, {}).setdefault(record.kind, []).append(record)
        plain = [m for m in good if m.config == "off" and "tokens_per_s" in m.summary]
        plain = [m for m in plain if m.kind != SENTINEL or m.design.block == 0]  # repeats are of the machine, not of the cell
        found = [block for kinds in blocks.values() for several in kinds.values() for block in several]
        return cls(cell, tuple(plain), blocks, steadiness(found, measurements))

    def least(self, protocol: Protocol) -> float:
        """The speed-up that a lower bound must exceed here: `min_speedup`, more where the machine is less steady than that."""
        return max(protocol.min_speedup, self.machine.least_speedup)

    def duel(self, config: str, protocol: Protocol) -> Verdict | None:
        """The verdict of a complete duel."""
        blocks = self.blocks.get(config, {}).get("duel", ())
        return verdict(blocks) if len(blocks) >= protocol.duel_blocks else None

    def best(self, config: str, protocol: Protocol) -> Sequence[Measurement]:
        """The blocks that say most about a configuration: its duel, else all others."""
        kinds = self.blocks.get(config, {})
        if self.duel(config, protocol):
            return kinds["duel"]
        return [block for kind in ("race", "pilot", "duel") for block in kinds.get(kind, ())]

    def winner(self, protocol: Protocol) -> str:
        """The configuration whose duel has the highest lower bound above `least`, else `off`."""
        duels = {config: found for config in self.blocks if (found := self.duel(config, protocol))}
        able = {config: found.low for config, found in duels.items() if found.exceeds(self.least(protocol))}
        return max(able, key=lambda config: (able[config], config), default="off")

    def estimate(self, config: str, protocol: Protocol) -> Estimate | None:
        """What a configuration is worth here; None with fewer than two blocks."""
        blocks = self.best(config, protocol)
        found = verdict(blocks)
        if found is None:
            return None
        return Estimate(
            speedup=math.exp(found.mean), ci95=(math.exp(found.low), math.exp(found.high)), how="measured",
            ids=tuple(block.id for block in blocks), break_even_acceptance_length=_break_even(blocks),
        )  # fmt: skip


def _break_even(blocks: Sequence[Measurement]) -> float:
    """Round over plain step. Plain decoding yields 1 token per row and round, so it is tokens per round / speed-up."""
    ratios: list[float] = [b.summary["tokens_per_round"]["mean"] / math.exp(b.summary["log_speedup"]) for b in blocks]
    return _geometric(ratios)


def _geometric(values: Iterable[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def labels_of(
    header: Mapping[str, Any], states: Mapping[Cell, State], measurements: Iterable[Measurement], more: Iterable[str] = ()
) -> list[str]:
    """What a reader of a policy must know of its numbers, as labels."""
    ours = standing([m for m in measurements if belongs(m, header)])
    blocks = (m for m in ours if m.kind not in PART_KINDS)  # parts decide nothing
    used = [m for m in blocks if m.status == "ok" and m.cell in states]
    labels = {label for m in used for label in m.env.get("labels", ())}
    labels |= {"busy"} if any(m.env.get("busy") for m in used) else set()
    labels |= {"drift"} if any(m.summary.get("is_drift") for m in used) else set()
    labels |= {"partial"} if any(state == "not_visited" for state, _ in states.values()) else set()
    return sorted(labels | crowding_label(used) | set(more))


class ForcedAcceptance(ValueError):
    """A policy from forced acceptance was not asked for: it would promise what no model was seen to accept."""


def refuse_forced(labels: Iterable[str], allow_forced: bool) -> None:
    """Raise ForcedAcceptance unless acceptance is measured or that it is not was said explicitly."""
    forced = forced_label(labels)
    if forced and not allow_forced:
        raise ForcedAcceptance(
            f"{forced}: a policy would promise what no model was seen to accept. Tune without, or say --allow-forced "
            "(allow_forced=True) for a policy that carries the label"
        )


def assemble(
    header: Mapping[str, Any], rules: Rules, states: Mapping[Cell, State], measurements: Iterable[Measurement], *,
    allow_forced: bool = False,
) -> Policy:
    """The policy that these records support, for these cells; ForcedAcceptance where they are forced without leave."""
    refuse_forced(header["labels"], allow_forced)
    protocol = Protocol(**header["protocol"])
    ours = [m for m in measurements if belongs(m, header)]
    cells = {cell: CellEvidence.of(cell, ours) for cell, (state, _) in states.items() if state == "tuned"}
    portfolio = choose_portfolio(cells.values(), protocol)
    rows = []
    for cell, (state, reason) in sorted(states.items()):
        row = _row(cells[cell], portfolio, protocol) if cell in cells else Row(cell, state, reason)
        rows.append(_explained(row, standing(ours)))
    return Policy(header, rules, portfolio, tuple(rows))


def _explained(row: Row, records: Sequence[Measurement]) -> Row:
    """The row with what the parts of its cell promised and why, where they were probed."""
    composition = None if row.state == "infeasible" else compose(row.cell, records)
    if composition is None:
        return row
    why = composition.why(row.config or str(composition.best.config))
    return replace(row, details={**row.details, "why": why, "composed": composition.to_dict()})


def belongs(record: Measurement, header: Mapping[str, Any]) -> bool:
    """Whether a record may be used for a policy with this header: its fingerprints, workload, temperature, run if only that."""
    if header.get("remeasured") and record.run != header["run"]:
        return False
    kind = SpecConfig.parse(record.config).drafter
    drafter = "0" * 12 if kind == "off" else header["drafters"].get(kind)
    same = (record.workload, record.temperature) == (header["workload"], header["temperature"])
    return same and record.fp == f"{header['base']}.{drafter}"


def choose_portfolio(cells: Iterable[CellEvidence], protocol: Protocol) -> tuple[str, ...]:
    """`off` and the winners that matter: taken greedily until what is left out is worth less than PORTFOLIO_LOSS."""
    cells = tuple(cells)
    winners = {winner for cell in cells if (winner := cell.winner(protocol)) != "off"}
    worth = {config: [_worth(cell, config, protocol) for cell in cells] for config in sorted(winners)}
    chosen: list[str] = []

    def total(configs: Sequence[str]) -> float:
        return sum(max((worth[config][i] for config in configs), default=0.0) for i in range(len(cells)))

    while len(chosen) < min(MAX_PORTFOLIO, len(worth)) and total([*worth]) - total(chosen) > PORTFOLIO_LOSS * len(cells):
        chosen.append(max((c for c in worth if c not in chosen), key=lambda config: (total([*chosen, config]), config)))
    return ("off", *chosen)


def _worth(cell: CellEvidence, config: str, protocol: Protocol) -> float:
    """Lower bound (log) if it passes the gate, else 0; at most that of the cell's confirmed winner."""
    winner = cell.winner(protocol)
    return 0.0 if winner == "off" else min(_low(cell, config, protocol), _low(cell, winner, protocol))


def _low(cell: CellEvidence, config: str, protocol: Protocol) -> float:
    found = verdict(cell.best(config, protocol))
    return found.low if found and found.exceeds(cell.least(protocol)) else 0.0


def _row(cell: CellEvidence, portfolio: Sequence[str], protocol: Protocol) -> Row:
    if not cell.plain:
        return Row(cell.cell, "not_visited", "no record of plain decoding in this cell")
    estimates = {c: e for c in portfolio if c != "off" and (e := cell.estimate(c, protocol))}
    row = Row(
        cell.cell, "tuned", config="off", speedup=1.0, speedup_ci95=(1.0, 1.0), estimates=estimates,
        baseline_tokens_per_s=_geometric(record.summary["tokens_per_s"] for record in cell.plain),
        details={"num_trials": len(cell.blocks), **_best_candidate(cell, protocol), **cell.machine.to_dict()},
    )  # fmt: skip
    winner = cell.winner(protocol)
    if winner not in portfolio:  # left out because another is as good: take that one, if its interval passes the gate
        winner = max((c for c in portfolio if _worth(cell, c, protocol)), key=lambda c: _low(cell, c, protocol), default="off")
    if winner == "off":
        return replace(row, tokens_per_s=row.baseline_tokens_per_s)
    return _speculating(row, winner, cell.best(winner, protocol))


def _speculating(row: Row, config: str, blocks: Sequence[Measurement]) -> Row:
    estimate, found = row.estimates[config], verdict(blocks)
    assert found is not None  # an estimate exists
    speed = _geometric(block.summary["tokens_per_s"] for block in blocks)
    return replace(
        row, config=config, speedup=estimate.speedup, speedup_ci95=estimate.ci95, tokens_per_s=speed,
        baseline_tokens_per_s=speed / estimate.speedup,
        details={
            **row.details, **_acceptance(blocks), "num_blocks": found.num_blocks, "num_row_rounds": found.num_row_rounds,
            "confirmed_by": sorted({block.kind for block in blocks}),
            "break_even_acceptance_length": estimate.break_even_acceptance_length,
            **{name: fmean(b.summary[name] for b in blocks) for name in ("draft_s", "verify_s", "kv_read_bytes")},
        },
    )  # fmt: skip


def _acceptance(blocks: Sequence[Measurement]) -> dict[str, Any]:
    """Mean acceptance length (bonus included) and marginal acceptance per position, pooled over blocks."""
    steps, histogram = 0, [0] * max(len(b.summary["acceptance_histogram"]) for b in blocks)
    drafted_at = [0] * max(len(b.summary["drafted_at"]) for b in blocks)
    for block in blocks:
        steps += block.summary["num_spec_steps"]
        for into, name in ((histogram, "acceptance_histogram"), (drafted_at, "drafted_at")):
            for i, count in enumerate(block.summary[name]):
                into[i] += count
    accepted = [sum(histogram[i + 1 :]) for i in range(len(drafted_at))]
    return {
        "mean_acceptance_length": 1 + sum(j * n for j, n in enumerate(histogram)) / max(steps, 1),
        "acceptance_rate_per_pos": [a / n for a, n in zip(accepted, drafted_at, strict=True) if n],
    }


def _best_candidate(cell: CellEvidence, protocol: Protocol) -> dict[str, Any]:
    """The best that was tried, also where plain decoding won: the reader wants to know by how much it lost."""
    found = {config: v for config in cell.blocks if (v := verdict(cell.best(config, protocol)))}
    if not found:
        return {}
    best = max(found, key=lambda config: (found[config].mean, config))
    ends = [math.exp(found[best].low), math.exp(found[best].high)]
    return {"best_candidate": {"config": best, "speedup": math.exp(found[best].mean), "ci95": ends}}


def states_of(policy: Policy) -> dict[Cell, State]:
    """The states that the tuner gave the cells of a policy."""
    return {row.cell: (row.state, row.reason) for row in policy.table}
