"""The Triton kernels as an attention back end.

Rounds (up to 64 queries per row) run in the kernels of `specdec_kernels.tree_attention`: prefix, corner, windows and index
lists, nothing copied and nothing masked that need not be. Longer chunks, which only prompts have, are compute-bound and go
through sdpa. Not known here: how the kernels work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.tree_attention import gpu

from .attention import Need, Promises, Reads, SdpaBackend
from .cache import KvCache


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """One forward's reads as the kernel takes them; everything is on the device but `longest`.

    corner   the packed corner, node depths and query nodes
    window   the kernel's scalars, or None where everything is visible
    longest  keys that a row reads at most
    """

    committed: Tensor
    corner: tuple[Tensor, Tensor, Tensor]
    window: Tensor | None
    index: Tensor | None
    longest: int
    workspace: Tensor


class TritonBackend:
    """Split, packed attention on CUDA GPUs, or on the CPU in Triton's interpreter, where only tests go."""

    name = "triton"
    promises = Promises()

    def __init__(self) -> None:
        self._prompts = SdpaBackend()

    def why_not(self, need: Need) -> str | None:
        """None = usable, else the reason in one sentence."""
        if need.softcap or need.sink_logits:
            return "the Triton kernels have no logit soft-capping and no sink logits"
        if need.index_list and need.sliding:
            return "index lists (SnapKV) and a model's own sliding-window layers are not read together"
        if need.tree and need.max_queries > gpu.MAX_QUERIES:
            return f"the Triton kernels take trees of up to {gpu.MAX_QUERIES} nodes, root counted, not {need.max_queries}"
        return gpu.why_not(need.device, need.head_dim, need.dtype)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """A TritonPlan for rounds, sdpa's plan for prompt chunks. Nothing waits for the device."""
        if reads.num_queries > gpu.MAX_QUERIES:
            return self._prompts.plan(reads, cache, group, sliding)
        corner, window = _constants(reads, cache, sliding)
        chunk = gpu.default_chunk(window is not None)
        # one part or several are kernels of their own: whoever may grow into several begins with them, or they would be
        # compiled in the middle of a run
        longest = max(_most_keys(reads, sliding, reads.longest), min(_most_keys(reads, sliding, cache.slots), chunk + 1))
        floats = gpu.workspace_floats(cache.batch, cache.kv_heads * group, reads.num_queries, cache.head_dim, longest, chunk)
        return TritonPlan(reads.committed, corner, window, reads.index, longest, _workspace(cache, floats))

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        if not isinstance(plan, TritonPlan):
            return self._prompts.attend(q, cache, layer, plan, scale)
        out, _ = gpu.tree_attention(
            q, *cache.layer(layer), plan.committed, *plan.corner, scale=scale, window=plan.window, longest=plan.longest,
            index=None if plan.index is None else plan.index[layer], workspace=plan.workspace,
        )  # fmt: skip
        return out


def _constants(reads: Reads, cache: KvCache, sliding: int | None) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """What the kernel reads of a corner and a view; of a chain or a named tree made once per cache."""
    key = ("triton", reads.num_queries, reads.corner.shape[1], reads.view, sliding, reads.key)
    kept = reads.causal or reads.key is not None
    if kept and key in cache.prepared:
        found: tuple[tuple[Tensor, Tensor, Tensor], Tensor | None] = cache.prepared[key]
        return found
    corner = gpu.pack_corner(reads.corner), reads.node_depths.to(torch.int32), reads.query_nodes.to(torch.int32)
    view, window = reads.view, None
    if view.kind != "full" or sliding is not None:
        window = gpu.window_scalars(view.sink, view.recent, cache.kv.device, sliding)
    if kept:
        cache.prepared[key] = corner, window
    return corner, window


def _most_keys(reads: Reads, sliding: int | None, slots: int) -> int:
    """That a row reads which fills `slots`: kept keys, window and corner."""
    view = reads.view
    spans = [span for span in (view.recent, sliding) if span]
    if not spans:
        return slots
    kept = view.sink if reads.index is None else reads.index.shape[-1]
    return min(slots, kept + min(spans) + reads.corner.shape[1])


def _workspace(cache: KvCache, floats: int) -> Tensor:
    """Memory for partial results that stays with the cache and grows with its contexts."""
    workspace: Tensor | None = cache.prepared.get("triton workspace")
    if workspace is None or workspace.numel() < floats:
        workspace = torch.empty(floats + floats // 4, dtype=torch.float32, device=cache.kv.device)
        cache.prepared["triton workspace"] = workspace
    return workspace
