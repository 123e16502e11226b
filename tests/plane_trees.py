"""All ordered trees of a few nodes, evaluated in exact arithmetic: the oracle of the tree search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import cache

from specdec_lab.records import TreeShape

Plane = tuple["Plane", ...]  # a tree is the tuple of its children
Rows = Callable[[int], Sequence[Fraction]]  # depth (children of the root: 1) -> chances by rank


@cache
def forests(nodes: int) -> tuple[tuple[Plane, ...], ...]:
    if nodes == 0:
        return ((),)
    return tuple((first, *rest) for size in range(1, nodes + 1) for first in trees(size) for rest in forests(nodes - size))


def trees(nodes: int) -> tuple[Plane, ...]:
    """All trees of exactly so many nodes, root counted."""
    return forests(nodes - 1)


def small_trees(nodes: int, levels: int) -> Iterator[Plane]:
    """All trees of at most so many nodes and levels, root counted."""
    return (tree for size in range(1, nodes + 1) for tree in trees(size) if num_levels(tree) <= levels)


def num_nodes(tree: Plane) -> int:
    return 1 + sum(map(num_nodes, tree))


def num_levels(tree: Plane) -> int:
    return 1 + max(map(num_levels, tree), default=0)


def value(tree: Plane, rows: Rows, depth: int = 1) -> Fraction:
    """F(tree) by its recursion; a rank or depth without a chance is never accepted."""
    chances = rows(depth) if tree else ()
    return 1 + sum((p * value(child, rows, depth + 1) for p, child in zip(chances, tree, strict=False)), Fraction(0))


def best_value(rows: Rows, nodes: int, levels: int) -> Fraction:
    return max(value(tree, rows) for tree in small_trees(nodes, levels))


def plane(shape: TreeShape) -> Plane:
    """The same tree, nested."""
    children: list[list[int]] = [[] for _ in range(shape.num_nodes + 1)]
    for node, parent in enumerate(shape.parents):
        children[parent + 1].append(node + 1)

    def nested(node: int) -> Plane:
        return tuple(nested(child) for child in children[node])

    return nested(0)


def exact_rows(acceptance: Sequence[float] | Sequence[Sequence[float]]) -> Rows:
    """The very numbers of a vector or matrix of floats, as fractions."""
    if isinstance(acceptance[0], float):
        vector = [Fraction(chance) for chance in acceptance]
        return lambda depth: vector
    table = [[Fraction(chance) for chance in row] for row in acceptance]  # type: ignore[union-attr]
    return lambda depth: table[depth - 1] if depth <= len(table) else []
