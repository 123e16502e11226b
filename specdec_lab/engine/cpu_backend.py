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

from specdec_kernels.tree_attention import cpu
from specdec_kernels.tree_attention.build import load_library

from .attention import Need, Promises, Reads, SdpaBackend
from .cache import KvCache


@dataclass(slots=True)
class CpuPlan:
    """A kernel call without its tensors of the layer, and the tensors it points to, which must outlive it."""

    call: cpu.Call
    kept: tuple[Tensor, ...]


class CpuBackend:
    """Compiled attention at the read limit of a CPU: sinks, windows and tree corners by address, no copies, no masks."""

    name = "cpu"
    promises = Promises()

    def __init__(self) -> None:
        self._prompts = SdpaBackend()
        self._corners: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def why_not(self, need: Need) -> str | None:
        """None = usable, else the reason in one sentence."""
        if need.device != "cpu":
            return f"the compiled CPU kernel does not run on {need.device}"
        if need.softcap or need.sink_logits or need.sliding:
            return "the compiled CPU kernel has no soft-capping, sink logits or sliding-window layers"
        return cpu.why_not(need.head_dim, need.dtype)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """A CpuPlan for rounds, sdpa's plan for prompt chunks."""
        if reads.num_queries > cpu.MAX_QUERIES or reads.corner.shape[1] > cpu.MAX_NODES:
            return self._prompts.plan(reads, cache, group, sliding)
        bits, depths, nodes = self._corner(reads)
        committed = reads.committed.contiguous()
        call = cpu.Call()
        call.committed, call.corner = committed.data_ptr(), bits.data_ptr()
        call.node_depth, call.query_node = depths.data_ptr(), nodes.data_ptr()
        call.batch, call.kv_heads, call.dim = cache.batch, cache.kv_heads, cache.head_dim
        call.queries, call.heads, call.nodes = reads.num_queries, cache.kv_heads * group, reads.corner.shape[1]
        _, _, call.kv_batch, call.kv_head, call.kv_slot, _ = cache.kv.stride()
        call.slots = cache.slots
        if reads.view.kind == "window":
            call.sink, call.recent = reads.view.sink, reads.view.recent
        call.bf16, call.threads = int(cache.kv.dtype == torch.bfloat16), torch.get_num_threads()
        library = load_library()
        cpu.check_code(library.tree_attention_check(ctypes.byref(call)), call)
        workspace = cpu.aligned(library.tree_attention_workspace(ctypes.byref(call)))
        call.workspace = workspace.data_ptr()
        return CpuPlan(call, (committed, bits, depths, nodes, workspace))

    def _corner(self, reads: Reads) -> tuple[Tensor, Tensor, Tensor]:
        """Corner bits, depths and query nodes; those of chains are made once, since every round asks for them."""
        key = (reads.num_queries, reads.corner.shape[1])
        if reads.causal and key in self._corners:
            return self._corners[key]
        made = (cpu.corner_bits(reads.corner), reads.node_depths.to(torch.int32), reads.query_nodes.to(torch.int32))
        if reads.causal:
            self._corners[key] = made
        return made

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        if not isinstance(plan, CpuPlan):
            return self._prompts.attend(q, cache, layer, plan, scale)
        call = plan.call
        queries = q if q.dtype == torch.float32 else q.float()
        out = torch.empty(q.shape, dtype=torch.float32)
        k, v = cache.layer(layer)
        call.q, call.k, call.v, call.out = queries.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        call.q_batch, call.q_query, call.q_head, _ = queries.stride()
        call.out_batch, call.out_query, call.out_head, _ = out.stride()
        call.scale = scale
        cpu.check_code(load_library().tree_attention(ctypes.byref(call)), call)
        return out.to(q.dtype)
