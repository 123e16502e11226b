"""What a tree yields: the chance of every node, and the expected tokens of a round."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

from ..records import TreeShape
from .acceptance import Acceptance, RankChances


def path_chances(tree: TreeShape, acceptance: RankChances | Acceptance) -> tuple[float, ...]:
    """f(v) of every drafted node: the chance that it is on the accepted path, the product of p over its path's ranks.

    acceptance  rank vector [K] or depth x rank matrix [D, K]; ValueError where the tree goes beyond it
    """
    known = Acceptance.of(acceptance)
    siblings: Counter[int] = Counter()
    chances: list[float] = []
    for node, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        siblings[parent] += 1
        if depth >= known.max_levels:
            raise ValueError(f"node {node} has depth {depth}, acceptance is known to depth {known.max_levels - 1}: add a row")
        row, rank = known.row(depth), siblings[parent]
        if rank > len(row):
            raise ValueError(
                f"node {node} is child {rank} of its parent, acceptance is known for {len(row)} ranks; "
                "add its chance (0 if it is never accepted)"
            )
        chances.append((1.0 if parent < 0 else chances[parent]) * row[rank - 1])
    return tuple(chances)


def expected_tokens(tree: TreeShape | None, acceptance: RankChances | Acceptance) -> float:
    """F(tree): expected tokens of a round, the sum of f(v) over all nodes; the root counts 1, the bonus token.

    tree        None is plain decoding: 1 token
    acceptance  rank vector [K] or depth x rank matrix [D, K]; ValueError where the tree goes beyond it
    Source: Sequoia (Chen 2024), section 3.1.
    """
    known = Acceptance.of(acceptance)
    return math.fsum((1.0, *path_chances(tree, known))) if tree is not None else 1.0


def breadth_first(children: Sequence[Sequence[int]]) -> TreeShape | None:
    """The tree whose node v (root 0) has these children, in rank order, renumbered breadth-first; None for a root alone."""
    parents: list[int] = []
    queue = deque([(0, -1)])
    while queue:
        node, name = queue.popleft()
        for child in children[node]:
            queue.append((child, len(parents)))
            parents.append(name)
    return TreeShape(tuple(parents)) if parents else None


def level_widths(tree: TreeShape) -> tuple[int, ...]:
    """Nodes with children at every level but the last: the query tokens of each of the D-1 draft forwards."""
    depths = (0, *tree.depths)
    widths = Counter(depths[parent + 1] for parent in set(tree.parents))
    return tuple(widths[level] for level in range(tree.depth))
