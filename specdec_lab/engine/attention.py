"""The seam to hardware: what one forward reads (`Reads`), and the back ends that attend to it.

A back end plans once per forward (masks, indices: shared by all layers) and attends once per layer. `reference` says what
is meant, in float64; `sdpa` always works. Which one runs is decided in backends.py. Not known here: models, drafting,
acceptance.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..records import KvView
from .cache import KvCache


@dataclass(frozen=True, slots=True)
class Need:
    """What a run will ask of a back end."""

    device: str
    dtype: torch.dtype
    head_dim: int
    group: int  # query heads per KV head
    max_queries: int = 64
    tree: bool = False
    window: bool = True
    index_list: bool = False
    sliding: bool = False
    softcap: bool = False
    sink_logits: bool = False


@dataclass(frozen=True, slots=True)
class Reads:
    """Which slots the queries of one forward may read.

    A row's slots are its committed prefix, then the *corner*: nodes appended in this round at committed + node.
    committed     [B] tokens of the prefix
    corner        [T, C] bool: which corner node each query sees, itself included
    node_depths   [C] distance of each corner node from the root; its position is committed + depth
    query_nodes   [T] which corner node each query is
    view          what of prefix and corner is visible at all: a key at position p is seen from position q iff
                  p < sink or q - p < recent (a window), q - p < recent or it is listed (snapkv), always (full)
    longest       max(committed) + C, a host integer
    uniform       all rows have equal committed length
    causal        the corner is a chain: every query sees all nodes before it
    rows          [R] int32 sequences that still emit, where not all do: a back end may leave the others alone
    index         [layers, B, Hkv, N] int32 slots listed by SnapKV, ascending; a list counts as far as num_listed says
    key           names corner, node_depths and query_nodes where they will be met again, so that a back end may keep what
                  it made of them; the corner of a chain needs no name
    """

    committed: Tensor
    corner: Tensor
    node_depths: Tensor
    query_nodes: Tensor
    view: KvView
    longest: int
    uniform: bool
    causal: bool = False
    rows: Tensor | None = None
    index: Tensor | None = None
    key: Hashable = None

    @property
    def num_queries(self) -> int:
        """T, queries per row."""
        return self.corner.shape[0]

    @property
    def positions(self) -> Tensor:
        """Absolute positions of the queries, [B, T]."""
        return self.committed[:, None] + self.node_depths[self.query_nodes]

    @property
    def slots(self) -> Tensor:
        """Cache slots of the queries, [B, T]."""
        return self.committed[:, None] + self.query_nodes

    @property
    def is_causal_prefill(self) -> bool:
        """Whether this is plain causal attention over an empty prefix."""
        return self.causal and self.longest == self.corner.shape[1] == self.num_queries and self.view.kind == "full"

    def visible(self, keys: Tensor, sliding: int | None = None) -> Tensor:
        """Which of the slots keys [B or 1, N] each query may read: bool [B or 1, T, N]. This is the definition.

        sliding  window of a model's own sliding-window layers, in tokens, or None
        """
        num_nodes = self.corner.shape[1]
        node = keys - self.committed[: keys.shape[0], None]  # [B or 1, N], negative in the prefix
        inside = node.clamp(0, num_nodes - 1)
        seen = (node < 0)[:, None, :] | ((node >= 0) & (node < num_nodes))[:, None, :] & self.corner[:, inside].transpose(0, 1)
        depth = torch.where(node < 0, node, self.node_depths[inside])  # distance from the root, prefix negative
        distance = self.node_depths[self.query_nodes][None, :, None] - depth[:, None, :]
        if self.view.kind == "snapkv":
            seen = seen & (distance < self.view.recent)  # the lists, which differ by layer and head, are not in here
        if self.view.kind == "window":
            position = self.committed[: depth.shape[0], None] + depth
            seen = seen & ((distance < self.view.recent) | (position < self.view.sink)[:, None, :])
        if sliding is not None:
            seen = seen & (distance < sliding)
        return seen

    @property
    def num_listed(self) -> Tensor:
        """[B] how many entries of a row's lists count: as many as there are committed keys before the shallowest window.

        So that no key is read twice; lists of rows with fewer keys name all of them, and grow with the row.
        """
        assert self.index is not None
        before = self.committed + (self.node_depths[self.query_nodes].min() - self.view.recent + 1)
        return before.clamp(min=0, max=self.index.shape[-1]).minimum(self.committed)

    def listed(self, layer: int, slots: int) -> Tensor:
        """Which of the first slots a layer's lists name: bool [B, Hkv, slots]. With `visible`, this is the definition."""
        assert self.index is not None
        lists = self.index[layer].long()
        counts = torch.arange(lists.shape[-1], device=lists.device) < self.num_listed[:, None, None]
        # entries that do not count go to one slot more, cut off
        named = torch.zeros(*lists.shape[:2], slots + 1, dtype=torch.bool, device=lists.device)
        return named.scatter_(2, torch.where(counts, lists, slots), True)[..., :slots]


@lru_cache(maxsize=512)
def _chain(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lower-triangular corner and node numbers of a chain: every round asks for them again."""
    order = torch.arange(length, device=device)
    return order[:, None] >= order[None, :], order


def chain_order(length: int, device: torch.device) -> Tensor:
    """0, 1, ... length - 1, always the same tensor."""
    return _chain(length, device)[1]


def chain_reads(
    committed: Tensor, length: int, view: KvView, longest_committed: int, uniform: bool, rows: Tensor | None = None
) -> Reads:
    """Reads of `length` tokens appended in causal order: a verify of a chain, or a chunk of a prompt."""
    corner, order = _chain(length, committed.device)
    return Reads(committed, corner, order, order, view, longest_committed + length, uniform, True, rows)


def draft_step_reads(
    committed: Tensor, step: int, view: KvView, longest_committed: int, uniform: bool, rows: Tensor | None = None
) -> Reads:
    """Reads of the draft token at depth `step` of a chain, which attends to its `step` predecessors too."""
    corner, order = _chain(step + 1, committed.device)
    return Reads(committed, corner[-1:], order, order[-1:], view, longest_committed + step + 1, uniform, True, rows)


@dataclass(frozen=True, slots=True)
class Promises:
    """What a back end promises beyond right numbers, for rounds of up to 64 queries; conformance/ holds it to that.

    masks_loads   slots beyond a row's corner may hold NaN. If not, they must hold finite numbers, as KvCache sees to
    same_alone    a row has the same bits alone as in any batch
    same_threads  the same bits come out on any number of threads
    """

    masks_loads: bool = True
    same_alone: bool = True
    same_threads: bool = True


class AttentionBackend(Protocol):
    """What a back end must offer; `attend` may be called once per layer with one plan."""

    name: str
    promises: Promises

    def why_not(self, need: Need) -> str | None:
        """None if this back end can, else one plain sentence."""

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """Everything about `reads` that does not depend on the layer."""

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """q [B, T, Hq, D] -> [B, T, Hq, D]: softmax over exactly the visible keys of the layer."""


@dataclass(frozen=True, slots=True)
class DensePlan:
    """Slots to read, [B, N] or None for the first `longest` ones, and which query sees which."""

    slots: Tensor | None
    longest: int
    mask: Tensor | None  # [B or 1, 1, T*G or T, N], additive for sdpa, bool for the reference
    causal: bool = False
    reads: Reads | None = None  # where index lists add keys to these, before them; the mask of sdpa covers both


class ReferenceBackend:
    """The meaning: float64, dense, masked loads. For tests and for reading; slow."""

    name = "reference"
    promises = Promises(same_alone=False, same_threads=False)  # sums in float64, in whatever order torch takes

    def why_not(self, need: Need) -> str | None:
        if need.softcap or need.sink_logits:
            return "reference does not implement logit soft-capping or sink logits"
        return _why_no_lists(need)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> DensePlan:
        slots = torch.arange(reads.longest, device=reads.committed.device)[None].expand(reads.committed.shape[0], -1)
        listed = None if reads.index is None else reads
        return DensePlan(None, reads.longest, reads.visible(slots, sliding)[:, None], reads=listed)

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: DensePlan, scale: float) -> Tensor:
        k, v = (part[:, :, : plan.longest].double() for part in cache.layer(layer))  # [B, H, N, D]
        assert plan.mask is not None
        mask = plan.mask  # [B, 1 or Hkv, T, N]
        if plan.reads is not None:
            mask = mask | plan.reads.listed(layer, plan.longest)[:, :, None]
        read = mask.any(-2)[..., None]  # [B, 1 or Hkv, N, 1]: a slot nobody sees may hold NaN
        k, v = torch.where(read, k, 0.0), torch.where(read, v, 0.0)
        group = q.shape[2] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        if mask.shape[1] > 1:
            mask = mask.repeat_interleave(group, 1)
        scores = q.double().transpose(1, 2) @ k.transpose(-1, -2) * scale
        out: Tensor = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).to(q.dtype)


class SdpaBackend:
    """torch's scaled_dot_product_attention. Query heads of a KV head are folded into rows; windows are gathered.

    Masks scores, not loads: slots must hold finite numbers (KvCache starts with zeros).
    """

    name = "sdpa"
    promises = Promises(masks_loads=False, same_alone=False, same_threads=False)

    def why_not(self, need: Need) -> str | None:
        if need.softcap or need.sink_logits:
            return "sdpa has no logit soft-capping and no sink logits"
        return _why_no_lists(need)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> DensePlan:
        if reads.is_causal_prefill and sliding is None:
            return DensePlan(None, reads.longest, None, causal=True)
        dtype = cache.kv.dtype
        if reads.index is not None:
            return self._plan_lists(reads, group, dtype)
        width = (reads.view.max_tokens or 0) + reads.corner.shape[1]
        if reads.view.kind == "window" and width < reads.longest:
            slots, valid = self.window_slots(reads, width)
            return DensePlan(slots, reads.longest, _additive(reads.visible(slots, sliding) & valid[:, None], group, dtype))
        rows = 1 if reads.uniform else reads.committed.shape[0]
        keys = torch.arange(reads.longest, device=reads.committed.device)[None].expand(rows, -1)
        if reads.uniform and reads.causal and reads.num_queries == 1 and reads.view.kind == "full" and sliding is None:
            return DensePlan(None, reads.longest, None)  # one query sees everything
        return DensePlan(None, reads.longest, _additive(reads.visible(keys, sliding), group, dtype))

    def _plan_lists(self, reads: Reads, group: int, dtype: torch.dtype) -> DensePlan:
        """Listed keys, then the window: which entries count depends on the row, so one mask serves all layers and heads."""
        assert reads.index is not None
        slots, valid = self.window_slots(reads, min(reads.view.recent + reads.corner.shape[1], reads.longest))
        near = reads.visible(slots) & valid[:, None]  # [B, T, window]
        listed = torch.arange(reads.index.shape[-1], device=slots.device) < reads.num_listed[:, None]
        both = torch.cat([listed[:, None].expand(-1, near.shape[1], -1), near], -1)
        return DensePlan(slots, reads.longest, _additive(both, group, dtype), reads=reads)

    @staticmethod
    def window_slots(reads: Reads, width: int) -> tuple[Tensor, Tensor]:
        """Sinks, then the last slots up to the corner's end: [B, width] without repeats, and which entries are real."""
        sink = reads.view.sink
        end = reads.committed[:, None] + reads.corner.shape[1]
        order = torch.arange(width, device=end.device)[None]
        recent = end - width + order  # the tail entries line up with the end of the corner
        slots = torch.where(order < sink, order, recent)
        valid = (order < sink) & (order < end) | (order >= sink) & (recent >= sink)
        return slots.clamp(min=0), valid

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: DensePlan, scale: float) -> Tensor:
        if plan.reads is not None and plan.reads.index is not None and plan.slots is not None:
            lists = plan.reads.index[layer]
            near = plan.slots[:, None].expand(-1, lists.shape[1], -1)
            k, v = cache.gather(layer, torch.cat([lists, near], -1))
        elif plan.slots is not None:
            k, v = cache.gather(layer, plan.slots)
        else:
            k, v = (part[:, :, : plan.longest] for part in cache.layer(layer))
        batch, queries, heads, dim = q.shape
        group, given = heads // k.shape[1], q.dtype
        q = q.to(k.dtype)
        if plan.causal:
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=group > 1
            )
            return out.transpose(1, 2).to(given)
        # [B, T, Hkv, G, D] -> [B, Hkv, G*T, D]: a KV row is read once for all its query heads
        folded = q.view(batch, queries, heads // group, group, dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(batch, heads // group, group * queries, dim)
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=plan.mask, scale=scale)
        return out.view(batch, heads // group, group, queries, dim).permute(0, 3, 1, 2, 4).reshape(q.shape).to(given)


def _why_no_lists(need: Need) -> str | None:
    if need.index_list and need.sliding:
        return "index lists (SnapKV) and a model's own sliding-window layers are not read together"
    return None


def _additive(visible: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """bool [B, T, N] -> 0 or -inf, [B, 1, G*T, N]."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
    return mask.repeat(1, group, 1)[:, None] if group > 1 else mask[:, None]
