"""What verification found out about ranks: counts that pool over rounds, trees, runs and machines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..records import TreeShape

SCHEMA = "specdec_lab.rank_counts/1"


@dataclass(frozen=True, slots=True)
class Survival:
    """Chance that the first k children of an examined node are all rejected, k = 1.., and its standard error."""

    chances: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """Outcomes at examined nodes, by their number of children.

    examined  examined[m][k]: nodes with m children whose k-th child was accepted, k = 1..m; examined[m][0]: none was.
              A node is examined if it is the root or was accepted, has children, and its round was not cut there
    `a + b` pools; `from_dict(to_dict())` is the same counts.
    """

    examined: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = {children: tuple(self.examined[children]) for children in sorted(self.examined)}
        for children, outcomes in rows.items():
            if not isinstance(children, int) or children < 1:
                raise ValueError(f"Counts: an examined node has at least 1 child, got {children!r} children")
            if len(outcomes) != children + 1:
                raise ValueError(
                    f"Counts: a node with {children} children has {children + 1} outcomes (none, rank 1..{children}), "
                    f"got {len(outcomes)}"
                )
            if not all(isinstance(count, int) and count >= 0 for count in outcomes):
                raise ValueError(f"Counts of nodes with {children} children must be whole and not negative, got {outcomes}")
        object.__setattr__(self, "examined", MappingProxyType(rows))

    @property
    def num_nodes(self) -> int:
        """All examined nodes."""
        return sum(map(sum, self.examined.values()))

    @property
    def ranks(self) -> int:
        """Children of the widest examined node."""
        return max((children for children, outcomes in self.examined.items() if any(outcomes)), default=0)

    def accepted(self, rank: int) -> int:
        """Nodes whose child of this rank was accepted."""
        return sum(outcomes[rank] for children, outcomes in self.examined.items() if children >= rank)

    def at_risk(self, rank: int) -> int:
        """Nodes with a child of this rank whose children before it were all rejected."""
        return sum(o[0] + sum(o[rank:]) for children, o in self.examined.items() if children >= rank)

    def survival(self) -> Survival:
        """Kaplan and Meier's estimate with Greenwood's error: a node with m children says nothing on ranks above m.

        It ends before the first rank that no node put to the test.
        """
        chances: list[float] = []
        errors: list[float] = []
        alive, spread = 1.0, 0.0
        for rank in range(1, self.ranks + 1):
            tested, accepted = self.at_risk(rank), self.accepted(rank)
            if tested == 0:
                break
            before, alive = alive, alive * (1 - accepted / tested)
            if accepted < tested:
                spread += accepted / (tested * (tested - accepted))
            chances.append(alive)
            # nobody survived: one survivor would have been 1/tested
            errors.append(alive * math.sqrt(spread) if alive else before / tested)
        return Survival(tuple(chances), tuple(errors))

    def vector(self) -> tuple[float, ...]:
        """The empirical (p_1, p_2, ...): as noisy as the counts, right where no two-parameter law fits."""
        chances = (1.0, *self.survival().chances)
        return tuple(before - after for before, after in zip(chances, chances[1:], strict=False))

    def __add__(self, other: Counts) -> Counts:
        """Both, pooled: narrow and wide trees add up, since p_k does not depend on the number of children."""
        if not isinstance(other, Counts):
            return NotImplemented
        pooled = dict(self.examined)
        for children, outcomes in other.examined.items():
            known = pooled.get(children, (0,) * (children + 1))
            pooled[children] = tuple(a + b for a, b in zip(known, outcomes, strict=True))
        return Counts(pooled)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"schema": SCHEMA, "examined": {str(children): list(o) for children, o in self.examined.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """The inverse of to_dict; ValueError says what is wrong with other data."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"rank counts have schema {SCHEMA!r}, got {data.get('schema')!r}")
        examined = data.get("examined")
        if not isinstance(examined, Mapping) or not all(isinstance(outcomes, list) for outcomes in examined.values()):
            raise ValueError(f"rank counts need 'examined', an object of lists by number of children, got {examined!r}")
        return cls({int(children): tuple(outcomes) for children, outcomes in examined.items()})


@dataclass(frozen=True, slots=True)
class Walk:
    """The accepted path of one sequence in one round.

    ranks  rank of the accepted child at depth 1, 2, ...; empty if none was accepted
    cut    the sequence ended on this path (end of text, length limit), so its last node was never examined
    """

    ranks: tuple[int, ...]
    cut: bool = False


def rank_counts(walks: Iterable[Walk], tree: TreeShape) -> tuple[Counts, ...]:
    """Counts by depth: entry d is about the nodes of depth d (0 is the root) and their children. `sum(found, Counts())` pools.

    tree  the tree that all these walks went down; ValueError where a walk leaves it
    """
    children: list[list[int]] = [[] for _ in range(tree.num_nodes + 1)]
    for node, parent in enumerate(tree.parents):
        children[parent + 1].append(node + 1)  # the root is 0 here
    tallies: list[dict[int, list[int]]] = [{} for _ in range(tree.depth)]
    for walk in walks:
        node = 0
        for depth, rank in enumerate(_outcomes(walk)):
            num = len(children[node])
            if num == 0 and rank == 0:
                break  # an accepted leaf has nothing to examine
            if not 0 <= rank <= num:
                raise ValueError(f"walk {walk.ranks} takes child {rank} at depth {depth + 1}, the tree has {num} there")
            tallies[depth].setdefault(num, [0] * (num + 1))[rank] += 1
            if rank:
                node = children[node][rank - 1]
    return tuple(Counts({num: tuple(outcomes) for num, outcomes in tally.items()}) for tally in tallies)


def _outcomes(walk: Walk) -> Sequence[int]:
    """The accepted ranks, then 0 for the node where all children were rejected."""
    if any(rank < 1 for rank in walk.ranks):
        raise ValueError(f"walk {walk.ranks} holds a rank below 1; a walk ends where no child was accepted")
    return walk.ranks if walk.cut else (*walk.ranks, 0)
