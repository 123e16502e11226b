"""Choosing drafts and accepting a path on the device: in torch (here), and by the kernels of a round (kernel_deciding.py).

Both hold the same laws and use the same noise, so they emit the tokens of a session on the host. The torch side is the
functions of verify.py and tree_verify.py as far as they ask the host nothing. Not known here: models, caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.runner import Scores
from ..sampling import Noise, Processor
from ..tree_layout import Layout
from ..tree_verify import Step, children_of, choose_children, matching, testing, walk
from ..verify import Decision, Proposal, choose_draft, decide_chain
from .program import Program


@dataclass(frozen=True, slots=True)
class Drafted:
    """What one draft forward gave.

    tokens  [B, children]; fed [B, nodes with children] of them
    counts  [B] how many of a chain's tokens a row has, the others are padding; None: all
    law     [B, K, V] what they were drawn from (rejection only): probabilities, or the logits that kernels read
    lse, logprob  [B, K] and [B, children] of those logits
    """

    tokens: Tensor
    fed: Tensor
    law: Tensor | None = None
    lse: Tensor | None = None
    logprob: Tensor | None = None
    counts: Tensor | None = None


class Deciding(Protocol):
    """How tokens are chosen: constants of a session, so constants of its graphs."""

    def draft(self, program: Program, level: int, scores: Tensor, committed: Tensor) -> Drafted:
        """From draft logits [B, K, V] of the fed nodes of a level: their children."""

    def accept(
        self, program: Program, drafted: Sequence[Drafted], scores: Tensor, committed: Tensor, forced: Tensor | None = None
    ) -> Decision:
        """The accepted path given target logits [B, N+1, V] at root and drafts. forced [B]: how many of a chain instead."""


def together(drafted: Sequence[Drafted], committed: Tensor) -> Tensor:
    """The drafted tokens [B, N] of all levels, in the order of their nodes."""
    return torch.cat([level.tokens for level in drafted], 1) if drafted else committed[:, None][:, :0]


def counts_of(program: Program, drafted: Sequence[Drafted], committed: Tensor) -> Tensor:
    """[B] how many nodes every row has."""
    given = drafted[0].counts if drafted else None
    return torch.full_like(committed, program.num_nodes) if given is None else given


def fed_next(program: Program, level: int, tokens: Tensor) -> Tensor:
    """Those of a level's tokens that the next forward feeds."""
    if program.layout is None:
        return tokens
    feed = program.layout.levels[level].feed
    return tokens if feed is None else tokens.index_select(1, feed)


@dataclass(frozen=True, slots=True)
class TorchDeciding:
    """The meaning, on any device."""

    processor: Processor
    verifier: str
    noise: Noise

    def draft(self, program: Program, level: int, scores: Tensor, committed: Tensor) -> Drafted:
        """See Deciding.draft."""
        position, made = committed + level + 1, Scores(scores)
        if program.layout is None:
            token, law = choose_draft(made, position, self.processor, self.verifier, self.noise)
            return Drafted(token[:, None], token[:, None], None if law is None else law[:, None])
        here = program.layout.levels[level]
        chosen, law = choose_children(made, here.most, position, self.processor, self.verifier, self.noise)
        tokens = chosen.flatten(1).index_select(1, here.pick)
        return Drafted(tokens, fed_next(program, level, tokens), law)

    def accept(
        self, program: Program, drafted: Sequence[Drafted], scores: Tensor, committed: Tensor, forced: Tensor | None = None
    ) -> Decision:
        """See Deciding.accept."""
        laws = [level.law for level in drafted if level.law is not None]
        law = torch.cat(laws, 1) if laws else None
        counts, layout, first = counts_of(program, drafted, committed), program.layout, committed + 1
        proposal = Proposal(together(drafted, committed), counts, law, layout, is_plain=not program.depth)
        made = Scores(scores)
        if layout is None:
            return decide_chain(proposal, made, first, self.processor, self.verifier, self.noise, forced)
        if self.processor.is_greedy:
            step = _arg_max(proposal, layout, made.best)
        elif self.verifier == "coupled" or law is None:
            step = matching(proposal, layout, made, first, self.processor, self.noise)
        else:
            step = testing(proposal, layout, law, made, first, self.processor, self.noise, None)
        return walk(layout, step, counts)


def _arg_max(proposal: Proposal, layout: Layout, best: Tensor) -> Step:
    """Emit the target's arg-max behind a node, best [B, N+1], and descend to the child that equals it."""

    def step(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        token = best.gather(1, node[:, None])[:, 0]
        if layout.widest[depth] == 0:
            return torch.zeros_like(token), token
        children, exists = children_of(proposal, layout, node, depth)
        equal = exists & (children == token[:, None])
        return torch.where(equal.any(1), equal.to(torch.int8).argmax(1) + 1, 0), token

    return step
