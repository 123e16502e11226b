"""Growmaps, the tree files of Sequoia, TriForce and UMbreLLa: one tree written down six times, so each is checked."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from ..records import MAX_DEPTH, MAX_NODES, TreeShape
from .files import FilePath, TreeFileError, is_whole, plain, read_file

KEYS = ("size", "roots", "branches", "Successors", "mask", "depth")


def load_growmap(path: FilePath) -> TreeShape:
    """The tree of a growmap, `.pt` (Sequoia, TriForce) or `.json` (UMbreLLa), every part checked against every other.

    The file's `size` and ids count the root, the TreeShape does not. TreeFileError names the failed check: readable, keys,
    size, successors, one parent, breadth-first, depth, roots, branches, mask. UMbreLLa's tree WxL has W nodes on each of L
    levels below the root, so size W*L + 1 and depth L.
    """
    data = read_file(path)
    if not isinstance(data, Mapping):
        raise TreeFileError(path, "keys", f"a growmap is a dictionary, this is of type {type(data).__name__}")
    if missing := [key for key in KEYS if key not in data]:
        raise TreeFileError(path, "keys", f"{', '.join(missing)} missing; a growmap has {', '.join(KEYS)}")
    size, successors = plain(data["size"]), data["Successors"]
    _check_size(path, size)
    _check_successors(path, successors, size)
    parents = [-1] * size
    for node, children in enumerate(successors):
        for child in children:
            parents[child] = node
    depths = [0] * size
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
    _check_depths(path, plain(data["depth"]), depths)
    _check_levels(path, data["roots"], data["branches"], depths, successors)
    _check_mask(path, plain(data["mask"]), parents)
    return TreeShape(tuple(parent - 1 for parent in parents[1:]))


def _check_size(path: FilePath, size: Any) -> None:
    if not is_whole(size) or not 2 <= size <= MAX_NODES + 1:
        raise TreeFileError(
            path, "size", f"must be 2 to {MAX_NODES + 1} nodes, root counted, got {size!r}; a root alone is plain decoding"
        )


def _check_successors(path: FilePath, successors: Any, size: int) -> None:
    """Then the tree is one: children follow their parent and ids rise level by level."""
    if not _is_lists(successors) or len(successors) != size:
        raise TreeFileError(path, "successors", f"Successors must be {size} lists of child ids, one per node")
    ids = list(chain(*successors))
    if wrong := [child for child in ids if not 0 <= child < size]:
        raise TreeFileError(path, "successors", f"child {wrong[0]} is no node; ids are 0 to {size - 1}")
    for node in range(size):
        if (num := ids.count(node)) != (node > 0):
            raise TreeFileError(
                path, "one parent", f"node {node} is a child of {num} nodes, must be of {int(node > 0)}"
                + ("" if node else " (it is the root)"),
            )  # fmt: skip
    for node, children in enumerate(successors):
        if children and children[0] <= node:
            raise TreeFileError(path, "breadth-first", f"node {node} has the child {children[0]}; children follow their parent")
    for place, child in enumerate(ids, start=1):
        if child != place:
            raise TreeFileError(path, "breadth-first", f"reading Successors in order gives node {child} where {place} is due")


def _check_depths(path: FilePath, found: Any, depths: list[int]) -> None:
    if not isinstance(found, list) or len(found) != len(depths):
        raise TreeFileError(path, "depth", f"depth must be {len(depths)} numbers, one per node")
    for node, (said, true) in enumerate(zip(found, depths, strict=True)):
        if said != true:
            raise TreeFileError(path, "depth", f"depth of node {node} is given as {said}, its path has {true} steps")
    if max(depths) > MAX_DEPTH:
        raise TreeFileError(path, "depth", f"{max(depths)} levels below the root; at most {MAX_DEPTH} can be drafted")


def _check_levels(path: FilePath, roots: Any, branches: Any, depths: list[int], successors: list[list[int]]) -> None:
    levels = [[node for node, depth in enumerate(depths) if depth == level] for level in range(max(depths) + 1)]
    _compare(path, "roots", roots, levels, "nodes")
    _compare(path, "branches", branches, [[len(successors[node]) for node in level] for level in levels], "child counts")


def _compare(path: FilePath, name: str, found: Any, wanted: list[list[int]], what: str) -> None:
    if not _is_lists(found) or len(found) != len(wanted):
        raise TreeFileError(path, name, f"{name} must be {len(wanted)} lists of {what}, one per level")
    for level, (said, true) in enumerate(zip(found, wanted, strict=True)):
        if said != true:
            raise TreeFileError(path, name, f"level {level} has the {what} {said}, by Successors they are {true}")


def _check_mask(path: FilePath, mask: Any, parents: list[int]) -> None:
    """The ancestor closure: a node sees itself and its ancestors."""
    size = len(parents)
    closure = np.zeros((size, size), dtype=np.int64)
    for node, parent in enumerate(parents):
        if parent >= 0:
            closure[node] = closure[parent]
        closure[node, node] = 1
    if not _is_lists(mask) or [len(row) for row in mask] != [size] * size:
        raise TreeFileError(path, "mask", f"mask must be {size} x {size} whole numbers, 0 or 1")
    differs = np.argwhere(np.array(mask) != closure)
    if len(differs):
        node, other = map(int, differs[0])
        due = int(closure[node, other])
        why = "itself and its ancestors" if due else "no other nodes than itself and its ancestors"
        raise TreeFileError(path, "mask", f"mask[{node}][{other}] is {mask[node][other]}, must be {due}: a node sees {why}")


def _is_lists(value: Any) -> bool:
    """Whether it is a list of lists of whole numbers."""
    return isinstance(value, list) and all(isinstance(row, list) and all(map(is_whole, row)) for row in value)
