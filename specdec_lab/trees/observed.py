"""Rank outcomes from the records of rounds, chains and trees alike."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ..records import SpecConfig, StepRecord, TreeShape
from .counts import Counts, Walk, rank_counts


def observed(steps: Iterable[StepRecord], *, with_cut: bool = True) -> tuple[Counts, ...]:
    """Counts by depth of the examined node (0 is the root) over these rounds; `sum(found, Counts())` pools.

    with_cut  False leaves rows out whose text ended in the round, as all other acceptance statistics do
    A chain says how often its only child is accepted. Rows that drafted part of a tree count with the children they had.
    Records of trees that do not say which ranks were accepted (synthetic ones) are left out.
    """
    walks: dict[tuple[str, tuple[int, ...]], list[Walk]] = {}
    for step in steps:
        if step.kind != "round" or not (step.ranks or _is_chain(step.config)):
            continue
        for row, (drafted, accepted, cut) in enumerate(zip(step.drafted, step.accepted, step.censored, strict=True)):
            if not drafted or not step.tokens[row] or (cut and not with_cut):
                continue
            nodes = step.nodes[row] if step.nodes else tuple(range(drafted))
            ranks = step.ranks[row] if step.ranks else (1,) * accepted
            walks.setdefault((step.config, nodes), []).append(Walk(ranks, cut))
    by_depth: list[Counts] = []
    for (config, nodes), found in walks.items():
        for depth, counts in enumerate(rank_counts(found, _drafted_tree(config, nodes))):
            if depth == len(by_depth):
                by_depth.append(Counts())
            by_depth[depth] += counts
    return tuple(by_depth)


@lru_cache(maxsize=256)
def _is_chain(config: str) -> bool:
    return SpecConfig.parse(config).is_chain


@lru_cache(maxsize=1024)
def _drafted_tree(config: str, nodes: tuple[int, ...]) -> TreeShape:
    """The part of a configuration's tree that consists of these nodes."""
    tree = SpecConfig.parse(config).tree
    if tree is None or nodes[-1] >= tree.num_nodes:
        raise ValueError(f"{config!r} cannot draft the nodes {nodes}; the record does not belong to its configuration")
    if len(nodes) == tree.num_nodes:
        return tree
    name = {-1: -1, **{node: number for number, node in enumerate(nodes)}}
    return TreeShape(tuple(name[tree.parents[node]] for node in nodes))
