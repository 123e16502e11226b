"""What one level of the way down a drafted tree means, in float64. cpu.py computes the same; same arguments, same order.

Nodes are numbered breadth-first from the root, 0, so how many children each has is the whole tree; the token of node v is
tokens[:, v - 1]. Numbers that decide: noise/reference.py. Not known here: how laws came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.reference import gumbel_argmax, uniform


@dataclass(frozen=True, slots=True)
class Purposes:
    """What random numbers decide: the target's own draw, a test, the token after all tests have failed."""

    target: int
    accept: int
    residual: int


@dataclass(slots=True)
class Walk:
    """Rows on their way down a tree of `depth` levels.

    tokens, exists  [B, N] int64 and bool: drafted tokens, and which of them a row has (None: all)
    children        how many children each of the nodes 0..N has
    drawn_from      float32 [B, nodes with children, V] what children were drawn from, in draw order without replacement; they
                    are tested one after the other (Sequoia 2024, section 3.2). None: the target draws (Gumbel-max), and the
                    child that equals its token is accepted; siblings differ
    first           [B] int64 position of the first token that the walk decides
    node            [B] where each row stands
    made            [B, 3 * depth + 2] int64: how many nodes are accepted; they, and which child of its parent each is (1 is
                    the first); the tokens emitted: the accepted ones, then one more. Zero beyond that
    """

    tokens: Tensor
    exists: Tensor | None
    children: tuple[int, ...]
    depth: int
    drawn_from: Tensor | None
    seed: int
    sequences: Tensor
    first: Tensor
    purposes: Purposes
    node: Tensor
    made: Tensor
    level: int = 0

    def step(self, law: Tensor) -> bool:
        """Decide one level, given the target's law [B, V] at every row's node; whether any row descends."""
        rows = [row for row in range(len(self.made)) if self.made[row, 0] == self.level]
        descends = [self._step(row, law[row]) for row in rows]
        self.level += 1
        return any(descends)

    def _step(self, row: int, law: Tensor) -> bool:
        node = int(self.node[row])
        first_child = 1 + sum(self.children[:node])
        family = range(first_child, first_child + self.children[node])
        there = [child for child in family if self.exists is None or self.exists[row, child - 1]]
        child, token = self._match(row, law, there) if self.drawn_from is None else self._test(row, law, node, family, there)
        self.made[row, 1 + 2 * self.depth + self.level] = token
        if child:
            self.node[row] = child
            self.made[row, 0], self.made[row, 1 + self.level] = self.level + 1, child
            self.made[row, 1 + self.depth + self.level] = child - first_child + 1
        return child > 0

    def _match(self, row: int, law: Tensor, there: list[int]) -> tuple[int, int]:
        position, whose = self.first[row].view(1, 1) + self.level, self.sequences[row : row + 1]
        token = int(gumbel_argmax(law[None, None], self.seed, whose, position, self.purposes.target))
        return next((child for child in there if self.tokens[row, child - 1] == token), 0), token

    def _test(self, row: int, law: Tensor, node: int, family: range, there: list[int]) -> tuple[int, int]:
        assert self.drawn_from is not None
        left = law.double() / law.double().sum()
        fed = sum(number > 0 for number in self.children[:node])
        offered = self.drawn_from[row, fed].double().clone() if family else left
        for lane, child in enumerate(family):
            token = int(self.tokens[row, child - 1])
            if child in there and offered[token] > 0:
                offered = offered / offered.sum()
                rest = (left - offered).clamp(min=0)
                if left[token] > 0 and (self._uniform(row, self.purposes.accept, lane) * offered[token] < left[token]
                                        or rest.sum() <= 0):  # fmt: skip
                    return child, token
                left = rest / rest.sum() if rest.sum() > 0 else left
            offered[token] = 0.0
        cumulative = left.cumsum(0)
        wanted = self._uniform(row, self.purposes.residual, 0) * cumulative[-1:]
        return 0, min(int(torch.searchsorted(cumulative, wanted, right=True)), len(left) - 1)

    def _uniform(self, row: int, purpose: int, lane: int) -> Tensor:
        return uniform(self.seed, self.sequences[row : row + 1], self.first[row : row + 1] + self.level, purpose, lane)[0]


def start(
    tokens: Tensor, exists: Tensor | None, children: tuple[int, ...], depth: int, drawn_from: Tensor | None, seed: int,
    sequences: Tensor, first: Tensor, purposes: Purposes,
) -> Walk:  # fmt: skip
    """All rows at the root. See Walk."""
    made = torch.zeros(tokens.shape[0], 3 * depth + 2, dtype=torch.int64)
    at = torch.zeros_like(first)
    return Walk(tokens, exists, children, depth, drawn_from, seed, sequences, first, purposes, at, made)
