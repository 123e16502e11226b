"""Deciding among ranks: every choice made of logits is the first rank's, in one small message per forward.

So ranks cannot come to different texts, whatever the last bits of their sums or of a draft network that each holds whole.
What a choice was drawn from stays each rank's own: only the first one's acceptance counts. See models/groups.py for why. Not
known here: how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.groups import Group
from ..verify import Decision
from .deciding import Deciding, Drafted, fed_next
from .program import Program


@dataclass(frozen=True, slots=True)
class FirstRankDecides:
    """Another way of deciding, its answers those of the first rank."""

    inner: Deciding
    group: Group

    def draft(self, program: Program, level: int, scores: Tensor, committed: Tensor) -> Drafted:
        """See Deciding.draft."""
        made = self.inner.draft(program, level, scores, committed)
        tokens = self.group.of_first(made.tokens)
        return replace(made, tokens=tokens, fed=fed_next(program, level, tokens))

    def accept(
        self, program: Program, drafted: Sequence[Drafted], scores: Tensor, committed: Tensor, forced: Tensor | None = None
    ) -> Decision:
        """See Deciding.accept."""
        made = self.inner.accept(program, drafted, scores, committed, forced)
        parts = [p for p in (made.num_accepted[:, None], made.tokens, made.path, made.ranks) if p is not None]
        agreed = self.group.of_first(torch.cat([part.long() for part in parts], 1))
        count, tokens, *more = agreed.split([part.shape[1] for part in parts], 1)
        return Decision(count[:, 0], tokens, *more)
