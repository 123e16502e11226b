"""Forced acceptance: how many drafts are accepted is decided by chance, everything else runs as always.

For timing with weights that are random, or at an acceptance that no model here has. Drafting, scoring, laws and the tests of
the real acceptance are all computed; only their answer is replaced. Tokens mean nothing, and every header is labelled.
Randomness is by counter (seed, sequence, position), so forcing depends neither on the batch nor on the schedule.
Not known here: models, caches, records.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import FORCED, ParseError, TreeShape, UnsupportedConfig


@dataclass(frozen=True, slots=True)
class Forced:
    """What acceptance is forced to. Spelled `0.8`, `marginals:0.8,0.6`, `ranks:0.6,0.2`.

    alpha      each tested draft is accepted with this chance; of a tree, children are tested in order
    marginals  of a chain: chance that positions 0..i are all accepted, non-increasing
    ranks      chance that the k-th child of an accepted node is the accepted one; disjoint, so their sum is at most 1
    """

    kind: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("alpha", "marginals", "ranks"):
            raise ValueError(f"Forced.kind must be alpha, marginals or ranks, got {self.kind!r}")
        if not self.values or (self.kind == "alpha" and len(self.values) != 1):
            raise ValueError(f"{'alpha is one chance' if self.kind == 'alpha' else 'a chance is needed'}, got {self.values}")
        if not all(0 <= value <= 1 for value in self.values):
            raise ValueError(f"a chance lies in [0, 1], got {self.values}")
        if self.kind == "marginals" and list(self.values) != sorted(self.values, reverse=True):
            raise ValueError(f"marginals never rise along a chain, got {self.values}")
        if self.kind == "ranks" and sum(self.values) > 1 + 1e-9:
            raise ValueError(f"at most one child is accepted, so chances by rank sum to at most 1, got {sum(self.values)}")

    def __str__(self) -> str:
        words = ",".join(f"{value:g}" for value in self.values)
        return words if self.kind == "alpha" else f"{self.kind}:{words}"

    @classmethod
    def parse(cls, text: str) -> Forced:
        """Read `0.8`, `marginals:0.8,0.6` or `ranks:0.6,0.2`."""
        kind, colon, numbers = text.strip().rpartition(":")
        try:
            values = tuple(float(number) for number in numbers.split(","))
        except ValueError:
            values = ()
        if not values or (colon and kind not in ("marginals", "ranks")):
            raise ParseError(f"forced acceptance {text!r} is none of: ALPHA (0.8), marginals:0.8,0.6 or ranks:0.6,0.2")
        try:
            return cls(kind or "alpha", values)
        except ValueError as error:
            raise ParseError(f"forced acceptance {text!r}: {error}") from None

    @property
    def label(self) -> str:
        """What headers, titles and exports say."""
        return f"{FORCED} {'alpha ' if self.kind == 'alpha' else ''}{self}"

    def check(self, tree: TreeShape) -> None:
        """Raise UnsupportedConfig if these chances say nothing of this tree."""
        if self.kind == "marginals" and not tree.is_chain:
            raise UnsupportedConfig(f"forced marginals are those of a chain, {tree} branches. Force ranks or one alpha.")
        if self.kind == "marginals" and tree.depth > len(self.values):
            raise UnsupportedConfig(f"{len(self.values)} forced marginals say nothing of position {tree.depth} of {tree}. "
                                    "Give one per drafted position.")

    def chances(self, depth: int) -> list[float]:
        """Of each position of a chain: accepted, given all before it were."""
        if self.kind != "marginals":
            return [self.values[0]] * depth
        given = (1.0, *self.values)
        return [after / before if before else 0.0 for before, after in zip(given, self.values, strict=False)][:depth]

    def ranks(self, most: int) -> list[float]:
        """Chance that the accepted child of a node is among its first k, for k = 1..most."""
        if self.kind == "alpha":
            return [1 - (1 - self.values[0]) ** k for k in range(1, most + 1)]
        return [min(sum(self.values[:k]), 1.0) for k in range(1, most + 1)]


def forced_accept(uniforms: Tensor, alpha: Tensor | float, counts: Tensor) -> Tensor:
    """How many drafts of a chain are accepted, per row.

    uniforms  [B, N] in [0, 1), one per drafted position; alpha: chance of each position [N], or one for all
    counts    [B] drafted tokens of each row
    returns   [B] int64, 0..counts. No host decision, so a captured graph can hold it.
    """
    order = torch.arange(uniforms.shape[1], device=uniforms.device)
    return ((uniforms < alpha) & (order < counts[:, None])).long().cumprod(1).sum(1)


def forced_ranks(uniforms: Tensor, within: Tensor) -> Tensor:
    """Which child is the accepted one: uniforms [...], within [K] = Forced.ranks -> 1..K, or 0 for none."""
    rank = (uniforms[..., None] >= within).sum(-1) + 1
    return torch.where(rank > within.shape[0], 0, rank)
