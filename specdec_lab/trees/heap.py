"""The likeliest nodes, one by one: the best tree of every size at once, where acceptance falls with rank."""

from __future__ import annotations

import heapq

from ..records import TreeShape
from .acceptance import Acceptance, why_not_heap
from .shape import breadth_first


class HeapSearch:
    """Best trees of up to `nodes` nodes (root counted), for any cap on levels, in milliseconds.

    ValueError where acceptance rises with rank: there the likeliest nodes need not form a tree.
    """

    method = "heap"

    def __init__(self, acceptance: Acceptance, nodes: int) -> None:
        if reason := why_not_heap(acceptance):
            raise ValueError(f"method 'heap' is not exact here: {reason}; use method='dp'")
        self._acceptance, self._nodes = acceptance, nodes
        self._orders: dict[int, list[int]] = {}

    def tree(self, nodes: int, levels: int) -> TreeShape | None:
        """The best tree of at most `nodes` nodes and `levels` levels; None where no drafted node is ever accepted."""
        if levels not in self._orders:
            self._orders[levels] = likeliest(self._acceptance, self._nodes, levels)
        parents = self._orders[levels][: nodes - 1]
        children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
        for node, parent in enumerate(parents, start=1):
            children[parent].append(node)
        return breadth_first(children)


def likeliest(acceptance: Acceptance, nodes: int, levels: int) -> list[int]:
    """Parents (root 0) of nodes 1, 2, ... in order of falling chance; of equal chances the shallower comes first.

    f(parent) >= f(child) and f(rank k) >= f(rank k+1), so every prefix is a tree and holds the largest chances there are.
    """
    rows = [acceptance.useful(depth) for depth in range(1, levels)]
    parents: list[int] = []
    chances = [1.0]
    heap: list[tuple[float, int, int, int]] = []  # (-chance, depth, parent, rank counted from 0)

    def offer(depth: int, parent: int, rank: int) -> None:
        if depth < levels and rank < len(rows[depth - 1]):
            heapq.heappush(heap, (-chances[parent] * rows[depth - 1][rank], depth, parent, rank))

    offer(1, 0, 0)
    while heap and len(parents) < nodes - 1:
        chance, depth, parent, rank = heapq.heappop(heap)
        chances.append(-chance)
        parents.append(parent)
        offer(depth + 1, len(parents), 0)
        offer(depth, parent, rank + 1)
    return parents
