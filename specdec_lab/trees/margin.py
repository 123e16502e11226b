"""The marginal rule for single nodes: a node pays if f(v) > (Omega / T_step) * its marginal time (algorithms.md 1.1).

Beside a chosen tree stand two of them: the least likely node that it keeps, and the likeliest one that it leaves out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from ..records import MAX_NODES, TreeShape
from .acceptance import Acceptance
from .shape import path_chances


@dataclass(frozen=True, slots=True)
class Margin:
    """One node: f(v), its chance to be on the accepted path, and the tokens that its time yields at the pace of the choice."""

    chance: float
    worth: float

    @property
    def pays(self) -> bool:
        """Whether it adds more tokens than its time is worth."""
        return self.chance > self.worth


Added = Callable[[TreeShape | None, int], float | None]  # (tree, nodes it is verified at) -> its round in plain steps


def last_kept(tree: TreeShape | None, known: Acceptance, pace: float, round_of: Added) -> Margin | None:
    """The least likely node of the tree; None for plain decoding, and where nothing smaller was timed."""
    if tree is None:
        return None
    chances = path_chances(tree, known)
    leaves = set(range(tree.num_nodes)) - set(tree.parents)
    last = min(leaves, key=lambda node: (chances[node], -node))
    return _margin(chances[last], pace, round_of(tree, 0), round_of(_without(tree, last), -1))


def first_left_out(tree: TreeShape | None, known: Acceptance, levels: int, pace: float, round_of: Added) -> Margin | None:
    """The likeliest node that the tree has not, within `levels`; None where there is none, or nothing larger was timed."""
    found = _likeliest(tree, known, levels)
    if found is None or (tree is not None and tree.num_nodes >= MAX_NODES):
        return None
    chance, parent = found
    larger = TreeShape((*(tree.parents if tree else ()), parent))
    return _margin(chance, pace, round_of(larger, 1), round_of(tree, 0))


def _margin(chance: float, pace: float, longer: float | None, shorter: float | None) -> Margin | None:
    return None if longer is None or shorter is None else Margin(chance, pace * (longer - shorter))


def _likeliest(tree: TreeShape | None, known: Acceptance, levels: int) -> tuple[float, int] | None:
    """(f, parent) of the likeliest next child of any node, the root (-1) among them."""
    chances, depths = {-1: 1.0}, {-1: 0}
    if tree is not None:
        chances |= dict(enumerate(path_chances(tree, known)))
        depths |= dict(enumerate(tree.depths))
    children = Counter(tree.parents if tree else ())
    options = []
    for node, depth in depths.items():
        row = known.useful(depth + 1) if depth + 1 < min(levels, known.max_levels) else ()
        if children[node] < len(row):
            options.append((chances[node] * row[children[node]], -node))
    if not options:
        return None
    chance, negative = max(options)
    return chance, -negative


def _without(tree: TreeShape, leaf: int) -> TreeShape | None:
    """The tree less one leaf; None when nothing is left."""
    parents = [parent - (parent > leaf) for node, parent in enumerate(tree.parents) if node != leaf]
    return TreeShape(tuple(parents)) if parents else None
