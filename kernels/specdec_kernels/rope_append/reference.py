"""What rope_append means, in torch on any device. gpu.py computes the same; same arguments, same order."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_append(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, q_norm: Tensor | None = None,
    k_norm: Tensor | None = None, eps: float = 1e-6, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries rotated to their positions; keys, rotated, and values go to their slots of one layer's cache.

    qkv               [B, T, (Hq + 2*Hkv) * D] what the fused projection gives: heads of q, then k, then v
    positions, slots  [B, T] int32 or int64
    cos, sin          [P, D/2] float32, one row per position; element i is rotated with element i + D/2
    kv                [2, B, Hkv, S, D] one layer, written in place, in its own dtype
    q_norm, k_norm    [D] weights of an RMS norm over each head before it is rotated (Qwen3), both or neither, with eps
    out               [B, T, Hq, D], written and returned where given; default: made, in qkv's dtype
    All in float32 or better, rounded once.
    A token whose slot is not in [0, S) is not written, so a row can be left out with slot -1. A position that is not in [0, P)
    gives NaN, so that running out of table shows.
    """
    heads, size, dim = kv.shape[2:]
    work = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.view(*positions.shape, -1, dim).to(work).split([qkv.shape[2] // dim - 2 * heads, heads, heads], 2)
    if q_norm is not None and k_norm is not None:
        q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    known = ((positions >= 0) & (positions < cos.shape[0]))[..., None]
    at = positions.long().clamp(0, cos.shape[0] - 1)
    c, s = (torch.where(known, table[at].to(work), torch.nan)[:, :, None] for table in (cos, sin))  # [B, T, 1, D/2]
    rows, tokens = torch.nonzero((slots >= 0) & (slots < size), as_tuple=True)
    places = slots[rows, tokens].long()
    kv[0][rows, :, places] = _rotated(k, c, s)[rows, tokens].to(kv.dtype)
    kv[1][rows, :, places] = v[rows, tokens].to(kv.dtype)
    out = torch.empty_like(q, dtype=qkv.dtype) if out is None else out
    return out.copy_(_rotated(q, c, s))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
