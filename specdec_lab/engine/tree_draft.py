"""Trees level by level from a network's scores, and from several matches in a text.

One forward per level that has nodes with children; only those nodes are fed. Not known here: acceptance, records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..records import SpecConfig, TreeShape
from .attention import chain_reads
from .batch import Batch, Forward, count_forward
from .clocks import Phase
from .network import DRAFT, Network
from .tree_layout import Layout, breadth_first, layout_of
from .tree_verify import choose_children
from .verify import Proposal

if TYPE_CHECKING:
    from torch import device as Device


def draft_tree(network: Network, batch: Batch, config: SpecConfig, lag: int = 0) -> tuple[Proposal, tuple[Forward, ...]]:
    """Draft config.tree, every node attending through the view to the text and its ancestors.

    The cache holds everything before the root but the last `lag` (0 or 1) tokens, which the first forward takes in with it.
    """
    assert config.view is not None
    assert config.tree is not None
    view, rows, committed, longest = config.view, network.rows(batch), network.cache.committed, batch.longest_committed
    layout = layout_of(config.tree, committed.device)
    computed = [length - 1 for length in batch.lengths_of(rows)]
    fed, tokens, laws, cost = batch.last_tokens(lag + 1), [], [], []
    for depth, level in enumerate(layout.levels):
        if depth == 0:
            reads = chain_reads(committed - lag if lag else committed, lag + 1, view, longest - lag, batch.uniform, rows)
            cost.append(count_forward([n - lag for n in computed], lag + 1, view))
        else:
            reads = level.reads(committed, view, longest, batch.uniform, rows)
            cost.append(level.count(computed, view))
        scores = network.score(fed, reads, len(level.depths), DRAFT)
        network.clock.enter(Phase.DRAFT_OTHER)
        chosen, law = choose_children(
            scores, level.most, committed + depth + 1, batch.processor, batch.verifier, batch.noise
        )
        tokens.append(chosen.flatten(1).index_select(1, level.pick))
        if law is not None:
            laws.append(law)
        if level.feed is not None:
            fed = tokens[-1].index_select(1, level.feed)
    counts = torch.full_like(committed, layout.num_nodes)
    return Proposal(torch.cat(tokens, 1), counts, torch.cat(laws, 1) if laws else None, layout), tuple(cost)


def fill_tree(tree: TreeShape, continuations: Iterable[Sequence[int]]) -> dict[int, int]:
    """Node -> token: each continuation goes down the tree as far as it can, sharing what is there and taking free children.

    Siblings are distinct, and a node's children are taken in rank order; stops when the tree is full.
    """
    children: list[list[int]] = [[] for _ in range(tree.num_nodes + 1)]
    for node, parent in enumerate(tree.parents):
        children[parent + 1].append(node)
    filled: dict[int, int] = {}
    for continuation in continuations:
        node = -1
        for token in continuation:
            found = next((c for c in children[node + 1] if filled.get(c, token) == token), None)
            if found is None:
                break
            filled[found] = token
            node = found
        if len(filled) == tree.num_nodes:
            break
    return filled


def text_proposal(tree: TreeShape, filled: Sequence[dict[int, int]], device: Device) -> Proposal:
    """The nodes that any row drafted (node -> token per row), as one smaller tree; nothing where no row drafted."""
    drafted = frozenset(node for row in filled for node in row)
    counts = torch.tensor([len(row) for row in filled], dtype=torch.int64, device=device)
    if not drafted:
        return Proposal(torch.zeros(len(filled), 0, dtype=torch.int64, device=device), counts, is_plain=True)
    nodes = tuple(node for node in breadth_first(tree) if node in drafted)
    layout: Layout = layout_of(tree, device, None if len(nodes) == tree.num_nodes else nodes)
    tokens: Tensor = torch.tensor([[row.get(node, 0) for node in nodes] for row in filled], dtype=torch.int64, device=device)
    exists = torch.tensor([[node in row for node in nodes] for row in filled], device=device)
    return Proposal(tokens, counts, None, layout, tuple(tuple(sorted(row)) for row in filled), exists)
