"""Who proposes: `self` (the target through a KV view), `model` (a second network), `ngram` (the text itself).

A drafter reads the batch and returns a Proposal. Drafted K/V go beyond the committed length and are overwritten by verify
or forgotten. Not known here: acceptance, records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..records import SpecConfig
from .attention import chain_reads, draft_step_reads
from .batch import Batch, Forward, count_forward
from .clocks import Clock, Phase
from .network import DRAFT, Network
from .snapkv import SnapKv
from .tree_draft import chain_children, draft_tree, fill_tree, text_proposal
from .tree_layout import Layout
from .verify import Proposal, choose_draft

NGRAM_SIZES = (4, 3, 2)  # longest match first
MAX_MATCHES = 64  # of one tail that a tree looks at


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What a proposal cost: its draft forwards, and the threads that ran them."""

    forwards: tuple[Forward, ...] = ()
    threads: int = 0


class Drafter(Protocol):
    """Proposes a chain or tree per row. Drafted K/V and text beyond the committed length are never read."""

    def propose(self, batch: Batch, config: SpecConfig, clock: Clock) -> tuple[Proposal, DraftCost]:
        """At most the nodes of config.tree per row."""


def _draft(network: Network, batch: Batch, config: SpecConfig, lag: int = 0) -> tuple[Proposal, DraftCost]:
    """Draft config.tree. The cache holds everything before the root but the last `lag` (0 or 1) tokens."""
    if config.is_chain:
        return _draft_chain(network, batch, config, lag)
    proposal, forwards = draft_tree(network, batch, config, lag)
    return proposal, DraftCost(forwards, network.used_threads)


def _draft_chain(network: Network, batch: Batch, config: SpecConfig, lag: int = 0) -> tuple[Proposal, DraftCost]:
    """Draft a chain, each step attending through the view: in one call where the network can, else token by token.

    The cache holds everything before the root but the last `lag` (0 or 1) tokens, which the first step takes in with it.
    """
    assert config.view is not None
    view, clock, rows = config.view, network.clock, network.rows(batch)
    committed, longest, tokens, laws = network.cache.committed, batch.longest_committed, [], []
    computed = [length - 1 for length in batch.lengths_of(rows)]
    fed = batch.last_tokens(lag + 1)
    reads = chain_reads(committed - lag if lag else committed, lag + 1, view, longest - lag, batch.uniform, rows)
    counts = torch.full_like(committed, config.depth)
    forwards = [count_forward([n - lag for n in computed], lag + 1, view)]
    forwards += [count_forward(computed, 1, view, step) for step in range(1, config.depth)]
    draw = batch.draft_draw()
    drafted = network.draft(fed, reads, chain_children(config.depth), draw) if draw is not None else None
    if drafted is not None:
        clock.enter(Phase.DRAFT_OTHER)
        return Proposal(drafted.tokens, counts, drafted.law), DraftCost(tuple(forwards), network.used_threads)
    for step in range(config.depth):
        if step:
            reads = draft_step_reads(committed, step, view, longest, batch.uniform, rows)
        scores = network.score(fed, reads, 1, DRAFT)
        clock.enter(Phase.DRAFT_OTHER)
        token, drawn_from = choose_draft(scores, committed + step + 1, batch.processor, batch.verifier, batch.noise)
        tokens.append(token)
        if drawn_from is not None:
            laws.append(drawn_from)
        fed = token[:, None]
    proposal = Proposal(torch.stack(tokens, 1), counts, torch.stack(laws, 1) if laws else None)
    return proposal, DraftCost(tuple(forwards), network.used_threads)


@dataclass(slots=True)
class SelfDrafter:
    """The target itself, reading its own KV through a view: no second cache, no copy (MagicDec 2024, our design)."""

    network: Network
    snapkv: SnapKv = field(init=False)

    def __post_init__(self) -> None:
        self.snapkv = SnapKv(self.network)

    def propose(self, batch: Batch, config: SpecConfig, clock: Clock) -> tuple[Proposal, DraftCost]:
        """See Drafter.propose. First chooses what the view lists, where that is due."""
        chosen = self.choose(batch, config, clock)
        proposal, cost = _draft(self.network, batch, config)
        return proposal, DraftCost(chosen.forwards + cost.forwards, cost.threads)

    def choose(self, batch: Batch, config: SpecConfig, clock: Clock) -> DraftCost:
        """Make the lists of a SnapKV view current."""
        clock.enter(Phase.DRAFT_OTHER)
        if config.view is None or config.view.kind != "snapkv":
            return DraftCost()
        lists, forwards = self.snapkv.lists(batch, config.view)
        self.network.index = lists.index
        return DraftCost(forwards)


@dataclass(slots=True)
class ModelDrafter:
    """A second, smaller network with its own cache of the same slots."""

    network: Network
    _known: list[int] = field(default_factory=list)  # committed draft KV per row, on the host
    _layout: Layout | None = None  # of the tree drafted in this round

    def __post_init__(self) -> None:
        self._known = [0] * self.network.cache.batch

    def propose(self, batch: Batch, config: SpecConfig, clock: Clock) -> tuple[Proposal, DraftCost]:
        """See Drafter.propose. First takes in what was committed since the last call."""
        clock.enter(Phase.DRAFT_OTHER)
        # after a fully accepted round the last drafted token is missing: it travels with the root
        lag = self.lag(batch) if min(batch.host_lengths) > 1 else 0
        caught_up = self.catch_up(batch, config, clock) if lag != 1 else DraftCost()
        self.network.cache.committed = batch.lengths - 1
        proposal, cost = _draft(self.network, batch, config, int(lag == 1))
        self._layout = proposal.layout
        # verify may accept what was drafted: its KV (all but the last draft's) is then already here
        there = config.depth if proposal.layout is None else 1  # of a tree the root; `keep` adds what was accepted
        self._known = [length - 1 + there for length in batch.host_lengths]
        return proposal, DraftCost(caught_up.forwards + cost.forwards, cost.threads)

    def keep(self, paths: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        """The nodes of this round's tree that verify accepted, per row: the KV of those that were fed moves to the root."""
        if self._layout is None:
            return
        children = self._layout.children
        fed = [sum(bool(children[node]) for node in path[:count]) for path, count in zip(paths, counts, strict=True)]
        self.network.cache.compact(paths, fed)
        self._known = [known + more for known, more in zip(self._known, fed, strict=True)]

    @property
    def known(self) -> list[int]:
        """Committed tokens per row whose KV is here."""
        return list(self._known)

    def knows(self, known: list[int]) -> None:
        """Rounds that ran elsewhere on this cache left so much of every row's KV in it."""
        self._layout, self._known = None, list(known)

    def fill_noise(self, lengths: Sequence[int], seed: int) -> None:
        """Random KV up to these lengths, in place of text that was read."""
        self.network.cache.fill_noise(lengths, seed)
        self._known = list(lengths)

    def rewind(self, batch: Batch) -> None:
        """Forget KV beyond each row's committed length. The loop calls this after every round and every rewind."""
        self._layout = None
        self._known = [min(k, n - 1) for k, n in zip(self._known, batch.host_lengths, strict=True)]

    def lag(self, batch: Batch) -> int:
        """Most committed tokens of a row that this model has not read yet."""
        return max(n - 1 - k for n, k in zip(batch.host_lengths, self._known, strict=True))

    def catch_up(self, batch: Batch, config: SpecConfig, clock: Clock) -> DraftCost:
        """Read committed tokens up to the root."""
        assert config.view is not None
        self._known, forwards = self.network.read(batch, self._known, config.view, DRAFT)
        clock.enter(Phase.DRAFT_OTHER)
        return DraftCost(forwards)


@dataclass(slots=True)
class _IndexedText:
    """One row's text with, for each n-gram, where its continuations start. Grows and rewinds token by token."""

    tokens: list[int] = field(default_factory=list)
    starts: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # earliest first

    def extend(self, tokens: list[int], sizes: tuple[int, ...]) -> None:
        for token in tokens:
            end = len(self.tokens)
            for size in sizes:
                if end >= size:
                    self.starts.setdefault(tuple(self.tokens[-size:]), []).append(end)
            self.tokens.append(token)

    def rewind(self, length: int, sizes: tuple[int, ...]) -> None:
        while len(self.tokens) > length:
            self.tokens.pop()
            for size in sizes:
                if len(self.tokens) >= size:
                    gram = tuple(self.tokens[-size:])
                    self.starts[gram].pop()
                    if not self.starts[gram]:
                        del self.starts[gram]

    def continuation(self, depth: int, sizes: tuple[int, ...]) -> list[int]:
        """What followed the latest match of the longest matching tail, or nothing."""
        return next(self.continuations(depth, sizes), [])

    def continuations(self, depth: int, sizes: tuple[int, ...]) -> Iterator[list[int]]:
        """What followed matches of the tail, the longest tail and its latest match first; periods that reach the end repeat."""
        end = len(self.tokens)
        for size in sizes:
            starts = self.starts.get(tuple(self.tokens[-size:]), ()) if end >= size else ()
            for start in starts[: -MAX_MATCHES - 1 : -1]:
                yield [self.tokens[start + i % (end - start)] for i in range(depth)]


@dataclass(slots=True)
class NgramDrafter:
    """What followed the latest earlier occurrence of the last tokens. Costs no forward; a row without a match drafts nothing.

    A tree takes several occurrences: distinct continuations become siblings, a row with few matches drafts few nodes.
    The index grows by a few dictionary entries per token, never with the text already read.
    """

    sizes: tuple[int, ...] = NGRAM_SIZES
    _rows: list[_IndexedText] = field(default_factory=list)

    def propose(self, batch: Batch, config: SpecConfig, clock: Clock) -> tuple[Proposal, DraftCost]:
        """See Drafter.propose."""
        clock.enter(Phase.DRAFT_OTHER)
        self.read(batch)
        if not config.is_chain:
            return self._tree(batch, config), DraftCost()
        drafts = [
            row.continuation(config.depth, self.sizes) if live else []
            for row, live in zip(self._rows, batch.host_live, strict=True)
        ]
        width, device = max(map(len, drafts)), batch.ids.device
        padded = torch.tensor([d + [0] * (width - len(d)) for d in drafts], dtype=torch.int64, device=device)
        counts = torch.tensor([len(d) for d in drafts], dtype=torch.int64, device=device)
        return Proposal(padded.view(len(drafts), width), counts), DraftCost()

    def _tree(self, batch: Batch, config: SpecConfig) -> Proposal:
        assert config.tree is not None
        filled = [
            fill_tree(config.tree, row.continuations(config.depth, self.sizes)) if live else {}
            for row, live in zip(self._rows, batch.host_live, strict=True)
        ]
        return text_proposal(config.tree, filled, batch.ids.device)

    def read(self, batch: Batch) -> None:
        """Take in tokens emitted since the last call."""
        if not self._rows:
            self._rows = [_IndexedText() for _ in batch.host_lengths]
        for number, (row, length) in enumerate(zip(self._rows, batch.host_lengths, strict=True)):
            if len(row.tokens) < length:
                row.extend(batch.ids[number, len(row.tokens) : length].tolist(), self.sizes)

    def rewind(self, batch: Batch) -> None:
        """Forget tokens beyond each row's length."""
        for row, length in zip(self._rows, batch.host_lengths, strict=False):
            row.rewind(length, self.sizes)
