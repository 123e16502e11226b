"""The situations that a back end must get right: ugly on purpose, and made anew from their names alone.

A case is a description; `build` makes its tensors. Not known here: what is asked of the answers.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...records import KvView
from ..attention import AttentionBackend, Need, Reads
from ..cache import KvCache

LAYERS = 2
ROUND_QUERIES = 64  # more queries than this per row have only prompts
GARBAGE = 1000.0  # what unused values hold where NaN is not promised to be harmless: a leak is seen, a sum stays finite
HEAD_DIMS, GROUPS, DTYPES = (16, 48, 64, 80, 128, 256), (1, 2, 3, 4), (torch.float32, torch.bfloat16)
BORDERS = (0, 1, 63, 64, 65, 2047, 2048, 2049)  # of blocks and chunks of keys
WIDTHS = (1, 2, 3, 5, 8, 9, 16, 33, 64)
FULL = KvView.full()
WINDOWS = tuple(KvView.parse(v) for v in ("4+12", "0+1", "3+1", "0+63", "9+500", "4+5000"))
LISTS = tuple(KvView.parse(v) for v in ("snapkv1+1", "snapkv12+4", "snapkv63+64", "snapkv300+7"))
LONG_LISTS = KvView.parse("snapkv2100+30")  # longer than a chunk of keys
SLIDING = 16
CHANGES = "changes"  # the family whose cases are asked again in other batches, on other threads, with other lengths


@dataclass(frozen=True, slots=True)
class Corner:
    """The nodes that a round appends, and which of them ask.

    parents  of every node; parents[c] < c, node 0 is the root and has -1
    queries  the nodes that ask, in order
    """

    name: str
    parents: tuple[int, ...]
    queries: tuple[int, ...]

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs under the one before it."""
        return self.parents == tuple(range(-1, len(self.parents) - 1))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`corner` [T, C], `node_depths` [C] and `query_nodes` [T] of Reads."""
        seen, depths = torch.eye(len(self.parents), dtype=torch.bool), [0] * len(self.parents)
        for node, parent in enumerate(self.parents[1:], 1):
            seen[node] |= seen[parent]
            depths[node] = depths[parent] + 1
        nodes = torch.tensor(self.queries)
        return seen[nodes].to(device), torch.tensor(depths, device=device), nodes.to(device)


def chain(num_nodes: int) -> Corner:
    """A verified chain, or a chunk of a prompt: every token asks."""
    return Corner(f"chain of {num_nodes}", tuple(range(-1, num_nodes - 1)), tuple(range(num_nodes)))


def draft_step(step: int) -> Corner:
    """The draft token at this depth of a chain asks alone."""
    return Corner(f"draft step {step}", tuple(range(-1, step)), (step,))


def star(num_nodes: int) -> Corner:
    """All nodes but the root are its children: siblings must not see each other."""
    return Corner(f"star of {num_nodes}", (-1, *[0] * (num_nodes - 1)), tuple(range(num_nodes)))


def tree(num_nodes: int) -> Corner:
    """A random tree that is no chain (of three nodes or more)."""
    draw = random.Random(num_nodes)
    parents = [-1, *[draw.randrange(node) for node in range(1, num_nodes)]]
    parents[2:3] = [0] * len(parents[2:3])
    return Corner(f"tree of {num_nodes}", tuple(parents), tuple(range(num_nodes)))


def leaves(num_nodes: int) -> Corner:
    """Only the leaves of a random tree ask, as when its next level is drafted."""
    parents = tree(num_nodes).parents
    return Corner(f"leaves of a tree of {num_nodes}", parents, tuple(c for c in range(num_nodes) if c not in parents))


@dataclass(frozen=True, slots=True)
class Case:
    """One situation.

    lengths      committed tokens of each row
    need         what it asks of a back end; its dtype is that of keys and values
    gain         factor on the queries: 3 gives the many keys far below the best one weight together, 30 lets one key win
    layout       of the queries: contiguous; sliced, as from a fused projection; transposed, as from [B, Hq, T, D]
    query_dtype  None: as keys and values
    live         rows that still emit; None: all. What comes out for the others does not matter
    """

    family: str
    lengths: tuple[int, ...]
    corner: Corner
    view: KvView
    need: Need
    kv_heads: int = 2
    sliding: int | None = None
    gain: float = 1.0
    layout: str = "contiguous"
    query_dtype: torch.dtype | None = None
    live: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Unique, and the seed of all numbers."""
        need = self.need
        heads = f"{self.kv_heads} KV heads x {need.head_dim}, group {need.group}"
        special = [f"sliding {self.sliding}"] if self.sliding is not None else []
        special += [f"gain {self.gain:g}"] if self.gain != 1 else []
        special += [f"{self.layout} queries"] if self.layout != "contiguous" else []
        special += [f"{dtype_name(self.query_dtype)} queries"] if self.query_dtype else []
        special += [f"rows {','.join(map(str, self.live))} live"] if self.live else []
        lengths, dtype = "/".join(map(str, self.lengths)), dtype_name(need.dtype)
        return f"{self.family}: {lengths} + {self.corner.name}, {', '.join([f'view {self.view}', *special, heads, dtype])}"

    @property
    def is_round(self) -> bool:
        """Whether this is a round of decoding rather than a chunk of a prompt."""
        return len(self.corner.queries) <= ROUND_QUERIES

    def build(self, masks_loads: bool) -> Situation:
        """The tensors. Slots beyond each row's corner hold NaN if the back end masks its loads, else finite garbage."""
        draw = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        need, device = self.need, torch.device(self.need.device)
        ends = [length + len(self.corner.parents) for length in self.lengths]
        cache = KvCache(LAYERS, len(ends), self.kv_heads, max(ends), need.head_dim, need.dtype, device)
        cache.kv[..., : max(ends), :] = torch.randn(*cache.kv.shape[:-2], max(ends), need.head_dim, generator=draw)
        for row, end in enumerate(ends):
            if masks_loads and self.is_round:
                cache.kv[:, :, row, :, end:] = torch.nan
            else:
                cache.kv[:, 1, row, :, end:] = GARBAGE
        cache.committed = torch.tensor(self.lengths, device=device)
        return Situation(
            self._queries(draw, device), cache, self._reads(cache), need.group, self.sliding,
            1.25 * need.head_dim**-0.5,  # not the usual scale: a back end must use the one that it is given
        )  # fmt: skip

    def _reads(self, cache: KvCache) -> Reads:
        committed = cache.committed
        corner, depths, nodes = self.corner.tensors(committed.device)
        longest, is_uniform = max(self.lengths) + len(depths), len(set(self.lengths)) == 1
        live = None if self.live is None else torch.tensor(self.live, dtype=torch.int32, device=committed.device)
        lists = self._lists(cache.capacity).to(committed.device) if self.view.kind == "snapkv" else None
        return Reads(committed, corner, depths, nodes, self.view, longest, is_uniform, self.corner.is_chain, live, lists)

    def _lists(self, capacity: int) -> Tensor:
        """[layers, B, Hkv, N] int32 as chosen some tokens ago: keys before the window of then, or all keys of a short row."""
        draw, size = random.Random(self.name), min(self.view.budget, capacity)
        lists = torch.arange(size, dtype=torch.int32).repeat(LAYERS, len(self.lengths), self.kv_heads, 1)
        for row, length in enumerate(self.lengths):
            then = max(0, length - 1 - draw.randrange(20))  # one token ago at least: see Situation.shorter
            before = max(0, then + 1 - self.view.recent)
            for layer in range(LAYERS if before > size else 0):
                for head in range(self.kv_heads):
                    lists[layer, row, head] = torch.tensor(sorted(draw.sample(range(before), size)))
        return lists

    def _queries(self, draw: torch.Generator, device: torch.device) -> Tensor:
        """[B, T, Hq, D] in the case's layout. Views are taken last: arithmetic on a view would pack it."""
        batch, queries, heads = len(self.lengths), len(self.corner.queries), self.kv_heads * self.need.group
        made = heads + 2 * self.kv_heads if self.layout == "sliced" else heads
        order = (batch, made, queries) if self.layout == "transposed" else (batch, queries, made)
        q = torch.randn(*order, self.need.head_dim, generator=draw) * self.gain
        q = q.to(device, self.query_dtype or self.need.dtype)
        return q.transpose(1, 2) if self.layout == "transposed" else q[:, :, :heads]


@dataclass(frozen=True, slots=True)
class Situation:
    """What a back end is given: q [B, T, Hq, D], the same for every layer of the cache, and what of it may be read."""

    q: Tensor
    cache: KvCache
    reads: Reads
    group: int
    sliding: int | None
    scale: float

    @property
    def num_layers(self) -> int:
        """Layers of the cache."""
        return int(self.cache.kv.shape[0])

    @property
    def live(self) -> list[int]:
        """The rows whose answers matter."""
        return list(range(self.cache.batch)) if self.reads.rows is None else self.reads.rows.tolist()

    def plan(self, backend: AttentionBackend) -> Any:
        """What the back end makes of the reads."""
        return backend.plan(self.reads, self.cache, self.group, self.sliding)

    def answers(self, backend: AttentionBackend, plan: Any) -> list[Tensor]:
        """Of every layer, all rows."""
        return [backend.attend(self.q, self.cache, layer, plan, self.scale) for layer in range(self.num_layers)]

    def shorter(self) -> Situation:
        """The same cache with a token less in every row, as after a rollback."""
        committed = (self.reads.committed - 1).clamp(min=0)
        lengths = committed.tolist()
        longest, is_uniform = max(lengths) + self.reads.corner.shape[1], len(set(lengths)) == 1
        return replace(self, reads=replace(self.reads, committed=committed, longest=longest, uniform=is_uniform))

    def row(self, row: int, num_layers: int | None = None) -> Situation:
        """The same row alone in its batch, with the first `num_layers` layers (None: all)."""
        whole, pick = self.cache, slice(row, row + 1)
        longest = int(whole.committed[row]) + self.reads.corner.shape[1]
        layers = num_layers or self.num_layers
        alone = KvCache(layers, 1, whole.kv_heads, longest, whole.head_dim, whole.kv.dtype, whole.kv.device)
        alone.kv.copy_(whole.kv[:layers, :, pick, :, : alone.slots])
        alone.committed = whole.committed[pick].clone()
        lists = self.reads.index  # no longer than the cache
        index = None if lists is None else lists[:layers, pick, :, : alone.capacity].contiguous()
        reads = replace(self.reads, committed=alone.committed, longest=longest, uniform=True, rows=None, index=index)
        return replace(self, q=self.q[pick], cache=alone, reads=reads)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


Make = Callable[..., Case]


def cases(need: Need | None = None) -> Iterator[Case]:
    """Every case within `need`: its device, dtype, head size and group, at most its queries, and only what it asks for.

    None: all head sizes, groups and dtypes that we know, everything that the seam can ask, on every device of this machine.
    """
    for device, dtype in _places(need):
        for family in (_views, _borders, _window_edges, _widths, _sizes, _queries, _prompts, _sliding, _lists, _changes):
            for case in family(_maker(device, dtype, need)):
                is_other = case.query_dtype is None or case.query_dtype.itemsize > dtype.itemsize
                if is_other and (need is None or _is_within(case.need, need)):
                    yield case


def _places(need: Need | None) -> list[tuple[str, torch.dtype]]:
    if need is not None:
        return [(need.device, need.dtype)]
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [(device, dtype) for device in devices for dtype in DTYPES]


def _maker(device: str, dtype: torch.dtype, need: Need | None) -> Make:
    """Fills in head size and group, which change from case to case in no rhythm with anything else."""

    def make(
        family: str, lengths: tuple[int, ...], corner: Corner, view: KvView = FULL, sliding: int | None = None,
        head_dim: int | None = None, group: int | None = None, **more: object,
    ) -> Case:
        draw = random.Random(f"{family} {lengths} {corner.name} {view} {more}")
        drawn_dim, drawn_group = draw.choice(HEAD_DIMS), draw.choice(GROUPS)
        sizes = (need.head_dim, need.group) if need else (head_dim or drawn_dim, group or drawn_group)
        asked = Need(device, dtype, *sizes, max_queries=len(corner.queries), tree=not corner.is_chain,
                     window=view.kind == "window", index_list=view.kind == "snapkv", sliding=sliding is not None)  # fmt: skip
        return Case(family, lengths, corner, view, asked, sliding=sliding, **more)  # type: ignore[arg-type]

    return make


def _is_within(asked: Need, need: Need) -> bool:
    extras = ((asked.tree, need.tree), (asked.window, need.window), (asked.sliding, need.sliding),
              (asked.index_list, need.index_list))  # fmt: skip
    return asked.max_queries <= need.max_queries and all(allowed or not wanted for wanted, allowed in extras)


def _views(make: Make) -> Iterator[Case]:
    """Every view with every kind of corner, where windows, sinks and corner overlap."""
    corners = (chain(1), chain(5), star(5), tree(7), leaves(9), draft_step(1), draft_step(3))
    for lengths in ((0, 0), (1, 7), (64, 64), (65, 63), (0, 130), (20, 16)):
        for view in (FULL, *WINDOWS):
            yield from (make("views", lengths, corner, view) for corner in corners)


def _borders(make: Make) -> Iterator[Case]:
    """Lengths around the blocks and chunks of keys, alone and beside a row of another length; a cache filled to its end."""
    for length in BORDERS:
        for view in (FULL, KvView.window(4, 60), KvView.window(64, 1990)):
            yield from (make("borders", (length,), corner, view, kv_heads=1) for corner in (chain(1), chain(5), tree(9)))
        yield make("borders", (length, 70, 0), tree(5))
    yield from (make("last slot", (length, 3), corner) for length, corner in ((250, chain(5)), (254, chain(1))))


def _window_edges(make: Make) -> Iterator[Case]:
    """Windows whose first and last keys fall on, before and behind the borders of blocks of keys."""
    for edge in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128):
        yield make("window edges", (400, 150), chain(2), KvView.window(edge, 150))
        yield make("window edges", (400, edge), star(3), KvView.window(0, 64 + edge))


def _widths(make: Make) -> Iterator[Case]:
    """Every number of queries that blocks of rows divide badly, in chains and trees."""
    for width in WIDTHS:
        for group in (1, 2, 4):
            yield make("widths", (70, 131), chain(width), group=group)
            yield make("widths", (70, 9), tree(width), group=group)
        yield make("widths", (600, 33), tree(width), KvView.window(4, 100))


def _sizes(make: Make) -> Iterator[Case]:
    """Every head size with every group, and KV heads that are no power of two."""
    for head_dim in HEAD_DIMS:
        for group in GROUPS:
            yield make("sizes", (65, 3), tree(5), head_dim=head_dim, group=group, kv_heads=3)
            yield make("sizes", (129,), draft_step(0), head_dim=head_dim, group=group, kv_heads=1)


def _queries(make: Make) -> Iterator[Case]:
    """Queries in other layouts and in float32 over shorter KV, and so large that an online maximum jumps."""
    for corner in (chain(1), chain(5), tree(9)):
        for layout in ("sliced", "transposed"):
            yield make("queries", (90, 5), corner, layout=layout)
            yield make("queries", (90, 5), corner, layout=layout, query_dtype=torch.float32)
        for view in (FULL, KvView.window(4, 60)):
            yield from (make("queries", (2100,), corner, view, gain=gain, kv_heads=1) for gain in (3.0, 30.0))


def _prompts(make: Make) -> Iterator[Case]:
    """Chunks of prompts: longer than any round, from the start and further on."""
    for lengths in ((0, 0), (0, 40), (300, 300)):
        for view in (FULL, KvView.window(4, 60)):
            yield make("prompts", lengths, chain(129), view)
    yield make("prompts", (0, 0), chain(7))


def _sliding(make: Make) -> Iterator[Case]:
    """A model's own sliding-window layers, alone and below a view."""
    for lengths in ((0, 0), (50, 20), (15, 16)):
        for view in (FULL, KvView.window(4, 8)):
            yield from (make("sliding", lengths, corner, view, SLIDING) for corner in (chain(1), chain(5), tree(7)))


def _lists(make: Make) -> Iterator[Case]:
    """Keys listed per layer and head beside a window, in chains and trees: of rows that list everything, some and little of
    what they hold, over more than a chunk of keys, and where a list and the window would overlap if it were read to its end."""
    for lengths in ((0, 1), (7, 90), (64, 65), (150, 3)):
        for view in LISTS:
            yield from (make("lists", lengths, c, view) for c in (chain(1), chain(5), draft_step(3), tree(7), leaves(9)))
    yield from (make("lists", (2300, 2049), corner, LONG_LISTS, kv_heads=1) for corner in (chain(1), tree(9)))
    yield from (make("lists", (130, 2100, 5, 64), corner, LISTS[2], live=(0, 2)) for corner in (chain(5), leaves(9)))


def _changes(make: Make) -> Iterator[Case]:
    """Rows that need very different work, for what must not change when the batch, the threads or the lengths do."""
    for corner in (chain(1), chain(5), tree(16)):
        for view in (FULL, KvView.window(4, 12), KvView.window(64, 1990), LISTS[3]):
            yield make(CHANGES, (2100, 5, 700), corner, view)
        yield make(CHANGES, (130, 2100, 5, 64), corner, live=(0, 2))
