"""A forward of FastLlama on static buffers: the layers of models/fast_llama.py with fused operations between the products.

Not known here: who drafts, what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...costs import ModelShape
from ..models.fast_llama import FastLlama, Layer, Parts
from .ops import Ops
from .program import Feed


@dataclass(frozen=True, slots=True)
class Net:
    """A model and its cache kv [layers, 2, B, Hkv, S, D]. Holds what a captured graph points to."""

    parts: Parts
    shape: ModelShape
    kv: Tensor

    @classmethod
    def of(cls, runner: FastLlama, kv: Tensor) -> Net:
        """The weights as they lie in memory now."""
        return cls(runner.parts(), runner.shape, kv)


def forward(
    net: Net, ops: Ops, tokens: Tensor, base: Tensor, feed: Feed, window: Tensor | None, stamps: Tensor | None
) -> Tensor:
    """tokens [B, T] at the nodes of `feed` -> hidden states [B, T, d] behind the last layer. Writes their K/V.

    base    [B] slots before the first node
    window  what of the prefix is visible; None: everything
    stamps  [layers, 2] where attention notes when it ran, or None
    """
    parts, shape = net.parts, net.shape
    batch, queries = tokens.shape
    plan = ops.plan(feed, base, net.kv, shape.heads, window, stamps)
    positions, slots = base[:, None] + feed.turns, base[:, None] + feed.slots
    hidden = F.embedding(tokens, parts.embedding).view(batch * queries, -1)  # [B*T, d]
    for number, layer in enumerate(parts.layers):
        qkv = _project(layer, hidden, shape, parts.eps).view(batch, queries, -1, shape.head_dim)
        q = ops.rope_append(qkv, positions, slots, parts.cos, parts.sin, net.kv[number, 0], net.kv[number, 1])
        attended = ops.attend(q, net.kv, number, plan, parts.scale)
        hidden = hidden + F.linear(attended.reshape(batch * queries, -1), layer.out, layer.out_bias)
        gate_up = F.linear(F.rms_norm(hidden, (hidden.shape[-1],), layer.post_norm, parts.eps), layer.gate_up)
        gate, up = gate_up.chunk(2, -1)
        hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
    return hidden.view(batch, queries, -1)


def logits(net: Net, hidden: Tensor) -> Tensor:
    """hidden [B, K, d] -> [B, K, V]."""
    parts = net.parts
    return F.linear(F.rms_norm(hidden, (hidden.shape[-1],), parts.norm, parts.eps), parts.head)


def _project(layer: Layer, hidden: Tensor, shape: ModelShape, eps: float) -> Tensor:
    """Queries, keys and values of every token, [B*T, Hq+2*Hkv, D], normed where the model does that, not yet rotated."""
    normed = F.rms_norm(hidden, (hidden.shape[-1],), layer.input_norm, eps)
    qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(hidden.shape[0], -1, shape.head_dim)
    if layer.q_norm is None or layer.k_norm is None:
        return qkv
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    size = (shape.head_dim,)
    return torch.cat([F.rms_norm(q, size, layer.q_norm, eps), F.rms_norm(k, size, layer.k_norm, eps), v], 1)
