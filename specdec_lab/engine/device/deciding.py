"""Choosing drafts and accepting a path on the device: the functions of verify.py and tree_verify.py that ask the host nothing.

The same laws, the same noise, so the same tokens as a session on the host. Not known here: models, caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.runner import Scores
from ..sampling import Noise, Processor
from ..tree_layout import Layout
from ..tree_verify import Step, children_of, choose_children, matching, testing, walk
from ..verify import Decision, Proposal, choose_draft, decide
from .program import Program


@dataclass(frozen=True, slots=True)
class Rules:
    """How tokens are chosen: constants of a session, so constants of its graphs."""

    processor: Processor
    verifier: str
    noise: Noise


def draft_level(
    rules: Rules, program: Program, level: int, scores: Tensor, committed: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """From draft logits [B, K, V] of a level: its tokens [B, children], the laws they were drawn from, the tokens fed next."""
    layout, position, made = program.layout, committed + level + 1, Scores(scores)
    if layout is None:
        token, law = choose_draft(made, position, rules.processor, rules.verifier, rules.noise)
        return token[:, None], None if law is None else law[:, None], token[:, None]
    here = layout.levels[level]
    chosen, law = choose_children(made, here.most, position, rules.processor, rules.verifier, rules.noise)
    tokens = chosen.flatten(1).index_select(1, here.pick)
    return tokens, law, tokens if here.feed is None else tokens.index_select(1, here.feed)


def accept(rules: Rules, program: Program, tokens: Tensor, law: Tensor | None, scores: Tensor, committed: Tensor) -> Decision:
    """The accepted path given target logits [B, N+1, V] at root and drafts [B, N]."""
    counts = torch.full_like(committed, program.num_nodes)
    proposal, made, first = Proposal(tokens, counts, law, program.layout), Scores(scores), committed + 1
    if program.layout is None:
        return decide(proposal, made, first, rules.processor, rules.verifier, rules.noise)
    if rules.processor.is_greedy:
        step = _arg_max(proposal, program.layout, made.best)
    elif rules.verifier == "coupled" or law is None:
        step = matching(proposal, program.layout, made, first, rules.processor, rules.noise)
    else:
        step = testing(proposal, program.layout, law, made, first, rules.processor, rules.noise)
    return walk(program.layout, step, counts)


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
