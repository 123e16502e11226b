"""Forced acceptance on the device: everything is drafted, scored and tested as always, then chance says how much was accepted.

The same counts as on the host (forced.py), keyed by position. What the tokens say means nothing. Not known here: models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..forced import Forced, forced_accept, forced_ranks
from ..sampling import Noise, Purpose
from ..verify import Decision
from .deciding import Deciding, Drafted, counts_of, together
from .program import Key, Program


@dataclass(frozen=True, slots=True)
class ForcedDeciding:
    """Another way of deciding, its answer replaced."""

    inner: Deciding
    forced: Forced
    noise: Noise
    # made in the rehearsal of a graph, never in its capture
    _chances: dict[Key, Tensor] = field(default_factory=dict)

    def draft(self, program: Program, level: int, scores: Tensor, committed: Tensor) -> Drafted:
        """See Deciding.draft."""
        return self.inner.draft(program, level, scores, committed)

    def accept(
        self, program: Program, drafted: Sequence[Drafted], scores: Tensor, committed: Tensor, forced: Tensor | None = None
    ) -> Decision:
        """See Deciding.accept."""
        assert forced is None  # nobody else forces
        if not program.depth:
            return self.inner.accept(program, drafted, scores, committed)
        chances, order = self._chances_of(program, committed.device), torch.arange(program.depth, device=committed.device)
        uniforms = self.noise.uniform(committed[:, None] + 1 + order, Purpose.FORCE)
        if program.layout is None:
            count = forced_accept(uniforms, chances, counts_of(program, drafted, committed))
            return self.inner.accept(program, drafted, scores, committed, count)
        made, tokens = self.inner.accept(program, drafted, scores, committed), together(drafted, committed)
        path, ranks, count = _descend(program.layout.child_table, forced_ranks(uniforms, chances))
        return Decision(count, _emitted(tokens.gather(1, (path - 1).clamp(min=0)), made, count), path, ranks)

    def _chances_of(self, program: Program, device: torch.device) -> Tensor:
        if program.key not in self._chances:
            layout = program.layout
            values = self.forced.chances(program.depth) if layout is None else self.forced.ranks(max(layout.widest))
            self._chances[program.key] = torch.tensor(values, dtype=torch.float64, device=device)
        return self._chances[program.key]


def _emitted(along: Tensor, made: Decision, count: Tensor) -> Tensor:
    """[B, depth + 1] the accepted drafts, then what the real decision says there."""
    order = torch.arange(along.shape[1] + 1, device=along.device)
    drafts = torch.cat([along, along[:, :1]], 1)
    return torch.where(order < count[:, None], drafts, made.tokens)


def _descend(child_table: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Path and ranks [B, depth], and how far they go [B]: at each depth the wanted child (0: none) is taken if it is there."""
    node = torch.zeros_like(wanted[:, 0])
    on = torch.ones_like(node, dtype=torch.bool)
    path, ranks = [], []
    for depth in range(wanted.shape[1]):
        rank = wanted[:, depth]
        child = child_table[node].gather(1, (rank - 1).clamp(0, child_table.shape[1] - 1)[:, None])[:, 0]
        on = on & (rank > 0) & (rank <= child_table.shape[1]) & (child >= 0)
        node = torch.where(on, child, node)
        path.append(torch.where(on, child, 0))
        ranks.append(torch.where(on, rank, 0))
    ranked = torch.stack(ranks, 1)
    return torch.stack(path, 1), ranked, (ranked > 0).sum(1)
