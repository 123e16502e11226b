"""The tree that a round drafts, and how large one may be. Which tree is worth drafting is the matter of `trees`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ParseError

MAX_NODES = 767  # drafted nodes; with the root, the largest tree that Sequoia published has 768
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The drafted nodes of a round; the root (the last emitted token, index -1) is not one of them.

    parents  parents[i] < i is the node under which node i hangs. Papers count the root: their (n nodes, D levels) is
             our (n-1 nodes, depth D-1). Spelled `chain5`, `4,2,1` (children per node, by level) or `tree:-1,-1,0`.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents:
            raise ValueError("TreeShape needs at least 1 drafted node; to draft nothing use the configuration 'off'")
        if len(self.parents) > MAX_NODES:
            raise ValueError(f"TreeShape has {len(self.parents)} nodes; at most {MAX_NODES} can be verified in a round")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"TreeShape node {node} has parent {parent}; it must be -1 (root) or an earlier node")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"TreeShape is {self.depth} levels deep; at most {MAX_DEPTH} are possible")

    @classmethod
    def chain(cls, length: int) -> TreeShape:
        """A path of `length` drafted tokens."""
        return cls(tuple(range(-1, length - 1)))

    @classmethod
    def branching(cls, children: Sequence[int]) -> TreeShape:
        """Breadth-first tree in which every node of level l has children[l] children."""
        if any(c < 1 for c in children):
            raise ValueError(f"every level of a tree needs at least 1 child per node, got {list(children)}")
        parents: list[int] = []
        level = [-1]
        for width in children:
            if len(parents) + len(level) * width > MAX_NODES:
                raise ValueError(f"tree {','.join(map(str, children))} has more than {MAX_NODES} nodes")
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents)))
        return cls(tuple(parents))

    @property
    def num_nodes(self) -> int:
        """Drafted nodes, root not counted."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depth of every node; children of the root have depth 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """The longest path, in drafted tokens."""
        return max(self.depths)

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child and the root exactly one."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    def children_per_level(self) -> tuple[int, ...] | None:
        """The level-by-level branching if the tree is that regular, else None."""
        counts = [0] * (len(self.parents) + 1)
        for parent in self.parents:
            counts[parent + 1] += 1
        depths = (0, *self.depths)
        per_level: list[int] = []
        for level in range(self.depth):
            widths = {counts[i] for i, d in enumerate(depths) if d == level}
            if len(widths) != 1:
                return None
            per_level.append(widths.pop())
        return tuple(per_level) if TreeShape.branching(per_level).parents == self.parents else None

    def __str__(self) -> str:
        if self.is_chain:
            return f"chain{len(self.parents)}"
        regular = self.children_per_level()
        return ",".join(map(str, regular)) if regular else "tree:" + ",".join(map(str, self.parents))

    @classmethod
    def parse(cls, text: str) -> TreeShape:
        """Read `chain5`, `4,2,1` or `tree:-1,-1,0`."""
        if match := re.fullmatch(r"chain(\d+)", text):
            length = int(match[1])
            if not 1 <= length <= MAX_DEPTH:
                raise ParseError(f"tree {text!r}: a chain has 1 to {MAX_DEPTH} drafted tokens, got {length}")
            return cls.chain(length)
        if match := re.fullmatch(r"tree:(-?\d+(?:,-?\d+)*)", text):
            return cls(tuple(int(p) for p in match[1].split(",")))
        if re.fullmatch(r"\d+(,\d+)*", text):
            return cls.branching([int(c) for c in text.split(",")])
        raise ParseError(f"tree {text!r} is none of: chainN (chain5), children per level (4,2,1), tree:PARENTS")
