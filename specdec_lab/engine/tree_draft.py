"""Trees from a network's scores, and from several matches in a text.

One forward per level that has nodes with children; only those nodes are fed. Where the network can, all levels are one
compiled call. Not known here: acceptance, records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..records import KvView, SpecConfig, TreeShape
from .attention import Reads, chain_reads
from .batch import Batch, Forward, count_forward
from .clocks import Phase
from .network import DRAFT, Network
from .tree_layout import Layout, breadth_first, layout_of
from .tree_verify import choose_children, lower_of_equals
from .verify import Proposal

if TYPE_CHECKING:
    from torch import device as Device


@lru_cache(maxsize=64)
def chain_children(depth: int) -> tuple[int, ...]:
    """How many children each node of a chain has, as Layout.num_children."""
    return (*(1,) * depth, 0)


def draft_tree(network: Network, batch: Batch, config: SpecConfig, lag: int = 0) -> tuple[Proposal, tuple[Forward, ...]]:
    """Draft config.tree, every node attending through the view to the text and its ancestors.

    In one call where the network can, else level by level. The cache holds everything before the root but the last `lag`
    (0 or 1) tokens, which the first forward takes in with it.
    """
    assert config.view is not None
    assert config.tree is not None
    view, rows, committed, longest = config.view, network.rows(batch), network.cache.committed, batch.longest_committed
    layout = layout_of(config.tree, committed.device)
    reads = chain_reads(committed - lag if lag else committed, lag + 1, view, longest - lag, batch.uniform, rows)
    computed = [length - 1 for length in batch.lengths_of(rows)]
    cost = (
        count_forward([n - lag for n in computed] if lag else computed, lag + 1, view),
        *(level.count(computed, view) for level in layout.levels[1:]),
    )
    draw = batch.draft_draw()
    drafted = network.draft(batch.last_tokens(lag + 1), reads, layout.num_children, draw) if draw is not None else None
    if drafted is None:
        tokens, law = _level_by_level(network, batch, view, layout, reads)
    else:
        network.clock.enter(Phase.DRAFT_OTHER)
        tokens, law = drafted.tokens, drafted.law
    return Proposal(tokens, torch.full_like(committed, layout.num_nodes), law, layout), cost


def _level_by_level(
    network: Network, batch: Batch, view: KvView, layout: Layout, reads: Reads
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, N], and the laws [B, fed nodes, V] they were drawn from where that is asked for.

    reads  of the first forward
    """
    rows, committed, longest = network.rows(batch), network.cache.committed, batch.longest_committed
    fed, tokens, laws = batch.last_tokens(reads.num_queries), [], []
    for depth, level in enumerate(layout.levels):
        if depth:
            reads = level.reads(committed, view, longest, batch.uniform, rows)
        scores = network.score(fed, reads, len(level.depths), DRAFT)
        network.clock.enter(Phase.DRAFT_OTHER)
        chosen, law = choose_children(
            scores, level.most, committed + depth + 1, batch.processor, batch.verifier, batch.noise, lower_of_equals
        )
        tokens.append(chosen.flatten(1).index_select(1, level.pick))
        if law is not None:
            laws.append(law)
        if level.feed is not None:
            fed = tokens[-1].index_select(1, level.feed)
    return torch.cat(tokens, 1), torch.cat(laws, 1) if laws else None


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
