"""Acceptance as counts over row-rounds, and the rates that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from ..records import Run, SpecConfig, StepRecord


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts over row-rounds that drafted and were not cut by end of text or length limit; all rates derive from them.

    histogram[j]   row-rounds that accepted exactly j drafted tokens, j = 0..K; K is the deepest draft. Valid for trees
    drafted_at[i]  row-rounds whose draft reached position i (0 = first drafted token)
    at_risk[i]     row-rounds whose draft reached position i and that accepted all positions before it
    """

    histogram: tuple[int, ...]
    drafted_at: tuple[int, ...]
    at_risk: tuple[int, ...]
    num_draft_tokens: int

    @property
    def num_spec_steps(self) -> int:
        """Row-rounds that were counted."""
        return sum(self.histogram)

    @property
    def num_accepted_draft_tokens(self) -> int:
        """Accepted drafted tokens, bonus not counted."""
        return sum(j * count for j, count in enumerate(self.histogram))

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted/steps, bonus included; 1.0 where nothing was drafted."""
        return 1 + self.num_accepted_draft_tokens / max(self.num_spec_steps, 1)

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Accepted/proposed; tokens after the first miss count as rejected. None where nothing was proposed."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def _accepted_at(self) -> tuple[int, ...]:
        return tuple(sum(self.histogram[i + 1 :]) for i in range(len(self.drafted_at)))

    @property
    def acceptance_rate_per_pos(self) -> tuple[float, ...]:
        """Marginal: of the row-rounds that drafted position i, the share that accepted positions 0..i.

        Non-increasing while all rows draft equally deep. Positions that nobody drafted are left out.
        """
        return tuple(a / n for a, n in zip(self._accepted_at, self.drafted_at, strict=True) if n)

    @property
    def conditional_acceptance(self) -> tuple[float, ...]:
        """Hazard: of the row-rounds that reached position i, the share that accepted it.

        Equal to the ratio of neighbouring marginals while all rows draft equally deep, and a probability also where
        they do not. Positions that nobody reached are left out.
        """
        return tuple(a / n for a, n in zip(self._accepted_at, self.at_risk, strict=True) if n)

    @property
    def alpha_censored(self) -> float | None:
        """Accepted / (accepted + row-rounds with a rejection): maximum likelihood of an i.i.d. acceptance."""
        examined = sum(self.at_risk)
        return self.num_accepted_draft_tokens / examined if examined else None

    @property
    def system_efficiency(self) -> float | None:
        """Emitted / (steps * (K+1)): how much of the longest possible yield was had."""
        full = self.num_spec_steps * len(self.histogram)
        return (self.num_accepted_draft_tokens + self.num_spec_steps) / full if full else None


@lru_cache(maxsize=256)
def _depths(config: str) -> tuple[int, ...]:
    """Depth of every node that a configuration can draft."""
    tree = SpecConfig.parse(config).tree
    return tree.depths if tree else ()


def _reached(step: StepRecord, row: int) -> int:
    """Depth of the deepest node that a row drafted; -1 where its configuration has no such nodes."""
    depths, nodes = _depths(step.config), step.nodes[row] if step.nodes else range(step.drafted[row])
    return max(depths[n] for n in nodes) if max(nodes) < len(depths) else -1


def _outcomes(step: StepRecord) -> Iterable[tuple[int, int, int, int]]:
    """(row, reached depth, accepted, drafted nodes) of the rows that drafted, are live and were not cut."""
    for row, (nodes, accepted) in enumerate(zip(step.drafted, step.accepted, strict=True)):
        if nodes and step.tokens[row] and not step.censored[row]:
            reached = _reached(step, row)
            if accepted > reached:
                raise ValueError(
                    f"step {step.index}, row {row}: {step.config!r} cannot draft {nodes} nodes and accept {accepted}; "
                    "the record does not belong to its configuration"
                )
            yield row, reached, accepted, nodes


def acceptance(steps: Iterable[StepRecord]) -> Acceptance:
    """Acceptance counts of these steps, pooled over rows; prefills, frozen and censored rows are left out."""
    outcomes: list[tuple[int, int, int]] = []
    most = 0
    for step in steps:
        if step.kind == "round":
            found = [o[1:] for o in _outcomes(step)]
            most = max(most, *_depths(step.config)) if found else most
            outcomes += found
    histogram, drafted_at, at_risk = [0] * (most + 1 if most else 0), [0] * most, [0] * most
    for depth, accepted, _ in outcomes:
        histogram[accepted] += 1
        for i in range(depth):
            drafted_at[i] += 1
            at_risk[i] += accepted >= i
    return Acceptance(tuple(histogram), tuple(drafted_at), tuple(at_risk), sum(o[2] for o in outcomes))


def request_acceptance_lengths(run: Run) -> tuple[float | None, ...]:
    """Mean acceptance length per row, None for a row that never drafted; their mean is not the pooled one."""
    lengths: list[list[int]] = [[] for _ in range(run.header.cell.batch)]
    for step in run.rounds:
        for row, _, accepted, _ in _outcomes(step):
            lengths[row].append(accepted)
    return tuple(1 + sum(row) / len(row) if row else None for row in lengths)
