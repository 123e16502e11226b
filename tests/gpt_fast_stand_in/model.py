"""A network with the names and the surface that our adapter for gpt-fast relies on; written for the tests, nothing copied."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    rope_base: float
    norm_eps: float


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def turned(x, positions, base):
    """Rotate pairs that lie side by side. x [S, H, D]"""
    angles = positions[:, None] * base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.size = args, args.dim // args.n_head
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_local_heads) * self.size, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.kept = None  # [2, positions, KV heads, D]

    def forward(self, x, positions):
        heads = self.wqkv(x).unflatten(-1, (-1, self.size))
        q, k, v = heads.split([self.args.n_head, self.args.n_local_heads, self.args.n_local_heads], 1)
        q, k = (turned(part, positions, self.args.rope_base) for part in (q, k))
        self.kept[0, positions], self.kept[1, positions] = k, v
        k, v = self.kept.repeat_interleave(self.args.n_head // self.args.n_local_heads, 2)
        scores = torch.einsum("shd,nhd->hsn", q, k) / self.size**0.5
        scores = scores.masked_fill(torch.arange(k.shape[0]) > positions[:, None], -torch.inf)
        return self.wo(torch.einsum("hsn,nhd->shd", scores.softmax(-1), v).flatten(1))


class Mlp(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.intermediate_size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention, self.feed_forward = Attention(args), Mlp(args)
        self.attention_norm, self.ffn_norm = Norm(args.dim, args.norm_eps), Norm(args.dim, args.norm_eps)

    def forward(self, x, positions):
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.config = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args) for _ in range(args.n_layer))
        self.norm, self.output = Norm(args.dim, args.norm_eps), nn.Linear(args.dim, args.vocab_size, bias=False)

    def setup_caches(self, max_batch_size, max_seq_length):
        assert max_seq_length <= self.config.block_size
        shape = (2, max_seq_length, self.config.n_local_heads, self.config.dim // self.config.n_head)
        for layer in self.layers:
            layer.attention.kept = torch.zeros(shape)

    def forward(self, ids, positions):
        x = self.tok_embeddings(ids[0])
        for layer in self.layers:
            x = layer(x, positions)
        return self.output(self.norm(x))[None]
