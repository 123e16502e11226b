"""Models by shape with random weights: the sizes of a published model without its checkpoint, for timing.

How long a forward takes does not depend on what the weights hold. What is said, and what is accepted, means nothing: every
header of such a model is labelled `random-weights`. Not known here: who measures.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...records import RANDOM_WEIGHTS, fingerprint
from ..cache import available_bytes
from .fast_llama import FastLlama, expected_tensors
from .parallel import Placement, ShardedWeights, shard_config
from .runner import shape_of

PREFIX = "random:"


class ModelTooLarge(MemoryError):
    """The weights do not fit; raised before anything is allocated, with the bytes."""


def _llama_3_1_8b() -> Any:
    return _llama(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rope_parameters=_llama3_rope(8.0),
        tie_word_embeddings=False, bos_token_id=128000, eos_token_id=128001,
    )


def _llama_2_7b_32k() -> Any:
    return _llama(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, max_position_embeddings=32768,
        rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}, tie_word_embeddings=False,
    )


def _qwen3_1_7b() -> Any:
    """With the YaRN factor that its authors name for long contexts: its own 40,960 positions end before the cells do."""
    from transformers import Qwen3Config

    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768}
    return Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rope_parameters=rope, rms_norm_eps=1e-6,
        tie_word_embeddings=True, dtype="bfloat16",
    )


def _draft_1b() -> Any:
    """As Llama-3.2-1B, which shares the vocabulary of Llama-3.1-8B."""
    return _llama(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_parameters=_llama3_rope(32.0),
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001,
    )


def _tiny() -> Any:
    """Seconds to make anywhere: to try commands, not to time anything. Its heads divide by 2, 4 and 8."""
    return _llama(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=8, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=False,
    )


def _tiny_draft() -> Any:
    return _llama(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
    )


def _tiny_square() -> Any:
    """As tiny, with heads that fill the hidden size, as some programs take for granted."""
    return _llama(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=False,
    )


def _llama(**sizes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**sizes, rms_norm_eps=1e-5, dtype="bfloat16")


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama-3.1-8b": _llama_3_1_8b, "llama-2-7b-32k": _llama_2_7b_32k, "qwen3-1.7b": _qwen3_1_7b, "draft-1b": _draft_1b,
    "tiny": _tiny, "tiny-draft": _tiny_draft, "tiny-square": _tiny_square,
}


def config_of(name: str) -> Any:
    """The transformers configuration of a named shape; ValueError lists the names."""
    if name not in CONFIGS:
        raise ValueError(f"no random-weight model is called {name!r}; there are {', '.join(CONFIGS)}")
    return CONFIGS[name]()


class RandomWeights(Mapping[str, Tensor]):
    """The tensors of a configuration, each made when asked for, on the device and in the dtype it will stay in.

    A tensor depends on (seed, its name, the kind of device) only. Matrices keep the scale of what they multiply, and the two
    that write to the residual stream are divided by sqrt(2 layers) besides, so that activations stay near 1 at any depth.
    """

    def __init__(self, config: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self._shapes, self._layers = expected_tensors(config), int(config.num_hidden_layers)
        self._device, self._dtype, self._seed = device, dtype, seed
        self.fingerprint = fingerprint(
            {"random": seed, "device": device.type, "dtype": str(dtype), "config": config.to_diff_dict()}
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        if len(shape) == 1:
            return made.fill_(0.0 if name.endswith(".bias") else 1.0)
        scale = 1.0 if name == "model.embed_tokens.weight" and "lm_head.weight" in self._shapes else shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * self._layers)
        return made.normal_(0.0, scale, generator=self._generator(name))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        return torch.Generator(self._device).manual_seed(int.from_bytes(digest[:7], "big"))


def check_memory(name: str, config: Any, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raise ModelTooLarge, with the bytes, if the weights do not fit on the device."""
    shape, free = shape_of(config), available_bytes(device)
    needed = shape.params * dtype.itemsize
    if free is not None and needed > free:
        raise ModelTooLarge(
            f"the weights of {name} need {needed:,} bytes in {str(dtype).removeprefix('torch.')}, {free:,} are free on "
            f"{device}; its KV needs {shape.kv_bytes_per_token(kv_dtype.itemsize):,} bytes per token besides. Nothing fits. "
            "Use a smaller model, a narrower dtype or a device with more memory."
        )


def make(
    name: str, config: Any, *, seed: int, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None,
    placement: Placement | None = None, moves_sinks: bool = False,
) -> FastLlama:
    """A FastLlama of this configuration with random weights; nothing is allocated if they do not fit."""
    weights = RandomWeights(config, device, dtype, seed)
    if placement is None:
        check_memory(name, config, device, dtype, kv_dtype or dtype)
        return FastLlama(
            config, weights, name=name, device=device, dtype=dtype, kv_dtype=kv_dtype, fingerprint=weights.fingerprint,
            labels=(RANDOM_WEIGHTS,), moves_sinks=moves_sinks,
        )
    cut = shard_config(config, shape_of(config), placement.shard.ranks)
    check_memory(name, cut, device, dtype, kv_dtype or dtype)
    return FastLlama(
        cut, ShardedWeights(weights, placement.shard), name=name, device=device, dtype=dtype, kv_dtype=kv_dtype,
        fingerprint=f"{weights.fingerprint}/{placement.shard.ranks}", labels=(RANDOM_WEIGHTS, *placement.labels),
        shard=placement.shard, group=placement.group,
    )
