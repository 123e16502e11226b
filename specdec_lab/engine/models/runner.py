"""What the loop asks of a model, whoever wrote it.

A runner turns tokens into logits, writing K/V into our cache and reading it through an attention back end. Not known here:
drafting, acceptance, who calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from specdec_kernels.decoder.cpu import Drafted, Draw

from ...costs import ModelShape
from ..attention import AttentionBackend, Need, Reads
from ..cache import KvCache
from ..clocks import Clock
from .groups import Group

if TYPE_CHECKING:
    from .rotation import Rotation


@dataclass(frozen=True, slots=True)
class Scores:
    """What a forward says of the next tokens: logits [B, K, V], and their arg-max [B, K] where the forward made it too.

    Rows that were left out (Reads.rows) hold anything.
    """

    logits: Tensor
    made: Tensor | None = None

    @property
    def best(self) -> Tensor:
        """[B, K] the most likely tokens."""
        return self.logits.argmax(-1) if self.made is None else self.made


class Runner(Protocol):
    """A causal language model over our cache."""

    kind: str  # "fast" or "hf"
    name: str
    shape: ModelShape
    dtype: torch.dtype  # of the weights
    kv_dtype: torch.dtype
    device: torch.device
    max_length: int  # positions the model was made for
    rotation: Rotation | None  # how its keys are moved, where its positions are those of the cache (see rotation.py)
    fingerprint: str
    group: Group | None  # the ranks that this model is cut among
    labels: tuple[str, ...]  # what a reader of its numbers must know, for example "random-weights"

    def need(self) -> Need:
        """What this model asks of an attention back end."""

    def new_cache(self, batch: int, max_tokens: int) -> KvCache:
        """An empty cache for this model; CacheTooLarge if it cannot fit."""

    def forward(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, clock: Clock, keep: Tensor | None,
        padding: Tensor | None = None,
    ) -> Scores:
        """tokens [B, T] -> logits [B, K, V] at the query indices keep [K] (None: no logits, [B, 0, V]).

        Writes K/V of every token at its slot; tokens where padding [B, T] is True go to the scratch slot.
        """

    def draft(
        self, tokens: Tensor, reads: Reads, cache: KvCache, backend: AttentionBackend, clock: Clock, children: tuple[int, ...],
        draw: Draw,
    ) -> Drafted | None:
        """A chain or tree after tokens [B, lag + 1] in one call; None where it must be drafted level by level.

        reads     of the first forward; the following ones see what the tree says
        children  how many children each node has, breadth-first from the root
        """

    def why_not_compiled(self, backend: AttentionBackend) -> str | None:
        """None if rounds over this back end run as one compiled call each, else the reason in words."""


def position_mode(runner: Runner) -> str:
    """`absolute`, or `cache` for a draft whose sinks are read as if they stood next to its window."""
    return "absolute" if runner.rotation is None else "cache"


def shape_of(config: Any) -> ModelShape:
    """The sizes of a decoder configuration of transformers."""
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers, hidden=config.hidden_size, heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocab=config.vocab_size, tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def write_slots(reads: Reads, cache: KvCache, padding: Tensor | None) -> Tensor:
    """Flat cache rows that the tokens of a forward write."""
    slots = reads.slots
    if padding is not None:
        slots = torch.where(padding, cache.scratch_slot, slots)
    return cache.write_index(slots)


def weights_fingerprint(config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> str:
    """12 hex digits over the configuration and a strided sample (up to 4,096 elements) of every tensor."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)][:4096].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:12]
