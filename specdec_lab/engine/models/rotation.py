"""Rotary positions by themselves: the angles of a model, and turning heads by them.

For a draft whose sinks are read at other positions than where they were written (`position_mode="cache"`). Only families whose
whole heads turn, first half against second, are known; each is compared with transformers by the tests. Not known here: what
a forward reads, and from where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .runner import shape_of

MODES = ("absolute", "cache")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2")


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angle per position of each pair of a head's dimensions, [D/2] float64; a position may be negative."""

    frequencies: Tensor

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [*positions, D/2] in float32, from float64 angles: in float32 they are wrong by position * 6e-8."""
        angles = positions[..., None].double() * self.frequencies
        return angles.cos().float(), angles.sin().float()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., D] turned by these angles, in float32 or better and returned as it came."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotation_of(config: Any, device: torch.device) -> Rotation:
    """The angles of a model within its trained length: where they depend on the length, those of short texts.

    raises  ValueError for a model whose keys cannot be moved, or of which that is not known
    """
    if (reason := why_not(config)) is not None:
        raise ValueError(f"{reason}. Use draft_positions='absolute'.")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    frequencies: Tensor = LlamaRotaryEmbedding(config=config).inv_freq
    return Rotation(frequencies.to(device, torch.float64))


def why_not(config: Any) -> str | None:
    """None if the keys of this configuration's model can be moved to other positions, else the reason in words."""
    if config.model_type not in FAMILIES:
        return f"cache positions turn the keys of {', '.join(FAMILIES)}; how {config.model_type!r} turns its own is not known"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (getattr(config, "sliding_window", None) or config.max_position_embeddings) < config.max_position_embeddings:
        return "cache positions and a model's own sliding-window layers do not go together"
    part = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if part != 1.0 or shape_of(config).head_dim % 2:
        return f"cache positions turn whole heads; this model turns {part:g} of its heads of {shape_of(config).head_dim}"
    return None


def check_not_learned(model: nn.Module) -> None:
    """Raise ValueError for a model that learned its positions one by one."""
    tables = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    learned = next((name for name in tables if "wpe" in name or "pos" in name), None)
    if learned is not None:
        raise ValueError(f"{type(model).__name__} learned its positions one by one ({learned}), and what a key says of its own "
                         "cannot be moved. Use draft_positions='absolute'.")
