"""Who is timed: our compiled kernel as the engine calls it, torch's SDPA through our back end, and builds of the kernel.

Not known here: shapes and clocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec_kernels.tree_attention import cpu

from ..engine.attention import AttentionBackend, Need, Promises, Reads
from ..engine.backends import BACKENDS
from ..engine.cache import KvCache


class TargetBackend:
    """The kernel built for one instruction set, called through its public function. For comparing builds with each other:
    the function also makes corner bits and workspace in every call, which the engine's back end does once per forward.
    """

    promises = Promises()

    def __init__(self, target: str) -> None:
        self.target, self.name = target, f"cpu:{target}"

    def why_not(self, need: Need) -> str | None:
        """See AttentionBackend.why_not."""
        if need.device != "cpu" or need.softcap or need.sink_logits or need.sliding or need.index_list:
            return f"{self.name} attends plainly, and on CPUs only"
        if need.max_queries > cpu.MAX_QUERIES:
            return f"{self.name} takes up to {cpu.MAX_QUERIES} queries per sequence"
        return cpu.why_not(need.head_dim, need.dtype, self.target)

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> dict[str, Any]:
        """Arguments of the function that do not depend on the layer."""
        view = reads.view
        corner = {"corner": reads.corner, "node_depth": reads.node_depths, "query_node": reads.query_nodes}
        window = {"sink": view.sink, "recent": view.recent} if view.kind == "window" else {}
        return {"committed": reads.committed, **corner, **window, "target": self.target}

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: dict[str, Any], scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        out, _ = cpu.tree_attention(q.float(), *cache.layer(layer), **plan, scale=scale)
        return out.to(q.dtype)


def contestants() -> dict[str, AttentionBackend]:
    """By name, in the order of the table; on a CPU with AVX-512 the kernel's AVX2 build beside its native one."""
    found: dict[str, AttentionBackend] = {name: BACKENDS[name] for name in ("cpu", "sdpa")}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        found |= {made.name: made for made in map(TargetBackend, ("native", "avx2"))}
    return found
