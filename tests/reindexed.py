"""What cache positions mean, by brute force: transformers, in float64, fed one token at a time with the keys it may see, turned
to positions 0, 1, 2, ... as if the text between sinks and window had never been.

Nothing of the engine is used: keys are kept unturned, and turned again for every token.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x [.., N, D] turned by angles [N, D/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class ExactRotary(nn.Module):
    """cos and sin from float64 angles; of frequencies that depend on the length, those of short texts."""

    def __init__(self, config):
        super().__init__()
        made = LlamaRotaryEmbedding(config=config)
        self.frequencies, self.scaling = made.inv_freq.double(), float(made.attention_scaling)

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        both = torch.cat([angles, angles], -1)
        return both.cos() * self.scaling, both.sin() * self.scaling


@dataclass
class Line:
    """One text as the model has read it: unturned keys and values per layer, [Hkv, n, D] each."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    def copied(self) -> Line:
        return Line(list(self.keys), list(self.values), self.length)


@dataclass
class Oracle:
    """A model that reads through sink + recent tokens at the positions of its cache."""

    model: object
    sink: int
    recent: int
    moves: bool = True  # False: keys stay where they are in the text
    seen: int = field(default=0)  # the furthest position that the model met

    def __post_init__(self):
        self.model = copy.deepcopy(self.model).double()
        self.model.set_attn_implementation("eager")
        self.model.model.rotary_emb = ExactRotary(self.model.config)
        self.frequencies = self.model.model.rotary_emb.frequencies

    def line(self) -> Line:
        config = self.model.config
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        empty = [torch.zeros(heads, 0, dim, dtype=torch.float64) for _ in range(layers)]
        return Line(empty, list(empty))

    def read(self, line: Line, tokens: list[int]) -> Tensor:
        """Append tokens to a line; the logits after the last one, [V] float64."""
        logits = torch.empty(0)
        for token in tokens:
            logits = self._feed(line, token)
        return logits

    @torch.no_grad()
    def _feed(self, line: Line, token: int) -> Tensor:
        here = line.length
        kept = [j for j in range(here) if j < self.sink or here - j < self.recent]
        places = torch.arange(len(kept)) if self.moves else torch.tensor(kept, dtype=torch.int64)
        mine = len(kept) if self.moves else here
        cache, angles = DynamicCache(), places[:, None].double() * self.frequencies
        for layer, (keys, values) in enumerate(zip(line.keys, line.values, strict=True)):
            cache.update(turned(keys[:, kept], angles)[None], values[:, kept][None], layer)
        out = self.model(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[mine]]), past_key_values=cache, use_cache=True
        )
        back = -mine * self.frequencies[None]
        for layer in range(len(line.keys)):
            key, value = cache.layers[layer].keys[0, :, -1:], cache.layers[layer].values[0, :, -1:]
            line.keys[layer] = torch.cat([line.keys[layer], turned(key, back)], 1)
            line.values[layer] = torch.cat([line.values[layer], value], 1)
        line.length, self.seen = here + 1, max(self.seen, mine)
        return out.logits[0, -1]
