"""A forward of FastLlama on static buffers: the layers of models/fast_llama.py with fused operations between the products.

Not known here: who drafts, what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ...costs import ModelShape
from ..models.fast_llama import FastLlama, Parts
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
    net: Net, ops: Ops, tokens: Tensor, base: Tensor, feed: Feed, window: Tensor | None, stamps: Tensor | None,
    lists: Tensor | None = None,
) -> Tensor:
    """tokens [B, T] at the nodes of `feed` -> hidden states [B, T, d] behind the last layer. Writes their K/V.

    base    [B] slots before the first node
    window  what of the prefix is visible; None: everything
    lists   [layers, B, Hkv, N] what is visible of it in place of the window's sinks (SnapKV), or None
    stamps  [layers, 2] where attention notes when it ran, or None
    """
    parts, shape = net.parts, net.shape
    batch, queries = tokens.shape
    plan = ops.plan(feed, base, net.kv, shape.heads, window, stamps, lists)
    positions, slots = base[:, None] + feed.turns, base[:, None] + feed.slots
    hidden = F.embedding(tokens, parts.embedding).view(batch * queries, -1)  # [B*T, d]
    for number, layer in enumerate(parts.layers):
        normed = F.rms_norm(hidden, (hidden.shape[-1],), layer.input_norm, parts.eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(batch, queries, -1)
        q = ops.rope_append(
            qkv, positions, slots, parts.cos, parts.sin, net.kv[number], layer.q_norm, layer.k_norm, parts.eps
        )
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

