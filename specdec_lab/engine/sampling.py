"""Randomness by counter, and laws: logits to probabilities, draws, Gumbel noise.

Every random number is a function of (seed, sequence, position, purpose), so results depend neither on batch order nor on
the schedule of drafts. Philox-4x32-10: Salmon 2011. Not known here: models, caches, acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Purpose(IntEnum):
    """What a random number decides. Numbers of different purposes are independent."""

    DRAFT = 0  # the drafted token
    ACCEPT = 1  # the acceptance test
    RESIDUAL = 2  # the token after a rejection, or the bonus token
    TARGET = 3  # Gumbel noise of plain sampling, shared with a coupled draft


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four 32-bit words (as int64) per counter; counters broadcast. Equal to the published vectors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps; the masks below undo the sign
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True, slots=True)
class Noise:
    """The random numbers of one run.

    sequences  [B] int64 identity of each row's sequence, the same whatever row it sits in
    """

    seed: int
    sequences: Tensor

    @property
    def _key(self) -> tuple[int, int]:
        return self.seed & _MASK, (self.seed >> 32) & _MASK

    def uniform(self, positions: Tensor, purpose: Purpose, lanes: Tensor | int = 0) -> Tensor:
        """One float64 in [0, 1) per position [B, T]: 32 random bits.

        lanes  broadcasts with positions; numbers of different lanes (ranks of a tree) are independent
        """
        zero = torch.zeros((), dtype=torch.int64, device=positions.device)
        words = philox((zero + lanes, positions, self.sequences[:, None], zero + int(purpose)), self._key)
        return words[0].double() * 2.0**-32

    def gumbel(self, positions: Tensor, vocabulary: int, purpose: Purpose) -> Tensor:
        """Standard Gumbel noise [B, T, V] in float64, one number per position and token."""
        blocks = torch.arange(-(-vocabulary // 4), dtype=torch.int64, device=positions.device)
        zero = torch.zeros((), dtype=torch.int64, device=positions.device)
        counter = (blocks, positions[..., None], self.sequences[:, None, None], zero + int(purpose))
        words = torch.stack(torch.broadcast_tensors(*philox(counter, self._key)), -1).flatten(-2)[..., :vocabulary]
        return -torch.log(-torch.log((words.double() + 0.5) * 2.0**-32))


@dataclass(frozen=True, slots=True)
class Processor:
    """Temperature, then top-k, then top-p, as transformers orders them. Applied alike to target and draft."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the law is a point mass on the arg-max."""
        return self.temperature == 0.0

    def law(self, logits: Tensor) -> Tensor:
        """logits [..., V] -> probabilities in float32 or better, rows sum to 1. Not for greedy decoding."""
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        if self.top_p < 1.0:
            ordered, order = logits.sort(dim=-1, descending=True)
            mass = ordered.softmax(-1).cumsum(-1)
            outside = mass - ordered.softmax(-1) >= self.top_p  # the token that crosses top_p stays
            logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
        return logits.softmax(-1)


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Tokens drawn by inverse distribution: weights [..., V] >= 0 (any positive sum), uniform [...] in [0, 1).

    A token of weight zero is never drawn.
    """
    cumulative = weights.double().cumsum(-1)
    target = (uniform * cumulative[..., -1])[..., None]
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def gumbel_argmax(law: Tensor, noise: Tensor) -> Tensor:
    """Tokens drawn by the Gumbel-max trick: argmax(log law + noise), [..., V] -> [...]."""
    return (law.double().log() + noise).argmax(-1)
