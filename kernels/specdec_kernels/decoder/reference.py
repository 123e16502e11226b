"""What a decoder forward means, in float64 and in as few words as possible.

Every other file of this folder computes the same; same arguments, same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tree_attention.reference import tree_attention


@dataclass(frozen=True, slots=True)
class Block:
    """Weights of one block; matrices [outputs, inputs]. qkv stacks query, key and value heads."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    """A decoder: pre-norm attention and SwiGLU (Touvron 2023). cosine, sine [positions, D/2] in float32."""

    blocks: tuple[Block, ...]
    embedding: Tensor
    head: Tensor
    norm: Tensor
    cosine: Tensor
    sine: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


def decoder(
    weights: Weights, tokens: Tensor, kv: Tensor, committed: Tensor, corner: Tensor, node_depth: Tensor, query_node: Tensor,
    keep: Tensor, *, scale: float, sink: int = 0, recent: int = 0, index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits of a forward that appends its tokens to the cache and attends to it.

    tokens   [B, T]; kv [layers, 2, B, Hkv, S, D], of which slots committed + query_node are written
    keep     [K] query indices; index [layers, B, Hkv, N] a list per layer; the others as in tree_attention
    returns  logits [B, K, V] float64 and their arg-max [B, K]
    """
    batch, queries = tokens.shape
    rows, positions = torch.arange(batch)[:, None], committed[:, None] + node_depth.long()[query_node.long()]
    slots = committed[:, None] + query_node
    cos, sin = (table.double()[positions][:, :, None] for table in (weights.cosine, weights.sine))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.double(), weights.eps)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.double(), None if bias is None else bias.double())

    hidden = weights.embedding[tokens].double()
    for layer, block in enumerate(weights.blocks):
        qkv = linear(norm(hidden, block.input_norm), block.qkv, block.qkv_bias).view(batch, queries, -1, weights.head_dim)
        q, k, v = qkv.split([weights.heads, weights.kv_heads, weights.kv_heads], 2)
        q = rotate(q if block.q_norm is None else norm(q, block.q_norm))
        k = rotate(k if block.k_norm is None else norm(k, block.k_norm))
        kv[layer, 0, rows, :, slots], kv[layer, 1, rows, :, slots] = k.to(kv.dtype), v.to(kv.dtype)
        attended, _ = tree_attention(
            q, kv[layer, 0], kv[layer, 1], committed, corner, node_depth, query_node, scale=scale, sink=sink, recent=recent,
            index=None if index is None else index[layer],
        )
        hidden = hidden + linear(attended.reshape(batch, queries, -1), block.out, block.out_bias)
        x = norm(hidden, block.post_norm)
        hidden = hidden + linear(F.silu(linear(x, block.gate)) * linear(x, block.up), block.down)
    logits = linear(norm(hidden[:, keep], weights.norm), weights.head)
    return logits, logits.argmax(-1)


def drafted(
    weights: Weights, tokens: Tensor, kv: Tensor, committed: Tensor, children: Sequence[int],
    choose: Callable[[Tensor, Tensor, int], Tensor], *, scale: float, sink: int = 0, recent: int = 0,
    index: Tensor | None = None,
) -> Tensor:
    """Tokens [B, N] of a tree below the last of tokens [B, lag + 1], one forward per level that has nodes with children.

    committed  [B] before these tokens; node v (the root is 0) is appended at slot committed + lag + v
    children   [N + 1] how many children each node has, breadth-first
    choose     logits [B, V] of a node, position [B] of its children, their number -> tokens [B, number]
    """
    parents, lag = [-1], tokens.shape[1] - 1
    for node, number in enumerate(children):
        parents += [node] * number
    lines = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        lines.append([*lines[parent], node])
    depth = torch.tensor([len(line) - 1 for line in lines])
    out = torch.zeros(tokens.shape[0], len(parents) - 1, dtype=torch.int64)
    for level in range(int(depth.max())):
        fed = [node for node, number in enumerate(children) if number and depth[node] == level]
        corner = torch.zeros(len(fed), fed[-1] + 1, dtype=torch.bool)
        for row, node in enumerate(fed):
            corner[row, lines[node]] = True
        here = (out[:, [node - 1 for node in fed]], kv, committed + lag, corner, depth[: fed[-1] + 1], torch.tensor(fed))
        if level == 0:
            order = torch.arange(lag + 1)
            here = (tokens, kv, committed, order[:, None] >= order, order, order)
        keep = torch.arange(here[0].shape[1])[-len(fed) :]
        logits, _ = decoder(weights, *here, keep, scale=scale, sink=sink, recent=recent, index=index)
        for row, node in enumerate(fed):
            first = parents.index(node)
            out[:, first - 1 : first - 1 + children[node]] = choose(
                logits[:, row], committed + lag + level + 1, children[node]
            )
    return out
