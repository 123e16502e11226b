"""Attention of a draft whose trained context is shorter than the text: sinks are read as if they stood next to the window.

A window of sink + recent tokens then looks like a text of that length, whatever the length of the real one (StreamingLLM,
Xiao 2023). Rotary positions are relative, so the window's keys stay as they are; towards the sinks a query is turned back to
where it would stand. Not known here: models, drafting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionBackend, Need, Promises, Reads, SdpaBackend
from .backends import BackendUnavailable, pick
from .cache import KvCache
from .models.rotation import Rotation, turn
from .models.runner import Runner

QUERIES = 64  # that are scored together: a chunk of a prompt holds its scores in memory


def draft_backend(runner: Runner, name: str) -> AttentionBackend:
    """The back end of a draft: the one asked for, or CachePositions where its sinks move; BackendUnavailable with a reason."""
    if runner.rotation is None:
        return pick(name, runner.need())[0]
    made = CachePositions(runner.rotation)
    reason = made.why_not(runner.need())
    if reason is not None:
        raise BackendUnavailable(f"{reason}. Use draft_positions='absolute'.")
    return made


@dataclass(frozen=True, slots=True)
class MovedPlan:
    """Slots to read [B, N], which of them hold sinks [B, N], which query sees which [B, T, N], and cos and sin of the turn
    that takes each query back, [B, T, 1, D/2]."""

    slots: Tensor
    sinks: Tensor
    visible: Tensor
    back: tuple[Tensor, Tensor]


@dataclass(slots=True)
class CachePositions:
    """An attention back end for one model; what needs no moving goes to sdpa.

    A query at position p sees the sinks from min(p, sink + recent - 1): each at its own, in chains, trees, ragged rows and
    chunks of a prompt.
    """

    rotation: Rotation
    name: str = "cache_positions"
    promises: Promises = Promises(masks_loads=False, same_alone=False, same_threads=False)
    _unmoved: SdpaBackend = field(default_factory=SdpaBackend)

    def why_not(self, need: Need) -> str | None:
        """See AttentionBackend.why_not."""
        if need.index_list or need.sliding:
            return "cache positions go with windows, not with index lists (SnapKV) or a model's own sliding-window layers"
        return self._unmoved.why_not(need)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """A MovedPlan where some query may stand beyond its window, sdpa's plan else."""
        view = reads.view
        if view.kind != "window" or reads.longest <= view.sink + view.recent:
            return self._unmoved.plan(reads, cache, group, sliding)
        width = min(view.sink + view.recent + reads.corner.shape[1], reads.longest)
        slots, valid = SdpaBackend.window_slots(reads, width)
        gap = (reads.positions - (view.sink + view.recent - 1)).clamp(min=0)  # [B, T]
        cos, sin = self.rotation.at(-gap)
        visible = reads.visible(slots, sliding) & valid[:, None]
        return MovedPlan(slots, _positions(reads, slots) < view.sink, visible, (cos[:, :, None], sin[:, :, None]))

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        if not isinstance(plan, MovedPlan):
            return self._unmoved.attend(q, cache, layer, plan, scale)
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (part.to(wide) for part in cache.gather(layer, plan.slots))  # [B, Hkv, N, D]
        grouped = q.to(wide).unflatten(2, (k.shape[1], -1))  # [B, T, Hkv, G, D]
        from_back = turn(q.to(wide), *plan.back).unflatten(2, (k.shape[1], -1))
        out = [
            _some(here, back, k, v, plan.sinks, visible, scale)
            for here, back, visible in zip(*(x.split(QUERIES, 1) for x in (grouped, from_back, plan.visible)), strict=True)
        ]
        return torch.cat(out, 1).flatten(2, 3).to(q.dtype)


def _some(here: Tensor, back: Tensor, k: Tensor, v: Tensor, sinks: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention of a few queries [B, T, Hkv, G, D], which look at sinks from `back` and at all else from `here`."""
    scores = torch.einsum("bthgd,bhnd->bhgtn", here, k)
    moved = torch.einsum("bthgd,bhnd->bhgtn", back, k)
    scores = torch.where(sinks[:, None, None, None], moved, scores) * scale
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhgtn,bhnd->bthgd", weights, v)


def _positions(reads: Reads, slots: Tensor) -> Tensor:
    """[B, N] where the keys in these slots stand: nodes of the corner by depth."""
    node = slots - reads.committed[:, None]
    depth = reads.node_depths[node.clamp(0, reads.corner.shape[1] - 1)]
    return torch.where(node < 0, slots, reads.committed[:, None] + depth)
