"""Every position of a text predicted through a window, in one forward and exactly.

Two questions, one answer. Would these weights predict as well if they saw only a window? And what would a self-draft,
which reads the target's own cache through a window, propose first at every position? Written over the modules of
transformers' LlamaForCausalLM and not over the engine, so that the engine can be compared with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from ..records import KvView

QUERY_CHUNK = 512  # rows of the score matrix that exist at the same time

Cache = list[tuple[Tensor, Tensor]]  # per layer: rotated keys and values, each [H, T, D]


def full(model: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Cache]:
    """Logits [T, V] and the cache of one text, tokens [T]: transformers' own forward."""
    with torch.inference_mode():
        out = model(input_ids=tokens[None], use_cache=True)
    return out.logits[0].float(), [(layer.keys[0], layer.values[0]) for layer in out.past_key_values.layers]


def windowed(model: LlamaForCausalLM, tokens: Tensor, view: KvView, cache: Cache | None = None) -> Tensor:
    """Logits [T, V] of one text when every position sees only `view`, at its true position.

    cache  None: the weights restricted to the window in every layer, keys and values included.
           The cache of `full`: a second stream of queries. Position i reads what the target itself has written at the
           earlier positions of its window, and its own new key and value: the first step of a self-draft at token i.
    """
    with torch.inference_mode():
        hidden = model.model.embed_tokens(tokens)[None]  # [1, T, d]
        angles = model.model.rotary_emb(hidden, torch.arange(len(tokens))[None])
        for index, layer in enumerate(model.model.layers):
            hidden = _block(layer, hidden, angles, view, cache[index] if cache else None)
        logits: Tensor = model.lm_head(model.model.norm(hidden))[0]
        return logits.float()


def _block(
    layer: LlamaDecoderLayer, hidden: Tensor, angles: tuple[Tensor, Tensor], view: KvView,
    written: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One decoder layer over hidden [1, T, d]."""
    attention = layer.self_attn
    x = layer.input_layernorm(hidden)
    shape = (1, x.shape[1], -1, attention.head_dim)
    q, k, v = (f(x).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *angles)
    keys, values = written or (k[0], v[0])
    mixed = _attend(q[0], k[0], v[0], keys, values, view)  # [Hq, T, D]
    hidden = hidden + attention.o_proj(mixed.transpose(0, 1).flatten(1)[None])
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def _attend(q: Tensor, own_k: Tensor, own_v: Tensor, keys: Tensor, values: Tensor, view: KvView) -> Tensor:
    """Attention of q [Hq, T, D] over the earlier keys in the view, and each row's own key.

    own_k, own_v, keys, values  [H, T, D]; query heads share them in groups
    """
    groups = q.shape[0] // keys.shape[0]
    own_k, own_v, keys, values = (t.repeat_interleave(groups, 0) for t in (own_k, own_v, keys, values))
    out = torch.empty_like(q)
    for start in range(0, q.shape[1], QUERY_CHUNK):
        rows = torch.arange(start, min(start + QUERY_CHUNK, q.shape[1]))
        seen = _visible(rows, view)
        columns = seen.any(0).nonzero()[:, 0]
        chunk = q[:, rows] * q.shape[2] ** -0.5
        scores = chunk @ keys[:, columns].transpose(1, 2)  # [H, rows, columns]
        scores = scores.masked_fill(~seen[:, columns], float("-inf"))
        own = (chunk * own_k[:, rows]).sum(2, keepdim=True)
        weights = torch.cat([scores, own], 2).softmax(2)
        out[:, rows] = weights[..., :-1] @ values[:, columns] + weights[..., -1:] * own_v[:, rows]
    return out


def _visible(rows: Tensor, view: KvView) -> Tensor:
    """[rows, rows[-1]] whether a row sees an earlier position; `recent` counts the row itself."""
    columns = torch.arange(int(rows[-1]))
    earlier = columns < rows[:, None]
    if view.kind == "full":
        return earlier
    return earlier & ((columns < view.sink) | (columns > rows[:, None] - view.recent))
