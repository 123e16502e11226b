"""HFRunner: any transformers causal LM over our cache, through its attention interface. Breadth, and the oracle.

The model's own cache and masks are not used: tokens travel packed as one sequence with explicit positions, and the attention
function registered here writes K/V into our cache and reads it back through a back end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.decoder.cpu import Draw

from ..attention import AttentionBackend, Need, Reads
from ..cache import KvCache
from ..clocks import Clock
from .groups import Group
from .rotation import Rotation, check_not_learned, rotation_of, turn
from .runner import Scores, shape_of, weights_fingerprint, write_slots

INTERFACE = "specdec_lab"


class ModelRefused(ValueError):
    """A transformers model that cannot run over our cache; the message says why."""


@dataclass(slots=True)
class ForwardContext:
    """What one forward hands to every attention layer; `turns` what the model itself left at position 0."""

    reads: Reads
    cache: KvCache
    backend: AttentionBackend
    clock: Clock
    index: Tensor
    turns: tuple[Tensor, Tensor] | None = None  # cos and sin [B, 1, T, D/2]
    plans: dict[int | None, Any] = field(default_factory=dict)  # sliding window -> plan

    def plan(self, group: int, sliding: int | None) -> Any:
        """The plan of the back end, made once per forward and kind of layer."""
        if sliding not in self.plans:
            self.plans[sliding] = self.backend.plan(self.reads, self.cache, group, sliding)
        return self.plans[sliding]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float | None = None,
    sd_ctx: ForwardContext | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, B*T, D], key and value [1, Hkv, B*T, D] after rotary embedding -> ([1, B*T, Hq, D], None)."""
    if sd_ctx is None:
        raise ModelRefused(
            "this model is loaded in a specdec_lab engine; to call it directly, first restore its attention with "
            "model.set_attn_implementation('sdpa')"
        )
    if softcap is not None or s_aux is not None:
        raise ModelRefused("this model uses logit soft-capping or sink logits, which no CPU back end here implements")
    ctx, batch = sd_ctx, sd_ctx.cache.batch
    queries = query.shape[2] // batch
    kv = torch.stack([key[0], value[0]])  # [2, Hkv, B*T, D]
    kv = kv.view(2, kv.shape[1], batch, queries, -1).transpose(1, 2)
    q = query[0].transpose(0, 1).reshape(batch, queries, query.shape[1], -1)
    if ctx.turns is not None:
        kv = torch.stack([turn(kv[0], *ctx.turns), kv[1]])
        q = turn(q.transpose(1, 2), *ctx.turns).transpose(1, 2)
    ctx.cache.append(module.layer_idx, kv, ctx.index)
    ctx.clock.attention()
    plan = ctx.plan(query.shape[1] // key.shape[1], sliding_window)
    out = ctx.backend.attend(q, ctx.cache, module.layer_idx, plan, scaling or q.shape[-1] ** -0.5)
    ctx.clock.linear()
    return out.reshape(1, batch * queries, query.shape[1], -1), None


class HFRunner:
    """Any transformers causal LM whose attention goes through AttentionInterface; see Runner for the contract."""

    kind = "hf"
    labels: tuple[str, ...] = ()
    group: Group | None = None

    def __init__(self, model: Any, *, name: str, kv_dtype: torch.dtype | None = None, moves_sinks: bool = False) -> None:
        from transformers import AttentionInterface

        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.rotation: Rotation | None = None
        if moves_sinks:
            check_not_learned(model)
            self.rotation = rotation_of(config, next(model.parameters()).device)
        AttentionInterface.register(INTERFACE, _attention)
        model.set_attn_implementation(INTERFACE)
        if config._attn_implementation != INTERFACE:
            raise ModelRefused(
                f"{type(model).__name__} ignored the attention function (its class cannot be inspected or does not use "
                "transformers' AttentionInterface). Define the model in an importable module, or use a supported class."
            )
        for name_of, attribute in (("attention logit soft-capping", "attn_logit_softcapping"),):
            if getattr(config, attribute, None) is not None:
                raise ModelRefused(f"{type(model).__name__} uses {name_of}, which no CPU back end here implements")
        if not hasattr(config, "num_attention_heads") or not hasattr(config, "max_position_embeddings"):
            raise ModelRefused(f"{type(model).__name__}: its configuration names no heads or no maximum length")
        self._model = model.eval()
        self.name = name
        self.shape = shape_of(config)
        first = next(model.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.kv_dtype = kv_dtype or first.dtype
        self.max_length = int(config.max_position_embeddings)
        self.fingerprint = weights_fingerprint(model.config.to_diff_dict(), model.state_dict().items())
        self._sliding = bool(getattr(config, "sliding_window", None))

    def need(self) -> Need:
        """Head size and grouping of the model, and whether it has sliding-window layers."""
        s = self.shape
        return Need(self.device.type, self.kv_dtype, s.head_dim, s.heads // s.kv_heads, sliding=self._sliding)

    def new_cache(self, batch: int, max_tokens: int) -> KvCache:
        """An empty cache for this model."""
        s = self.shape
        return KvCache(s.layers, batch, s.kv_heads, max_tokens, s.head_dim, self.kv_dtype, self.device,
                       weight_bytes=s.params * self.dtype.itemsize)

    def forward(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, clock: Clock, keep: Tensor | None,
        padding: Tensor | None = None,
    ) -> Scores:
        """See Runner.forward."""
        batch, queries = tokens.shape
        context = ForwardContext(reads, cache, backend, clock, write_slots(reads, cache, padding))
        positions = reads.positions
        if self.rotation is not None:  # turned in `_attention`, from exact angles; lengths that choose the angles stay short
            cos, sin = self.rotation.at(positions)
            context.turns, positions = (cos[:, None], sin[:, None]), torch.zeros_like(positions)
        rows = torch.arange(batch, device=tokens.device)[:, None] * queries
        # a prompt chunk needs no logits, but the interface computes at least one
        kept = (rows + (keep if keep is not None else torch.zeros(1, dtype=torch.int64, device=tokens.device))).reshape(-1)
        out: Tensor = self._model(
            input_ids=tokens.reshape(1, -1), position_ids=positions.reshape(1, -1), use_cache=False,
            logits_to_keep=kept[:1] if keep is None else kept, sd_ctx=context,
        ).logits
        return Scores(out[:, :0].expand(batch, 0, -1) if keep is None else out.view(batch, -1, out.shape[-1]))

    def draft(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, clock: Clock, children: tuple[int, ...],
        draw: Draw,
    ) -> None:
        """Never in one call."""
        return None  # noqa: RET501  # the protocol's answer, not the absence of one

    def why_not_compiled(self, backend: AttentionBackend) -> str | None:
        """Never: the forward is transformers' own."""
        return "the hf runner calls transformers' modules"
