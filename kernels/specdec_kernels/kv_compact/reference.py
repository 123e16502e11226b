"""What kv_compact means, in torch on any device. gpu.py computes the same; same arguments, same order."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_compact(kv: Tensor, path: Tensor, counts: Tensor, committed: Tensor) -> Tensor:
    """Move the keys and values of each row's accepted nodes next to its root, in place, in all layers.

    kv         [L, 2, B, Hkv, S, D]; node v of row b lies at slot committed[b] + v, the root being node 0
    path       [B, A] int32 or int64: accepted nodes below the root, rising; entry i goes to slot committed[b] + 1 + i
    counts     [B] how many entries of each row count
    committed  [B] tokens before each row's root
    returns    kv
    Nodes rise along a path, so a source lies at or behind its place. Entries that would not (path[b, i] <= i) and sources
    beyond S are not moved.
    """
    order = torch.arange(path.shape[1], device=path.device)
    sources = committed[:, None] + path
    moved = (order < counts[:, None]) & (path > order + 1) & (sources < kv.shape[4])
    rows, entries = torch.nonzero(moved, as_tuple=True)
    kept = kv[:, :, rows, :, sources[rows, entries].long()]  # read whole before anything is written
    kv[:, :, rows, :, (committed[rows] + 1 + entries).long()] = kept
    return kv
