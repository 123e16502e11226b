"""What SnapKV selects (Li 2024), in float64 and in as few words as possible; snapkv.py computes the same, fast.

Not known here: caches, batches, layers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance(q: Tensor, k: Tensor, scale: float, pool: int) -> Tensor:
    """How much the observing queries attend to each position: [Hkv, C] float64.

    q  [W, Hq, D] queries of the last W of C positions; k [Hkv, C, D]. Query w stands at position C - W + w.
    Softmax over what a query may see, summed over queries, averaged over `pool` neighbours (zeros beyond the ends), summed
    over the query heads of a KV head.
    """
    observed, heads, _ = q.shape
    kv_heads, context, _ = k.shape
    total = torch.zeros(kv_heads, context, dtype=torch.float64)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        mass = torch.zeros(context + pool - 1, dtype=torch.float64)  # padded by pool // 2 at both ends
        for w in range(observed):
            seen = context - observed + w + 1
            scores = k[kv_head, :seen].double() @ q[w, head].double() * scale
            mass[pool // 2 : pool // 2 + seen] += scores.softmax(0)
        for position in range(context):
            total[kv_head, position] += mass[position : position + pool].sum() / pool
    return total


def select(q: Tensor, k: Tensor, budget: int, recent: int, scale: float, pool: int) -> list[list[int]]:
    """The `budget` most important positions before the recent window, per KV head, ascending; of equals the lower ones.

    The window is that of the token after the context: the last `recent` tokens, itself included.
    """
    candidates = max(0, k.shape[1] + 1 - recent)
    chosen = []
    for mass in importance(q, k, scale, pool).tolist():
        ranked = sorted(range(candidates), key=lambda position: (-mass[position], position))
        chosen.append(sorted(ranked[:budget]))
    return chosen
