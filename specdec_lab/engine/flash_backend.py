"""The flash-attn package as an attention back end, for rounds over the whole context.

flash-attn has no tree mask. But every node sees the whole prefix, so it reads the prefix without any mask, we read the few
nodes of the corner ourselves, and both join by their log-sum-exps; a chain is the tree whose corner is a triangle. Windows,
which are short, and chunks of prompts go through sdpa. Not known here: how flash-attn splits its work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .attention import Need, Promises, Reads, SdpaBackend
from .cache import KvCache

MAX_QUERIES = 64  # more have only prompts
MAX_DIM = 256


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """What does not depend on the layer.

    lengths  [B] int32 tokens of the prefix
    slots    [B, C] where the corner's nodes lie
    hidden   [T, C] which nodes a query does not see
    """

    lengths: Tensor
    slots: Tensor
    hidden: Tensor


class FlashBackend:
    """`flash_attn_with_kvcache` over the prefix, our own corner, joined.

    function  stands in for flash_attn_with_kvcache, in tests
    """

    name = "flash_attn"
    promises = Promises(masks_loads=False, same_alone=False)  # it chooses its splits by the whole batch

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self._given = function
        self._short = SdpaBackend()

    def why_not(self, need: Need) -> str | None:
        """None = usable, else the reason in one sentence."""
        if self._given is None and (reason := _why_not_here(need.device)) is not None:
            return reason
        if need.index_list:
            return "flash_attn reads no index lists (SnapKV)"
        if need.softcap or need.sink_logits or need.sliding:
            return "flash_attn is used here without soft-capping, sink logits and sliding-window layers"
        if need.tree and need.max_queries > MAX_QUERIES:
            return f"flash_attn is used here for trees of up to {MAX_QUERIES} nodes, root counted, not {need.max_queries}"
        if need.dtype not in (torch.float16, torch.bfloat16):
            return f"flash_attn reads float16 or bfloat16 KV, not {str(need.dtype).removeprefix('torch.')}"
        if need.head_dim % 8 or need.head_dim > MAX_DIM:
            return f"flash_attn takes head sizes that are multiples of 8 up to {MAX_DIM}, not {need.head_dim}"
        return None

    def plan(self, reads: Reads, cache: KvCache, group: int, sliding: int | None = None) -> Any:
        """A FlashPlan for rounds over everything, sdpa's plan for windows and prompt chunks."""
        if reads.num_queries > MAX_QUERIES or reads.view.kind != "full":
            return self._short.plan(reads, cache, group, sliding)
        nodes = torch.arange(reads.corner.shape[1], device=reads.committed.device)
        return FlashPlan(reads.committed.to(torch.int32), reads.committed[:, None] + nodes, ~reads.corner)

    def attend(self, q: Tensor, cache: KvCache, layer: int, plan: Any, scale: float) -> Tensor:
        """See AttentionBackend.attend."""
        if not isinstance(plan, FlashPlan):
            return self._short.attend(q, cache, layer, plan, scale)
        k, v = (part.transpose(1, 2) for part in cache.layer(layer))  # [B, S, Hkv, D]
        function = self._given or import_module("flash_attn").flash_attn_with_kvcache
        queries = q.to(k.dtype)
        prefix, prefix_lse = function(
            queries, k, v, cache_seqlens=plan.lengths, softmax_scale=scale, causal=False, return_softmax_lse=True
        )
        empty = (plan.lengths == 0)[:, None, None]  # what comes out for no keys at all is not documented
        prefix_lse = torch.where(empty, -torch.inf, prefix_lse.transpose(1, 2))  # [B, T, Hq]
        prefix = torch.where(empty[..., None], 0.0, prefix.float())
        corner, corner_lse = _corner(queries, *cache.gather(layer, plan.slots), plan.hidden, scale)
        return join(prefix, prefix_lse, corner, corner_lse).to(q.dtype)


def _corner(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the corner's nodes alone, in float32: k, v [B, Hkv, C, D] -> [B, T, Hq, D] and log-sum-exp [B, T, Hq]."""
    batch, queries, heads, dim = q.shape
    folded = q.float().view(batch, queries, k.shape[1], -1, dim)  # [B, T, Hkv, G, D]
    scores = torch.einsum("bthgd,bhcd->bthgc", folded, k.float()) * scale
    scores = scores.masked_fill(hidden[None, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    out = torch.einsum("bthgc,bhcd->bthgd", weights, v.float())
    return out.reshape(q.shape), lse.reshape(batch, queries, heads)


def join(left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor) -> Tensor:
    """Attention over two disjoint sets of keys from attention over each, with natural log-sum-exps; 0 where both are empty."""
    both = torch.logaddexp(left_lse, right_lse)
    base = torch.where(both == -torch.inf, 0.0, both)
    return left * torch.exp(left_lse - base)[..., None] + right * torch.exp(right_lse - base)[..., None]


def _why_not_here(device: str) -> str | None:
    """Whether flash-attn 2 is installed, told by the attribute: flash-attn 4 alone makes an empty package of the same name."""
    if device != "cuda" or not torch.cuda.is_available():
        return "flash_attn needs a CUDA device"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed: pip install 'specdec_lab[flash]' --no-build-isolation, after a CUDA build of torch"
    if not hasattr(import_module("flash_attn"), "flash_attn_with_kvcache"):
        return "the flash_attn package here has no flash_attn_with_kvcache: flash-attn 2.7.4 or later, below 3, is needed"
    return None
