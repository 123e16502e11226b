"""Where the nodes of a tree lie and what they see: made once per tree and device, so that a round builds nothing.

The engine numbers nodes breadth-first with the root as 0, siblings in rank order, whatever order a TreeShape has. Node v lies
at slot committed + v and position committed + depth. Not known here: tokens, laws, who drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..records import KvView, TreeShape
from .attention import Reads
from .batch import Forward

KEPT_LAYOUTS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Level:
    """Nodes that are fed in one forward, and what each of them sees: its ancestors and itself.

    name         of tree and level, for what a back end keeps; None where the tree is not met again
    depths       of the fed nodes, from the root; sum_depths of them all
    ancestors    ancestors[e]: distinct nodes at depth e that some fed node sees; nodes_seen of them all
    corner, node_depths, query_nodes  as in Reads
    pick         [children] this level's children among [fed nodes x most]; `most` children has the one with most
    feed         [next level's fed nodes] their places among this level's children; None on the last level
    """

    name: tuple[str, int] | None
    depths: tuple[int, ...]
    sum_depths: int
    ancestors: tuple[int, ...]
    nodes_seen: int
    corner: Tensor
    node_depths: Tensor
    query_nodes: Tensor
    most: int
    pick: Tensor
    feed: Tensor | None

    def reads(
        self, committed: Tensor, view: KvView, longest_committed: int, uniform: bool, rows: Tensor | None = None
    ) -> Reads:
        """What a forward of these nodes reads."""
        return Reads(
            committed, self.corner, self.node_depths, self.query_nodes, view, longest_committed + self.corner.shape[1], uniform,
            False, rows, key=self.name,
        )

    def count(self, committed: list[int], view: KvView) -> Forward:
        """The exact counts of a forward of these nodes: of one depth where the view is a window, with or without lists."""
        queries, keys, pairs = len(self.depths), 0, 0
        if view.kind == "full":
            tokens, rows = sum(committed), len(committed)
            return Forward(rows, queries, tokens + rows * self.nodes_seen, queries * (tokens + rows) + rows * self.sum_depths)
        depth = self.depths[0]
        for length in committed:
            before = length + depth - view.recent + 1  # the window's first position
            if view.kind == "window" and before > view.sink <= length:  # as in most rounds: the same whatever the length
                near = self.ancestors[max(depth - view.recent + 1, 0) :]
                prefix = view.sink + max(0, view.recent - depth - 1)
                keys, pairs = keys + prefix + sum(near), pairs + queries * (prefix + len(near))
                continue
            stays = min(length, view.sink) if view.kind == "window" else min(view.budget, max(before, 0), length)
            prefix = stays + max(0, length - max(view.sink, before))
            seen = [e for e in range(depth + 1) if depth - e < view.recent or length + e < view.sink]
            keys += prefix + sum(self.ancestors[e] for e in seen)
            pairs += queries * (prefix + len(seen))
        return Forward(len(committed), queries, keys, pairs)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A tree as the engine walks it.

    order      order[v-1]: the number in the TreeShape of node v
    parents    of nodes 0..N; the root's is -1
    depths     of nodes 0..N
    children   of nodes 0..N in rank order
    num_children  of nodes 0..N; siblings lie side by side, so this is the whole tree
    child_table [N+1, K] the same, -1 where there is none
    widest     widest[d]: most children of a node at depth d, for d = 0..depth
    law_row    [N+1] which of the fed nodes, counted over all levels, a node is; 0 for a leaf
    levels     draft forwards: per depth the nodes that have children
    whole      the verify forward: all nodes
    """

    order: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]
    num_children: tuple[int, ...]
    child_table: Tensor
    widest: tuple[int, ...]
    law_row: Tensor
    levels: tuple[Level, ...]
    whole: Level

    @property
    def num_nodes(self) -> int:
        """Drafted nodes, root not counted."""
        return len(self.order)

    @property
    def depth(self) -> int:
        """The longest path."""
        return self.depths[-1]


def breadth_first(tree: TreeShape) -> tuple[int, ...]:
    """The nodes of a TreeShape level by level; siblings stay in the order of their numbers, which is their rank."""
    children: list[list[int]] = [[] for _ in range(tree.num_nodes + 1)]
    for node, parent in enumerate(tree.parents):
        children[parent + 1].append(node)
    order: list[int] = []
    level = [-1]
    while level:
        level = [child for node in level for child in children[node + 1]]
        order += level
    return tuple(order)


@lru_cache(maxsize=KEPT_LAYOUTS)
def layout_of(tree: TreeShape, device: torch.device, nodes: tuple[int, ...] | None = None) -> Layout:
    """The layout of a tree, or of those of its nodes (with every parent) that some row drafted."""
    order = breadth_first(tree)
    if nodes is not None:
        kept = frozenset(nodes)
        order = tuple(node for node in order if node in kept)
    number = {-1: 0, **{node: v for v, node in enumerate(order, start=1)}}
    parents = (-1, *(number[tree.parents[node]] for node in order))
    depths = [0]
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        depths.append(depths[parent] + 1)
        children[parent].append(node)
    spelling = str(tree) if nodes is None else None  # what only some rows drafted is rarely met again
    fed = [[v for v in range(len(parents)) if depths[v] == d and children[v]] for d in range(depths[-1])]

    def level(number: int, queries: Sequence[int]) -> Level:
        return _level(None if spelling is None else (spelling, number), queries, parents, depths, children, device)

    most = max(map(len, children))
    table = torch.tensor([c + [-1] * (most - len(c)) for c in children], dtype=torch.int64, device=device)
    laws = {v: row for row, v in enumerate(v for queries in fed for v in queries)}
    return Layout(
        order, parents, tuple(depths), tuple(map(tuple, children)), tuple(map(len, children)), table,
        tuple(max(len(c) for v, c in enumerate(children) if depths[v] == d) for d in range(depths[-1] + 1)),
        torch.tensor([laws.get(v, 0) for v in range(len(parents))], device=device),
        tuple(level(d, queries) for d, queries in enumerate(fed)), level(-1, range(len(parents))),
    )  # fmt: skip


def _level(
    name: tuple[str, int] | None, queries: Sequence[int], parents: Sequence[int], depths: Sequence[int],
    children: Sequence[Sequence[int]], device: torch.device,
) -> Level:
    lines = []
    for node in queries:
        line = [node]
        while parents[line[-1]] >= 0:
            line.append(parents[line[-1]])
        lines.append(line)
    corner = torch.zeros(len(queries), queries[-1] + 1, dtype=torch.bool)
    for row, line in enumerate(lines):
        corner[row, line] = True
    most = max(len(children[v]) for v in queries)
    offspring = [child for v in queries for child in children[v]]
    pick = [row * most + rank for row, v in enumerate(queries) for rank in range(len(children[v]))]
    feed = [place for place, child in enumerate(offspring) if children[child]]
    ancestors = {v for line in lines for v in line}
    deepest = max(depths[v] for v in queries)
    return Level(
        name, tuple(depths[v] for v in queries), sum(depths[v] for v in queries),
        tuple(sum(depths[v] == e for v in ancestors) for e in range(deepest + 1)), len(ancestors),
        corner.to(device), torch.tensor(depths[: queries[-1] + 1], device=device), torch.tensor(list(queries), device=device),
        most, torch.tensor(pick, device=device), torch.tensor(feed, device=device) if feed else None,
    )  # fmt: skip
