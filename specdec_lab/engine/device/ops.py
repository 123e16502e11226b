"""The operations of a round that have kernels, as one small seam with two implementations.

    reference  torch on any device: the meaning. Dense in float64, so for tests; its times are the host's, so right on a CPU
    triton     the kernels of specdec_kernels/*/gpu.py

No operation reads a value on the host; all may run while a CUDA graph is captured. Not known here: what a round is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec_kernels.ngram import reference as reference_ngram
from specdec_kernels.stamp import gpu as gpu_stamp
from specdec_kernels.stamp import reference as reference_stamp
from specdec_kernels.tree_attention import gpu as gpu_attention
from specdec_kernels.work_list import gpu as gpu_work_list

from ..drafters import NGRAM_SIZES
from .kernel_deciding import RoundKernels
from .program import Feed


class Ops(Protocol):
    """What round.py and forward.py call."""

    name: str
    max_queries: int

    def plan(
        self, feed: Feed, base: Tensor, kv: Tensor, heads: int, window: Tensor | None, stamps: Tensor | None,
        lists: Tensor | None = None,
    ) -> Any:
        """What all layers of one forward share. window: as DeviceState.window; None shows everything. stamps [layers, 2].

        lists  int32 [layers, B, Hkv, N] slots that stay visible before the window in place of its sinks, ascending; read as far
               as tree_attention/reference.py says
        """

    def attend(self, q: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        """q [B, T, Hq, D] -> [B, T, Hq, D] over kv [layers, 2, B, Hkv, S, D]; notes in the plan's stamps when it ran."""

    def rope_append(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, q_norm: Tensor | None,
        k_norm: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        """See specdec_kernels.rope_append: queries [B, T, Hq, D], rotated; K/V go to slots [B, T] of kv [2, B, Hkv, S, D]."""

    def compact(self, kv: Tensor, base: Tensor, path: Tensor, counts: Tensor) -> None:
        """Move the KV of nodes path [B, A], as far as counts [B] say, to slots base + 1 + i, in all layers."""

    def ngram_match(self, ids: Tensor, lengths: Tensor, depth: int, work: Tensor) -> tuple[Tensor, Tensor]:
        """See specdec_kernels.ngram: tokens [B, depth] that followed a text's last ones before, and how many: all or none."""

    def stamp(self, table: Tensor, number: Tensor, column: int) -> None:
        """Write the time into table, row number % rows."""


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """Which slots each query sees, [B, T, S], and where times go; what lists add, as far as counts [B] of them are read."""

    visible: Tensor
    stamps: Tensor | None
    lists: Tensor | None = None
    counts: Tensor | None = None

    def seen(self, layer: int) -> Tensor:
        """[B, Hkv or 1, T, S]"""
        if self.lists is None or self.counts is None:
            return self.visible[:, None]
        entries, slots = self.lists[layer].long(), self.visible.shape[2]
        counts = torch.arange(entries.shape[2], device=entries.device) < self.counts[:, None, None]
        # entries that do not count go to one slot more, cut off
        named = torch.zeros(*entries.shape[:2], slots + 1, dtype=torch.bool, device=entries.device)
        return self.visible[:, None] | named.scatter_(2, torch.where(counts, entries, slots), True)[:, :, None, :slots]


@dataclass(slots=True)
class ReferenceOps:
    """The meaning, in torch."""

    now: Callable[[], int] = time.perf_counter_ns
    name: str = "reference"
    max_queries: int = 1 << 20

    def plan(
        self, feed: Feed, base: Tensor, kv: Tensor, heads: int, window: Tensor | None, stamps: Tensor | None,
        lists: Tensor | None = None,
    ) -> ReferencePlan:
        """See Ops.plan."""
        num_nodes = feed.depths.shape[0]
        node = torch.arange(kv.shape[4], device=base.device) - base[:, None]  # [B, S], negative in the prefix
        inside = node.clamp(0, num_nodes - 1)
        corner = feed.corner[:, inside].transpose(0, 1)  # [B, T, S]
        visible = (node < 0)[:, None] | ((node >= 0) & (node < num_nodes))[:, None] & corner
        if window is not None:
            sink, recent = window[0], window[1]
            depth = torch.where(node < 0, node, feed.depths.long()[inside])
            near = (feed.turns[None, :, None] - depth[:, None]) < recent
            kept = (base[:, None] + depth < sink)[:, None]
            if lists is not None:
                before = base + feed.turns.min() - recent + 1
                counts = before.clamp(min=0, max=lists.shape[3]).minimum(base)
                return ReferencePlan(visible & near, stamps, lists, counts)
            visible = visible & (near | kept | (recent == 0))
        return ReferencePlan(visible, stamps)

    def attend(self, q: Tensor, kv: Tensor, layer: int, plan: ReferencePlan, scale: float) -> Tensor:
        """See Ops.attend."""
        if plan.stamps is not None:
            plan.stamps[layer, 0].fill_(self.now())
        group, seen = q.shape[2] // kv.shape[3], plan.seen(layer)
        read = seen.any(2)[..., None]  # a slot that nobody sees may hold NaN
        k, v = (torch.where(read, part.double(), 0.0).repeat_interleave(group, 1) for part in kv[layer].unbind(0))
        scores = (q.double().transpose(1, 2) @ k.transpose(-1, -2)) * scale
        seen = seen if seen.shape[1] == 1 else seen.repeat_interleave(group, 1)
        scores = scores.masked_fill(~seen, -torch.inf)
        out: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).to(q.dtype)
        if plan.stamps is not None:
            plan.stamps[layer, 1].fill_(self.now())
        return out

    def rope_append(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, q_norm: Tensor | None,
        k_norm: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        """See Ops.rope_append."""
        kv_heads, dim = kv.shape[2], kv.shape[4]
        work = torch.promote_types(qkv.dtype, torch.float32)
        heads = qkv.shape[2] // dim - 2 * kv_heads
        q, k, v = qkv.view(*positions.shape, -1, dim).to(work).split([heads, kv_heads, kv_heads], 2)
        if q_norm is not None and k_norm is not None:
            q, k = (F.rms_norm(x, (dim,), norm.to(work), eps) for x, norm in ((q, q_norm), (k, k_norm)))
        c, s = (table[positions][:, :, None].to(work) for table in (cos, sin))  # [B, T, 1, D/2]
        first, second = torch.cat([q, k], 2).chunk(2, -1)
        rotated = torch.cat([first * c - second * s, second * c + first * s], -1)
        at = slots[:, None, :, None].expand(-1, kv_heads, -1, dim)
        kv[0].scatter_(2, at, rotated[:, :, heads:].transpose(1, 2).to(kv.dtype))
        kv[1].scatter_(2, at, v.transpose(1, 2).to(kv.dtype))
        return rotated[:, :, :heads].to(qkv.dtype)

    def compact(self, kv: Tensor, base: Tensor, path: Tensor, counts: Tensor) -> None:
        """See Ops.compact."""
        order = torch.arange(path.shape[1], device=path.device)
        place = base[:, None] + 1 + order
        source = torch.where(order < counts[:, None], base[:, None] + path, place)
        wide = (*kv.shape[:4], path.shape[1], kv.shape[5])

        def over(slots: Tensor) -> Tensor:
            return slots[None, None, :, None, :, None].expand(wide)

        kv.scatter_(4, over(place), kv.gather(4, over(source)))  # read whole before anything is written

    def ngram_match(self, ids: Tensor, lengths: Tensor, depth: int, work: Tensor) -> tuple[Tensor, Tensor]:
        """See Ops.ngram_match."""
        return reference_ngram.ngram_match(ids, lengths, NGRAM_SIZES, depth, work)

    def stamp(self, table: Tensor, number: Tensor, column: int) -> None:
        """See Ops.stamp."""
        reference_stamp.stamp(table, number, column, self.now)


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """A forward's reads as the kernel takes them. No length of a sequence is in it: the work list is made on the device."""

    feed: Feed
    base: Tensor
    window: Tensor | None
    lists: Tensor | None
    stamps: Tensor | None
    work: gpu_attention.WorkList
    workspace: Tensor | None
    chunk: int


class TritonOps(ReferenceOps):
    """The kernels."""

    def __init__(self, kernels: RoundKernels) -> None:
        super().__init__(name="triton", max_queries=gpu_attention.MAX_QUERIES)
        self.kernels = kernels

    def rope_append(
        self, qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, q_norm: Tensor | None,
        k_norm: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        """See Ops.rope_append."""
        return self.kernels.rope_append(qkv, positions, slots, cos, sin, kv, q_norm, k_norm, eps)

    def compact(self, kv: Tensor, base: Tensor, path: Tensor, counts: Tensor) -> None:
        """See Ops.compact."""
        self.kernels.kv_compact(kv, path, counts, base)

    def ngram_match(self, ids: Tensor, lengths: Tensor, depth: int, work: Tensor) -> tuple[Tensor, Tensor]:
        """See Ops.ngram_match."""
        return self.kernels.ngram_match(ids, lengths, NGRAM_SIZES, depth, work)

    @staticmethod
    def has_timer(tensor: Tensor) -> bool:
        """Whether kernels over this tensor can read the time: not in the interpreter."""
        return tensor.device.type == "cuda"

    def plan(
        self, feed: Feed, base: Tensor, kv: Tensor, heads: int, window: Tensor | None, stamps: Tensor | None,
        lists: Tensor | None = None,
    ) -> Any:
        """See Ops.plan. One launch; the workspace is for the longest rows that the cache can hold."""
        chunk = gpu_attention.default_chunk(window is not None)
        slots, kv_heads = kv.shape[4], kv.shape[3]
        floats = gpu_attention.workspace_floats(base.shape[0], heads, feed.num_queries, kv.shape[5], slots, chunk)
        timed = stamps if self.has_timer(base) else None
        work = gpu_work_list.work_list(
            base, feed.depths, feed.nodes, kv_heads=kv_heads, chunk=chunk, list_len=0 if lists is None else lists.shape[3],
            window=window, longest=slots, stamps=timed,
        )  # fmt: skip
        workspace = torch.empty(floats, dtype=torch.float32, device=base.device) if floats else None
        return TritonPlan(feed, base, window, lists, timed, work, workspace, chunk)

    def attend(self, q: Tensor, kv: Tensor, layer: int, plan: Any, scale: float) -> Tensor:
        """See Ops.attend."""
        feed, stamps = plan.feed, None if plan.stamps is None else plan.stamps[layer]
        out, _ = gpu_attention.tree_attention(
            q, kv[layer, 0], kv[layer, 1], plan.base, feed.words, feed.depths, feed.nodes, scale=scale, window=plan.window,
            index=None if plan.lists is None else plan.lists[layer], stamps=stamps, workspace=plan.workspace,
            longest=kv.shape[4], chunk=plan.chunk, work=plan.work,
        )
        return out

    def stamp(self, table: Tensor, number: Tensor, column: int) -> None:
        """See Ops.stamp."""
        if self.has_timer(table):
            gpu_stamp.stamp(table, number, column)
        else:
            super().stamp(table, number, column)


def ops_for(name: str) -> Ops:
    """The operations called `name`; ValueError for one that does not exist."""
    if name not in ("reference", "triton"):
        raise ValueError(f"there are no operations {name!r} of a round; known: reference, triton")
    return TritonOps(RoundKernels.of("gpu")) if name == "triton" else ReferenceOps()
