"""The compiled CPU kernel as an attention back end.

Rounds (up to 64 queries per row) run in the kernel of `specdec_kernels.tree_attention`; longer chunks, which only prompts
have, are compute-bound and go through sdpa. Not known here: how the kernel is built.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.build import load_library
from specdec_kernels.tree_attention import cpu

from .attention import Need, Promises, Reads, SdpaBackend
from .cache import KvCache

INDEX_BYTES = 4  # of an entry of an index list


@dataclass(slots=True)
class CpuPlan:
    """A kernel call without its tensors of the layer, and the tensors it points to, which must outlive it."""

    call: cpu.Call
    kept: tuple[Tensor | None, ...]
    index: int = 0  # where layer 0's index lists begin; 0: there are none


class CpuBackend:
    """Compiled attention at the read limit of a CPU: sinks, windows and tree corners by address, no copies, no masks."""

    name = "cpu"
    promises = Promises()

    def __init__(self) -> None:
        self._prompts = SdpaBackend()

    def why_not(self, need: Need) -> str | None:
        """None = usable, else the reason in one sentence."""
        if need.device != "cpu":
            return f"the compiled CPU kernel does not run on {need.device}"
        if need.softcap or need.sink_logits or need.sliding:
            return "the compiled CPU kernel has no soft-capping, sink logits or sliding-window layers"
        if need.tree and need.max_queries > cpu.MAX_NODES:
            return f"the compiled CPU kernel takes trees of up to {cpu.MAX_NODES} nodes, root counted, not {need.max_queries}"
        return cpu.why_not(need.head_dim, need.dtype)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """A CpuPlan for rounds, sdpa's plan for prompt chunks."""
        if reads.num_queries > cpu.MAX_QUERIES or reads.corner.shape[1] > cpu.MAX_NODES:
            return self._prompts.plan(reads, cache, group, sliding)
        template, corner = self._template(reads, cache, group)
        call = cpu.Call.from_buffer_copy(template)
        committed, rows = reads.committed.contiguous(), reads.rows
        call.committed, call.threads = committed.data_ptr(), torch.get_num_threads()
        if rows is not None:
            call.rows, call.num_rows = rows.data_ptr(), rows.shape[0]
        library, here = load_library(), ctypes.byref(call)
        if reads.index is not None:
            _point_to_lists(call, reads.index, cache)
        cpu.check_code(library.tree_attention_check(here), call)
        workspace = _workspace(cache, library.tree_attention_workspace(here))
        call.workspace = workspace.data_ptr()
        return CpuPlan(call, (committed, rows, workspace, reads.index, *corner), call.index or 0)

    def _template(self, reads: Reads, cache: KvCache, group: int) -> tuple[cpu.Call, tuple[Tensor, ...]]:
        """What a call over this cache holds whatever the lengths are; of a chain or a named tree, once per cache."""
        view = reads.view
        key = (reads.num_queries, reads.corner.shape[1], view, group, reads.key)
        kept = reads.causal or reads.key is not None
        if kept and key in cache.prepared:
            found: tuple[cpu.Call, tuple[Tensor, ...]] = cache.prepared[key]
            return found
        corner = cpu.corner_bits(reads.corner), reads.node_depths.to(torch.int32), reads.query_nodes.to(torch.int32)
        call = cpu.Call()
        call.corner, call.node_depth, call.query_node = (part.data_ptr() for part in corner)
        call.batch, call.kv_heads, call.dim = cache.batch, cache.kv_heads, cache.head_dim
        call.queries, call.heads, call.nodes = reads.num_queries, cache.kv_heads * group, reads.corner.shape[1]
        _, _, call.kv_batch, call.kv_head, call.kv_slot, _ = cache.kv.stride()
        call.slots, call.bf16 = cache.slots, int(cache.kv.dtype == torch.bfloat16)
        call.sink, call.recent = view.sink, view.recent  # both 0 where everything is visible
        if kept:
            cache.prepared[key] = call, corner
        return call, corner

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        if not isinstance(plan, CpuPlan):
            return self._prompts.attend(q, cache, layer, plan, scale)
        call = plan.call
        queries = q if q.dtype == torch.float32 else q.float()
        out = torch.empty(q.shape, dtype=torch.float32) if call.num_rows == 0 else torch.zeros(q.shape)
        k, v = cache.layer(layer)
        call.q, call.k, call.v, call.out = queries.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        call.q_batch, call.q_query, call.q_head, _ = queries.stride()
        call.out_batch, call.out_query, call.out_head, _ = out.stride()
        call.scale = scale
        if plan.index:
            call.index = plan.index + layer * call.index_layer * INDEX_BYTES
        cpu.check_code(load_library().tree_attention(ctypes.byref(call)), call)
        return out.to(q.dtype)


def _point_to_lists(call: cpu.Call, index: Tensor, cache: KvCache) -> None:
    """Let a call read index lists [layers, B, Hkv, N]; they are checked whole when first seen."""
    call.index, call.index_len, call.index_layer = index.data_ptr(), index.shape[3], index.stride(0)
    if cache.prepared.get("checked lists") is not index:
        wanted = cache.kv.shape[0], cache.batch, cache.kv_heads
        if index.dtype != torch.int32 or not index.is_contiguous() or tuple(index.shape[:3]) != wanted:
            raise ValueError(
                f"index lists are contiguous int32 [layers, batch, KV heads, N], here [{', '.join(map(str, wanted))}, N]; got "
                f"{index.dtype} {list(index.shape)}"
            )
        cpu.check_code(load_library().tree_attention_check_index(ctypes.byref(call), index.shape[0]), call)
        cache.prepared["checked lists"] = index


def _workspace(cache: KvCache, floats: int) -> Tensor:
    """Memory for partial results that stays with the cache and grows with its contexts."""
    workspace: Tensor | None = cache.prepared.get("workspace")
    if workspace is None or workspace.numel() < floats:
        workspace = cache.prepared["workspace"] = cpu.aligned(floats + floats // 4)
    return workspace
