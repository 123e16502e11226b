"""Small random models of several families, fast enough for exhaustive checks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
}  # fmt: skip


def model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A float32 transformers model with weights large enough that greedy text does not loop at once."""
    config_class, model_class = FAMILIES[family]
    extra = {"head_dim": 16} if family == "qwen3" else {}
    if family == "mistral":
        extra["sliding_window"] = None
    torch.manual_seed(seed)
    made = model_class(config_class(**{**SIZES, **extra, **overrides})).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.6 * weight.shape[1] ** -0.5 if weight.shape[0] != 61 else 0.5, generator=generator)
    return made


def prompts(lengths: list[int], seed: int = 0, vocab: int = 61) -> list[list[int]]:
    """Random prompts of the given lengths without token 0."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def plain_greedy(made: Any, prompt: list[int], new_tokens: int, eos: int | None = 0) -> list[int]:
    """transformers' own greedy decoding of one prompt."""
    made.set_attn_implementation("sdpa")
    with torch.no_grad():
        out = made.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=new_tokens,
            do_sample=False, eos_token_id=eos if eos is not None else -1, pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()
