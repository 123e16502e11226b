"""What a work list is: the parts into which tree attention splits the keys of every sequence, and whose they are."""

from __future__ import annotations

import torch
from torch import Tensor


def work_list(
    committed: Tensor, node_depth: Tensor, query_node: Tensor, *, kv_heads: int, chunk: int, sink: int = 0, recent: int = 0,
    list_len: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every part of `chunk` keys (the last may be shorter) of every sequence and KV head.

    committed, node_depth, query_node, sink, recent  as tree attention takes them
    list_len  entries of an index list per KV head, in place of sinks; 0: there is none
    returns   items int32 [N, 5]: sequence, KV head, first key, key after the last, number of the part; and their count, int32
              [1]. Keys are numbered as they are read: kept ones (sinks or a list's entries), then the prefix from the
              window on, then the corner. Where everything is visible a key's number is its slot
    """
    shallowest, items = int(node_depth[query_node.long()].min()), []
    for b, prefix in enumerate(committed.tolist()):
        kept, begin = 0, 0
        if recent:
            begin = min(max(prefix + shallowest - recent + 1, 0), prefix)
            kept = min(begin, list_len) if list_len else min(prefix, sink)
            begin = begin if list_len else max(begin, kept)
        total = kept + prefix - begin + node_depth.shape[0]
        items += [
            (b, h, start, min(start + chunk, total), part)
            for h in range(kv_heads) for part, start in enumerate(range(0, total, chunk))
        ]
    return torch.tensor(items, dtype=torch.int32).view(-1, 5), torch.tensor([len(items)], dtype=torch.int32)
