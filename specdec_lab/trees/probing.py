"""What a probe drafts: a wide tree that puts many ranks to the test, by one drafter through one view."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import KvView, SpecConfig, TreeShape

PROBE_NODES = 63  # with the root, what the compiled kernel verifies at once


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts through which view; the tree is the probe's own. Spelled `self:4+60`, `model:full`, `ngram`."""

    drafter: str
    view: KvView | None

    @classmethod
    def parse(cls, text: str) -> Drafting:
        """Read a configuration without its tree."""
        if "/" in text or text.strip() == "off":
            raise ValueError(f"{text!r}: the probe drafts a tree of its own; name drafter and view only, for example self:4+60")
        config = SpecConfig.parse(f"{text.strip()}/chain1")
        return cls(config.drafter, config.view)

    def __str__(self) -> str:
        return self.drafter if self.view is None else f"{self.drafter}:{self.view}"

    def config(self, tree: TreeShape) -> SpecConfig:
        """The configuration that drafts this tree."""
        return SpecConfig(self.drafter, self.view, tree)


def probe_tree(width: int, depth: int, most_nodes: int = PROBE_NODES) -> TreeShape:
    """`width` children for the root and for the likeliest nodes of every level above `depth`, in at most `most_nodes` nodes.

    Nodes of low rank are likely to be accepted, and only children of accepted nodes are examined. Nodes without children stay
    leaves, so that every examined node has `width` children.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"a probe needs a width and a depth of at least 1, got {width} and {depth}")
    if width * depth > most_nodes:
        needed = width * depth
        raise ValueError(f"a probe of width {width} and depth {depth} has at least {needed} nodes; {most_nodes} are possible")
    spare = most_nodes // width - depth  # families beyond the one that every level has
    parents: list[int] = [-1] * width
    level = [(rank, rank - 1) for rank in range(1, width + 1)]  # (product of ranks on the path, node)
    for below in range(1, depth):
        extra = spare // (depth - below)
        chosen = sorted(level)[: 1 + extra]
        spare -= len(chosen) - 1
        level = []
        for cost, node in sorted(chosen, key=lambda item: item[1]):
            level += [(cost * rank, len(parents) + rank - 1) for rank in range(1, width + 1)]
            parents += [node] * width
    return TreeShape(tuple(parents))
