"""What both trainings of this folder share: first weights, optimizers and their step, and the form in which a model is kept.

Knows neither the text nor the loss, and not the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama_config(vocabulary: int, positions: int, rope_theta: float, sizes: Mapping[str, Any]) -> Any:
    """The configuration of a Llama with tied embeddings; float32 is written so that bf16 files load as fp32."""
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=positions, rms_norm_eps=1e-5, tie_word_embeddings=True,
        num_key_value_heads=sizes["num_attention_heads"], bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, **sizes,
    )
    config.dtype = "float32"
    return config


def init_weights(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Embeddings N(0, 0.02), matrices N(0, 1/fan_in), projections back into the residual stream zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, 0.02, generator=generator)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
            elif weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)


def learning_rate_factor(done: float) -> float:
    """Warm-up is by steps (see train); constant to half of the budget, then linear to zero. done in 0..1."""
    return min(1.0, 2 * (1 - done))


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the block matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def descend(
    model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], loss: torch.Tensor, rate_factor: float
) -> None:
    """One step down the gradient of `loss`, clipped to norm 1, at `rate_factor` of every optimizer's own rate."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate_factor
        optimizer.step()
        optimizer.zero_grad()


def save_rounded(model: LlamaForCausalLM, folder: Path) -> Any:
    """Write bf16 safetensors with a config that loads as float32; returns the model with the rounded weights, in bf16."""
    rounded: Any = LlamaForCausalLM(model.config)
    rounded = rounded.to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written["dtype"] = "float32"  # transformers 5 loads in the stored dtype; bf16 logits flip 1.4% of the arg-maxes
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return rounded
