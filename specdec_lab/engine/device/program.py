"""What is fixed about the rounds of a configuration: which nodes every forward feeds and what they see. Made once.

Sink and recent of a window are not in here, nor is any length, nor what a list names: configurations that differ in those
share a program, and so a captured graph. Not known here: models, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...records import SpecConfig
from ..attention import chain_order
from ..tree_layout import Layout, Level, layout_of
from .state import MOST_EMITTED

Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Feed:
    """Nodes fed in one forward: node v lies at slot base + v and position base + depth; they see the prefix and the corner.

    corner  [T, C] bool; words [T, ceil(C/32)] the same as int32 bits; depths [C] int32, nodes [T] int32
    slots, turns  [T] int64: nodes, and their depths, as distances from the base
    """

    corner: Tensor
    words: Tensor
    depths: Tensor
    nodes: Tensor
    slots: Tensor
    turns: Tensor

    @classmethod
    def of(cls, corner: Tensor, depths: Tensor, nodes: Tensor) -> Feed:
        """From the corner of a chain or of a level of a tree."""
        from specdec_kernels.tree_attention.gpu import pack_corner  # needs torch only

        return cls(corner, pack_corner(corner), depths.to(torch.int32), nodes.to(torch.int32), nodes, depths[nodes])

    @property
    def num_queries(self) -> int:
        """T, tokens fed per row."""
        return self.corner.shape[0]


@dataclass(frozen=True, slots=True)
class Program:
    """The forwards of a round.

    drafter  off, ngram (a chain; no forward), self or model. A model's first forward has two nodes: the last committed token,
             where its KV is missing, and the root; without that token, root and padding
    budget   entries of the index lists (SnapKV) that drafts read in place of sinks; 0: there are none
    layout   of a tree
    drafts   one forward per level that has children
    kept     tensors that the functions of a round look up: a captured graph points to them, so they must outlive it
    """

    drafter: str
    tree: str
    budget: int
    depth: int
    num_nodes: int
    layout: Layout | None
    drafts: tuple[Feed, ...]
    verify: Feed
    has_children: Tensor
    kept: tuple[Tensor, ...]

    @property
    def key(self) -> Key:
        """What makes one captured round differ from another on the same buffers."""
        return self.drafter, self.tree, self.budget

    @classmethod
    def of(cls, config: SpecConfig, device: torch.device) -> Program:
        """The program of plain decoding, a chain or a tree."""
        drafter, spelled, budget = key_of(config)
        tree, depth = config.tree, config.depth
        if tree is None or tree.is_chain:
            layout, verify = None, _chain(depth + 1, device)
            drafts = [_link(step, device) for step in range(depth)] if config.view is not None else []
        else:
            layout = layout_of(tree, device)
            verify, drafts = _level(layout.whole), [_level(level) for level in layout.levels]
        if config.drafter == "model":
            drafts[0] = _chain(2, device)
        parents = [bool(c) for c in layout.children] if layout else [v < depth for v in range(depth + 1)]
        kept = tuple(chain_order(n, device) for n in range(MOST_EMITTED + 1))
        return cls(
            drafter, spelled, budget, depth, config.num_nodes, layout, tuple(drafts), verify,
            torch.tensor(parents, device=device), kept,
        )


def key_of(config: SpecConfig) -> Key:
    """Of the program of a configuration."""
    budget = 0 if config.view is None else config.view.budget
    return config.drafter, "" if config.tree is None else str(config.tree), budget


def _level(level: Level) -> Feed:
    return Feed.of(level.corner, level.node_depths, level.query_nodes)


def _chain(length: int, device: torch.device) -> Feed:
    """`length` tokens in causal order."""
    order = chain_order(length, device)
    return Feed.of(order[:, None] >= order, order, order)


def _link(step: int, device: torch.device) -> Feed:
    """The last of step + 1 tokens in causal order."""
    order = chain_order(step + 1, device)
    return Feed.of((order[:, None] >= order)[-1:], order, order[-1:])
