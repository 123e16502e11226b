"""SnapKV (Li 2024): a self-draft keeps the committed tokens that the last tokens of the text attend to.

Lists of slots per layer and KV head. Like a recent window they cost nothing to keep: drafts read them in the target's own
KV. Choosing costs one forward of a few tokens, booked to drafting. What is selected: snapkv_reference.py. Not known here:
acceptance, records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import KvView
from .attention import AttentionBackend, Need, Promises, Reads, chain_reads
from .batch import Batch, Forward, count_forward
from .cache import KvCache
from .clocks import Phase
from .network import DRAFT, Network

OBSERVED = 32  # tokens whose queries choose
POOL = 5  # neighbouring positions that share their importance
NEVER = 1 << 62  # tokens until lists that are not refreshed are chosen again


def importance(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """How much the observing queries attend to each position, [Hkv, C]; as in snapkv_reference.

    q  [W, Hq, D] queries of the last W of C positions; k [Hkv, C, D]
    """
    observed, _, dim = q.shape
    kv_heads, context, _ = k.shape
    folded = q.float().transpose(0, 1).reshape(kv_heads, -1, dim)  # [Hkv, G*W, D]
    scores = (folded @ k.float().transpose(1, 2) * scale).view(kv_heads, -1, observed, context)
    order = torch.arange(context, device=k.device)
    future = order > order[context - observed :, None]  # [W, C]
    mass = scores.masked_fill_(future, -torch.inf).softmax(-1).sum((1, 2))
    # pooling is linear: summing heads before or after is the same
    return F.avg_pool1d(mass[:, None], POOL, 1, POOL // 2)[:, 0]


def select(q: Tensor, k: Tensor, size: int, recent: int, scale: float) -> Tensor:
    """[Hkv, size] int32 the most important positions before the recent window, ascending; of equals the lower ones.

    There must be at least `size` positions before it: C + 1 - recent.
    """
    mass = importance(q, k, scale)[:, : k.shape[1] + 1 - recent]
    best = mass.sort(dim=-1, descending=True, stable=True).indices[:, :size]  # stable: of equals the lower
    return best.sort(-1).values.to(torch.int32)


@dataclass(slots=True)
class Observer:
    """A back end that also shows the queries of every layer to `see`(q, cache, layer, scale)."""

    backend: AttentionBackend
    see: Callable[[Tensor, KvCache, int, float], None]
    name: str = field(init=False)
    promises: Promises = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.promises = self.backend.name, self.backend.promises

    def why_not(self, need: Need) -> str | None:
        """See AttentionBackend.why_not."""
        return self.backend.why_not(need)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """See AttentionBackend.plan."""
        return self.backend.plan(reads, cache, group, sliding)

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        self.see(q, cache, layer, scale)
        return self.backend.attend(q, cache, layer, plan, scale)


@dataclass(frozen=True, slots=True)
class Lists:
    """Index lists [layers, B, Hkv, N] (see Reads.index), and each row's committed length when they were chosen.

    The recent window of that moment begins behind every entry. Windows only move on, so a list and a window never share a
    key; session and lists go back together.
    """

    index: Tensor
    at: tuple[int, ...]


class SnapKv:
    """The lists of one session: chosen when a view first asks, at the end of the latest text; again as its refresh says.

    Lists of a text stay when a session is rewound to its end, so that configurations are compared on equal ground.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._text: tuple[int, ...] = (0,) * network.cache.batch  # committed tokens when the latest text had been read
        self._of_text: dict[tuple[int, int], Lists] = {}  # by budget and recent
        self._now: dict[KvView, Lists] = {}

    def begin(self, known: list[int]) -> None:
        """A text ends here, for the first time or again: lists chosen later are forgotten."""
        if tuple(known) != self._text:
            self._text = tuple(known)
            self._of_text.clear()
        self._now.clear()

    def left(self, batch: Batch, view: KvView) -> int:
        """Tokens that some live row may still commit before `view` lists anew; 0 or less: now."""
        if not view.refresh:
            return NEVER
        last = self._now[view].at if view in self._now else self._text
        ends = zip(batch.host_lengths, last, batch.host_live, strict=True)
        return view.refresh - max((length - 1 - at for length, at, live in ends if live), default=0)

    def lists(self, batch: Batch, view: KvView) -> tuple[Lists, tuple[Forward, ...]]:
        """What `view` lists now, and the forwards that choosing it took (none in most rounds).

        A refresh re-scores all rows as soon as one live row has committed `refresh` tokens since the last choice.
        """
        if self.left(batch, view) <= 0:
            self._now[view], forwards = self._choose(batch, view, tuple(n - 1 for n in batch.host_lengths))
            return self._now[view], forwards
        if view in self._now:
            return self._now[view], ()
        self._now[view], forwards = self._text_lists(batch, view)
        return self._now[view], forwards

    def _text_lists(self, batch: Batch, view: KvView) -> tuple[Lists, tuple[Forward, ...]]:
        key = view.budget, view.recent
        if key in self._of_text:
            return self._of_text[key], ()
        self._of_text[key], forwards = self._choose(batch, view, self._text)
        return self._of_text[key], forwards

    def _choose(self, batch: Batch, view: KvView, at: tuple[int, ...]) -> tuple[Lists, tuple[Forward, ...]]:
        """Lists as the tokens before `at` choose them. Rows whose whole context fits list all of it, which takes no forward."""
        cache = self._network.cache
        size = min(view.budget, cache.capacity)
        layers, _, rows, kv_heads = cache.kv.shape[:4]
        everything = torch.arange(size, dtype=torch.int32, device=cache.kv.device)
        lists = Lists(everything.expand(layers, rows, kv_heads, size).contiguous(), at)
        long = [row for row, length in enumerate(at) if length + 1 - view.recent > size]
        if not long:
            return lists, ()
        observed = [min(OBSERVED, length) for length in at]

        def see(q: Tensor, cache: KvCache, layer: int, scale: float) -> None:
            keys, _ = cache.layer(layer)
            for row in long:
                lists.index[layer, row] = select(q[row, : observed[row]], keys[row, :, : at[row]], size, view.recent, scale)

        forward = self._observe(batch, at, observed, see)
        counted = Forward(
            forward.rows, forward.queries, forward.keys, forward.pairs, sum(at[row] for row in long),
            sum(observed[row] * at[row] for row in long),
        )  # fmt: skip
        return lists, (counted,)

    def _observe(
        self, batch: Batch, at: tuple[int, ...], observed: list[int], see: Callable[[Tensor, KvCache, int, float], None]
    ) -> Forward:
        """Feed the last observed[b] of at[b] committed tokens once more, for their queries; the cache keeps what it holds."""
        network, width = self._network, max(observed)
        starts = [length - many for length, many in zip(at, observed, strict=True)]
        start = torch.tensor(starts, device=batch.ids.device)
        order = torch.arange(width, device=start.device)
        tokens = batch.ids.gather(1, start[:, None] + order)
        reads = chain_reads(start, width, KvView.full(), max(starts), min(starts) == max(starts))
        # all tokens count as padding, whose K/V go to the scratch slot: the KV of these tokens is already there
        padding = torch.ones_like(tokens, dtype=torch.bool)
        network.clock.forward(*DRAFT)
        network.runner.forward(tokens, reads, network.cache, Observer(network.backend, see), network.clock, None, padding)
        network.clock.enter(Phase.DRAFT_OTHER)
        return count_forward(starts, width, KvView.full())
