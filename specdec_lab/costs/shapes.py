"""The sizes of a model, and the exact bytes and FLOPs that follow from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama-style decoder that decide its bytes and FLOPs. Norms (below 0.01% of it) are not counted."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    head_shards: int = 1  # of one shard of a model: it holds this part of the output head (heads and MLP are its own sizes)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"ModelShape.{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"ModelShape needs heads divisible by kv_heads, got {self.heads} and {self.kv_heads}")

    @property
    def block_params(self) -> int:
        """Matrix entries of all decoder blocks: q, o, k, v, gate, up, down."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def linear_params(self) -> int:
        """What one forward reads: the blocks and the output head. Embedding rows are looked up, not read whole."""
        return self.block_params + self.vocab * self.hidden // self.head_shards

    @property
    def params(self) -> int:
        """What must be stored: an untied model keeps its embedding beside the head."""
        if self.tied:  # the head is (part of) the embedding
            return self.block_params + self.vocab * self.hidden
        return self.linear_params + self.vocab * self.hidden

    def weight_bytes(self, element_bytes: int) -> int:
        """Bytes of weights that one forward reads."""
        return self.linear_params * element_bytes

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token of context occupies, all layers."""
        return 2 * element_bytes * self.layers * self.kv_heads * self.head_dim

    def linear_flops(self, tokens: int) -> int:
        """FLOPs of all matrix products for `tokens` query tokens, head included."""
        return 2 * self.linear_params * tokens

    def attention_flops(self, pairs: int) -> int:
        """FLOPs of attention over `pairs` = sum over query tokens of the keys that each reads, all layers."""
        return 4 * self.layers * self.heads * self.head_dim * pairs


# Sizes from the models' public configurations.
SHAPES = {
    "Llama-3.1-8B": ModelShape(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-2-7B-32K": ModelShape(32, 4096, 32, 32, 128, 11008, 32000),
    "1.7B": ModelShape(28, 2048, 16, 8, 128, 6144, 151936, tied=True),  # as Qwen3-1.7B
    "1B": ModelShape(16, 2048, 32, 8, 64, 8192, 128256, tied=True),  # as Llama-3.2-1B
}
