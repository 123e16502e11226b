"""FastLlama: Llama, Mistral, Qwen2 and Qwen3 with fused projections and our cache; weights by their Hugging Face names.

The block is pre-norm attention and SwiGLU with rotary positions. Rotary frequencies come from transformers, so scaled
variants with fixed frequencies (linear, llama3, yarn) are the same numbers. Not known here: drafting, acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec_kernels.decoder import cpu as decoder
from specdec_kernels.decoder.cpu import Decoder, Drafted, Draw
from specdec_kernels.decoder.reference import Block, Weights
from specdec_kernels.tree_attention.cpu import Call

from ..attention import AttentionBackend, Need, Reads
from ..cache import KvCache, available_bytes
from ..clocks import Clock, Phase
from ..cpu_backend import CpuBackend, CpuPlan
from .groups import Group
from .parallel import Shard
from .rotation import Rotation, rotation_of
from .runner import Scores, shape_of, weights_fingerprint, write_slots

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


class WeightsMismatch(ValueError):
    """The tensors of a checkpoint are not those of its configuration; the message names them."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block. qkv [(Hq+2*Hkv)*D, d], gate_up [2*ff, d]: the fused projections."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """What the layers are made of, as it lies in memory, for who runs them itself. cos, sin [positions, D/2] float32."""

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor
    cos: Tensor
    sin: Tensor
    eps: float
    scale: float


def why_not(config: Any) -> str | None:
    """None if FastLlama can run a transformers configuration, else the reason in words."""
    if config.model_type not in FAMILIES:
        return f"FastLlama knows {', '.join(FAMILIES)}, not {config.model_type!r}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        return f"FastLlama knows rotary embeddings {', '.join(FIXED_ROPE)}, not {rope!r}"
    if getattr(config, "mlp_bias", False):
        return "FastLlama has no bias in the MLP"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"FastLlama knows the activation silu, not {config.hidden_act!r}"
    sliding = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if sliding or (window and config.model_type == "mistral" and window < config.max_position_embeddings):
        return f"FastLlama has no sliding-window layers (this model's window is {window})"
    return None


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration holds."""
    s = shape_of(config)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (s.vocab, s.hidden), "model.norm.weight": (s.hidden,)
    }
    if not s.tied:
        expected["lm_head.weight"] = (s.vocab, s.hidden)
    biased = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    for i in range(s.layers):
        at = f"model.layers.{i}."
        expected |= {
            f"{at}input_layernorm.weight": (s.hidden,), f"{at}post_attention_layernorm.weight": (s.hidden,),
            f"{at}self_attn.q_proj.weight": (q, s.hidden), f"{at}self_attn.k_proj.weight": (kv, s.hidden),
            f"{at}self_attn.v_proj.weight": (kv, s.hidden), f"{at}self_attn.o_proj.weight": (s.hidden, q),
            f"{at}mlp.gate_proj.weight": (s.intermediate, s.hidden), f"{at}mlp.up_proj.weight": (s.intermediate, s.hidden),
            f"{at}mlp.down_proj.weight": (s.hidden, s.intermediate),
        }
        if biased:
            expected |= {f"{at}self_attn.{n}_proj.bias": (size,) for n, size in (("q", q), ("k", kv), ("v", kv))}
        if getattr(config, "attention_bias", False) and config.model_type != "qwen2":
            expected[f"{at}self_attn.o_proj.bias"] = (s.hidden,)
        if config.model_type == "qwen3":
            expected |= {f"{at}self_attn.q_norm.weight": (s.head_dim,), f"{at}self_attn.k_norm.weight": (s.head_dim,)}
    return expected


def check_tensors(config: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise WeightsMismatch naming missing, extra and misshapen tensors."""
    expected = expected_tensors(config)
    given = {n for n in weights if not n.endswith("rotary_emb.inv_freq")}
    if bool(config.tie_word_embeddings):
        given.discard("lm_head.weight")  # a copy of the embedding that some writers store
    problems = [f"missing {n}" for n in sorted(expected.keys() - given)]
    problems += [f"unexpected {n}" for n in sorted(given - expected.keys())]
    problems += [
        f"{n} has shape {tuple(weights[n].shape)}, expected {expected[n]}"
        for n in sorted(expected.keys() & given) if tuple(weights[n].shape) != expected[n]
    ]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise WeightsMismatch(f"the weights do not fit the {config.model_type} configuration: {shown}")


class FastLlama:
    """A Llama-style model over our cache; see Runner for the contract."""

    kind = "fast"

    def __init__(
        self, config: Any, weights: Mapping[str, Tensor], *, name: str, device: torch.device, dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None, moves_sinks: bool = False, fingerprint: str | None = None,
        labels: tuple[str, ...] = (), shard: Shard | None = None, group: Group | None = None,
    ) -> None:
        """fingerprint: of weights that are made by name when asked for, so are neither checked nor read in advance.

        shard, group  of tensor parallelism; config and weights are then the shard's own, the vocabulary is whole
        """
        reason = why_not(config)
        if reason is not None:
            raise ValueError(f"{reason}. Use runner='hf'.")
        if fingerprint is None:
            check_tensors(config, weights)
        self.name, self.dtype, self.kv_dtype, self.device = name, dtype, kv_dtype or dtype, device
        self.shape, self.max_length = shape_of(config), int(config.max_position_embeddings)
        self.fingerprint = fingerprint or weights_fingerprint(config.to_diff_dict(), weights.items())
        self.rotation: Rotation | None = rotation_of(config, device) if moves_sinks else None
        self.labels, self.group = labels, group
        if shard is not None:
            self.shape = replace(self.shape, head_shards=shard.ranks)
        self._eps = float(config.rms_norm_eps)
        self._scale = self.shape.head_dim**-0.5
        self._embedding = weights["model.embed_tokens.weight"].to(device, dtype)
        self._norm = weights["model.norm.weight"].to(device, dtype)
        self._head = self._embedding if self.shape.tied else weights["lm_head.weight"].to(device, dtype)
        if shard is not None and self.shape.tied:
            self._head = shard.cut(self._embedding, 0)
        self._layers = [self._fuse(weights, f"model.layers.{i}.") for i in range(self.shape.layers)]
        self._cos, self._sin = self._rotary_table(config, self.max_length)
        self._config = config
        self._decoder: Decoder | None = None

    def _fuse(self, weights: Mapping[str, Tensor], at: str) -> Layer:
        def get(name: str) -> Tensor | None:
            tensor = weights.get(at + name)
            return None if tensor is None else tensor.to(self.device, self.dtype)

        def join(*names: str) -> Tensor:
            return torch.cat([weights[at + n] for n in names]).to(self.device, self.dtype).contiguous()

        projections = [f"self_attn.{n}_proj" for n in "qkv"]
        has_bias = at + "self_attn.q_proj.bias" in weights
        return Layer(
            input_norm=join("input_layernorm.weight"), qkv=join(*(f"{p}.weight" for p in projections)),
            qkv_bias=join(*(f"{p}.bias" for p in projections)) if has_bias else None,
            q_norm=get("self_attn.q_norm.weight"), k_norm=get("self_attn.k_norm.weight"),
            out=join("self_attn.o_proj.weight"), out_bias=get("self_attn.o_proj.bias"),
            post_norm=join("post_attention_layernorm.weight"),
            gate_up=join("mlp.gate_proj.weight", "mlp.up_proj.weight"), down=join("mlp.down_proj.weight"),
        )

    def _rotary_table(self, config: Any, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, D/2] in float32."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rotary = LlamaRotaryEmbedding(config=config)
        order = torch.arange(positions, dtype=torch.float32)
        angles = order[:, None] * rotary.inv_freq.float()[None, :]
        scaling = float(rotary.attention_scaling)
        cos, sin = (angles.cos(), angles.sin()) if self.rotation is None else self.rotation.at(order)
        return (cos * scaling).to(self.device), (sin * scaling).to(self.device)

    def parts(self) -> Parts:
        """Weights and rotary tables; the tables of caches made so far are long enough for those."""
        return Parts(self._embedding, self._layers, self._norm, self._head, self._cos, self._sin, self._eps, self._scale)

    def need(self) -> Need:
        """Plain softmax attention with this head size and grouping."""
        return Need(self.device.type, self.kv_dtype, self.shape.head_dim, self.shape.heads // self.shape.kv_heads)

    def new_cache(self, batch: int, max_tokens: int) -> KvCache:
        """An empty cache; the rotary table grows with it when a run goes beyond the trained length."""
        s = self.shape
        cache = KvCache(s.layers, batch, s.kv_heads, max_tokens, s.head_dim, self.kv_dtype, self.device,
                        weight_bytes=s.params * self.dtype.itemsize)
        if cache.slots > self._cos.shape[0]:
            self._cos, self._sin = self._rotary_table(self._config, cache.slots)
            if self._decoder is not None:
                self._decoder.set_positions(self._cos, self._sin)
        return cache

    def why_not_compiled(self, backend: AttentionBackend) -> str | None:
        """None if rounds over this back end run as one compiled call each, else the reason in words."""
        if self.group is not None:
            return "shards meet after the attention and after the MLP of every layer"
        if backend.name != "cpu":
            return f"the {backend.name} back end attends layer by layer"
        reason = decoder.why_not(self.dtype)
        if reason is not None or self._decoder is not None:
            return reason
        needed, free = self.shape.weight_bytes(self.dtype.itemsize), available_bytes(self.device)
        if free is not None and needed > free:
            return f"its packed copy of the weights needs {needed:,} bytes, {free:,} are free"
        return None

    def _compiled(self, backend: AttentionBackend) -> Decoder | None:
        """The compiled decoder, made when first asked for."""
        if self._decoder is None and self.why_not_compiled(backend) is None:
            s, blocks = self.shape, []
            for layer in self._layers:
                gate, up = layer.gate_up.chunk(2)
                blocks.append(Block(
                    layer.input_norm, layer.qkv, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.out, layer.out_bias,
                    layer.post_norm, gate, up, layer.down,
                ))  # fmt: skip
            self._decoder = Decoder(Weights(
                tuple(blocks), self._embedding, self._head, self._norm, self._cos, self._sin, s.heads, s.kv_heads, s.head_dim,
                self._eps,
            ))  # fmt: skip
        return self._decoder

    def forward(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, clock: Clock, keep: Tensor | None,
        padding: Tensor | None = None,
    ) -> Scores:
        """See Runner.forward. Rounds over the `cpu` back end are one compiled call; prompts go layer by layer."""
        plan = backend.plan(reads, cache, self.shape.heads // self.shape.kv_heads)
        if isinstance(plan, CpuPlan) and padding is None and keep is not None:
            compiled = self._compiled(backend)
            if compiled is not None:
                return self._one_call(compiled, tokens, plan, cache, clock, keep)
        return Scores(self._by_layer(tokens, reads, cache, backend, plan, clock, keep, padding))

    def _one_call(
        self, compiled: Decoder, tokens: Tensor, plan: CpuPlan, cache: KvCache, clock: Clock, keep: Tensor
    ) -> Scores:
        call = plan.call
        empty = torch.zeros if call.rows else torch.empty  # rows that are left out must not hold chance
        logits = empty(tokens.shape[0], keep.shape[0], self.shape.vocab)
        best = empty(logits.shape[:2], dtype=torch.int64)
        self._point(call, cache)
        clock.inside(compiled.forward(tokens.contiguous(), call, cache.kv.stride(0), keep.to(torch.int32), logits, best))
        return Scores(logits, best)

    def _point(self, call: Call, cache: KvCache) -> None:
        """Let a call read the keys and values of the first layer."""
        call.k, call.v, call.scale = cache.kv.data_ptr(), cache.kv[0, 1].data_ptr(), self._scale

    def draft(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, clock: Clock, children: tuple[int, ...],
        draw: Draw,
    ) -> Drafted | None:
        """See Runner.draft."""
        compiled = self._compiled(backend)
        if compiled is None or not isinstance(backend, CpuBackend):
            return None
        plan = backend.plan(reads, cache, self.shape.heads // self.shape.kv_heads)
        self._point(plan.call, cache)
        drafted = compiled.draft(tokens.contiguous(), plan.call, cache.kv.stride(0), children, draw)
        clock.inside(drafted.attention_ns)
        clock.inside(drafted.choosing_ns, Phase.DRAFT_OTHER)
        return drafted

    def _by_layer(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, plan: Any, clock: Clock,
        keep: Tensor | None, padding: Tensor | None,
    ) -> Tensor:
        batch, queries = tokens.shape
        index = write_slots(reads, cache, padding)
        positions = reads.positions
        cos = self._cos[positions][:, :, None].to(self.dtype)  # [B, T, 1, D/2]
        sin = self._sin[positions][:, :, None].to(self.dtype)
        hidden = F.embedding(tokens, self._embedding).view(batch * queries, -1)  # [B*T, d]
        for number, layer in enumerate(self._layers):
            q, kv = self._project(layer, hidden, batch, queries, cos, sin)
            cache.append(number, kv, index)
            clock.attention()
            attended = backend.attend(q, cache, number, plan, self._scale)
            clock.linear()
            hidden = hidden + self._sum(F.linear(attended.reshape(batch * queries, -1), layer.out, layer.out_bias))
            gate_up = F.linear(F.rms_norm(hidden, (hidden.shape[-1],), layer.post_norm, self._eps), layer.gate_up)
            gate, up = gate_up.chunk(2, -1)
            hidden = hidden + self._sum(F.linear(F.silu(gate) * up, layer.down))
        if keep is None:
            return hidden.new_empty(batch, 0, self.shape.vocab)
        kept = hidden.view(batch, queries, -1)[:, keep]
        logits = F.linear(F.rms_norm(kept, (kept.shape[-1],), self._norm, self._eps), self._head)
        return logits if self.group is None else self.group.gather(logits)

    def _sum(self, partial: Tensor) -> Tensor:
        """What all shards together add to the residual stream."""
        return partial if self.group is None else self.group.sum(partial)

    def _project(
        self, layer: Layer, hidden: Tensor, batch: int, queries: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [B, T, Hq, D] and keys with values [2, B, Hkv, T, D], rotated."""
        s = self.shape
        normed = F.rms_norm(hidden, (hidden.shape[-1],), layer.input_norm, self._eps)
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(batch, queries, s.heads + 2 * s.kv_heads, s.head_dim)
        qk, v = qkv.split([s.heads + s.kv_heads, s.kv_heads], 2)
        if layer.q_norm is not None:
            q, k = qk.split([s.heads, s.kv_heads], 2)
            q = F.rms_norm(q, (s.head_dim,), layer.q_norm, self._eps)
            qk = torch.cat([q, F.rms_norm(k, (s.head_dim,), layer.k_norm, self._eps)], 2)
        first, second = qk.chunk(2, -1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)  # [B, T, Hq+Hkv, D]
        q, k = rotated.split([s.heads, s.kv_heads], 2)
        return q, torch.stack([k, v]).transpose(2, 3)
