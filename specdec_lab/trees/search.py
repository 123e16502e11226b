"""The best tree of a size, by the heap where that is exact and by the dynamic program everywhere else."""

from __future__ import annotations

import operator

from ..records import MAX_DEPTH, MAX_NODES, TreeShape
from .acceptance import Acceptance, RankChances, why_not_heap
from .heap import HeapSearch
from .table import TableSearch

METHODS = ("auto", "dp", "heap")


def best_tree(acceptance: RankChances | Acceptance, nodes: int, levels: int | None = None, method: str = "auto") -> TreeShape:
    """The tree with the most expected tokens among those of at most `nodes` nodes and `levels` levels, ROOT COUNTED in both.

    acceptance  rank vector [K], the same at every depth, or depth x rank matrix [D, K]: row 0 is the root's children, and
                no tree goes deeper than its rows or wider than its ranks
    nodes       2..768; nodes that are never accepted are left out, so the tree may hold fewer
    levels      2..65, None = as many as a TreeShape can have
    method      `heap`: the likeliest nodes, exact where acceptance falls with rank, refused elsewhere;
                `dp`: exact everywhere; `auto`: the heap where it is exact, else the dynamic program
    ValueError for numbers that are no chances, sizes out of range, and where plain decoding is the answer.
    Source: Sequoia (Chen 2024), section 3: G(n, D). Nodes come breadth-first, siblings in rank order.
    """
    known = Acceptance.of(acceptance)
    nodes = check_nodes(nodes)
    cap = known.max_levels if levels is None else min(check_levels(levels), known.max_levels)
    if nodes == 1 or cap == 1:
        raise ValueError(
            f"a tree of {nodes} nodes and {cap} levels, root counted, drafts nothing; plain decoding is the configuration 'off'"
        )
    tree = search_for(known, nodes, cap, method).tree(nodes, cap)
    if tree is None:
        raise ValueError("acceptance is 0 for every child of the root, so no drafted token is ever accepted; use 'off'")
    return tree


def search_for(acceptance: Acceptance, nodes: int, levels: int, method: str = "auto") -> HeapSearch | TableSearch:
    """The search that answers every size up to `nodes` and every cap up to `levels`; its `method` says which it is."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "heap" or (method == "auto" and why_not_heap(acceptance) is None):
        return HeapSearch(acceptance, nodes)
    return TableSearch(acceptance, nodes, levels)


def check_nodes(nodes: int) -> int:
    """A number of nodes, root counted, that a TreeShape can hold."""
    nodes = operator.index(nodes)
    if not 1 <= nodes <= MAX_NODES + 1:
        raise ValueError(f"nodes must be 1 to {MAX_NODES + 1} (the root is counted), got {nodes}")
    return nodes


def check_levels(levels: int) -> int:
    """A number of levels, root counted, that a TreeShape can hold."""
    levels = operator.index(levels)
    if not 1 <= levels <= MAX_DEPTH + 1:
        raise ValueError(f"levels must be 1 to {MAX_DEPTH + 1} (the root's level is counted), got {levels}")
    return levels
