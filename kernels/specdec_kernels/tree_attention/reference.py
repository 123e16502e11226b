"""What tree attention means, in float64 and in as few words as possible.

Every other file of this folder computes the same; same arguments, same order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, committed: Tensor, corner: Tensor, node_depth: Tensor, query_node: Tensor, *,
    scale: float, sink: int = 0, recent: int = 0, index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries per sequence over committed keys and the corner of appended nodes.

    q           [B, T, Hq, D]; k, v [B, Hkv, S, D]; Hq a multiple of Hkv
    committed   [B] int64: slots 0..committed-1 are the prefix; node c of the corner lies in slot committed + c
    corner      [T, C] bool: which nodes each query sees, itself included
    node_depth  [C] int32 distance from the root; position = committed + depth. query_node [T]: the node that a query is
    recent      0: everything is visible. Else a key at position p is visible from position x iff p < sink or x - p < recent
    index       [B, Hkv, N] int32 slots that stay visible instead of the sinks (SnapKV), ascending, or None. A list is read as
                far as there are committed keys before the window of the shallowest query; one that is longer names 0, 1, 2, ...
    returns     o [B, T, Hq, D] and the natural log-sum-exp [B, T, Hq], both float64; a query that sees nothing: 0 and -inf
    """
    batch, _, heads, _ = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    slot = torch.arange(slots)
    node = slot - committed[:, None]  # [B, S]
    inside = node.clamp(0, corner.shape[1] - 1)
    visible = (node < 0)[:, None] | ((node >= 0) & (node < corner.shape[1]))[:, None] & corner[:, inside].transpose(0, 1)
    depth = torch.where(node < 0, node, node_depth.long()[inside])
    visible = visible[:, None].expand(-1, kv_heads, -1, -1)  # [B, Hkv, T, S]
    if recent:
        distance = node_depth.long()[query_node.long()][None, :, None] - depth[:, None]
        near = (distance < recent)[:, None].expand(-1, kv_heads, -1, -1)
        if index is None:
            kept = (committed[:, None] + depth < sink)[:, None, None].expand_as(near)
        else:
            before = (committed + node_depth.long()[query_node.long()].min() - recent + 1).clamp(min=0).minimum(committed)
            listed = (torch.arange(index.shape[2]) < before[:, None, None]).expand(index.shape)
            inside = index.long().clamp(max=slots - 1)  # what lies beyond is not listed
            kept = torch.zeros(batch, kv_heads, slots, dtype=torch.bool).scatter_(2, inside, listed)[:, :, None]
        visible = visible & (near | kept)
    read = visible.any(2)[..., None]  # a slot that nobody sees may hold NaN
    group = heads // kv_heads
    kk, vv = (torch.where(read, x.double(), 0.0).repeat_interleave(group, 1) for x in (k, v))
    scores = q.double().transpose(1, 2) @ kk.transpose(-1, -2) * scale
    scores = scores.masked_fill(~visible.repeat_interleave(group, 1), -torch.inf)  # [B, Hq, T, S]
    lse = scores.logsumexp(-1)
    o = torch.where(lse[..., None] == -torch.inf, 0.0, torch.exp(scores - lse[..., None].clamp(min=-1e300))) @ vv
    return o.transpose(1, 2), lse.transpose(1, 2)
