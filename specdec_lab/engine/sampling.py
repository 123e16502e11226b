"""Randomness by counter, and laws: logits to probabilities, draws, Gumbel noise.

Every random number is a function of (seed, sequence, position, purpose), so results depend neither on batch order nor on
the schedule of drafts (specdec_kernels.noise). Not known here: models, caches, acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from specdec_kernels.noise import cpu as compiled
from specdec_kernels.noise import reference

_MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a random number decides. Numbers of different purposes are independent."""

    DRAFT = 0  # the drafted token
    ACCEPT = 1  # the acceptance test
    RESIDUAL = 2  # the token after a rejection, or the bonus token
    TARGET = 3  # Gumbel noise of plain sampling, shared with a coupled draft
    FORCE = 4  # acceptance, where it is forced


@dataclass(frozen=True, slots=True)
class Noise:
    """The random numbers of one run.

    sequences  [B] int64 identity of each row's sequence, the same whatever row it sits in
    """

    seed: int
    sequences: Tensor

    def words(self, positions: Tensor, purpose: Purpose, count: int) -> Tensor:
        """`count` random 32-bit words per position [B, T], as int64 [B, T, count]; from the compiled kernel on a CPU."""
        make = compiled.words if _is_compiled(positions) else reference.words
        return make(self.seed, self.sequences, positions, int(purpose), count)

    def uniform(self, positions: Tensor, purpose: Purpose, lanes: Tensor | int = 0) -> Tensor:
        """One float64 in [0, 1) per position [B, T]: 32 random bits.

        lanes  broadcasts with positions; numbers of different lanes (ranks of a tree) are independent
        """
        if isinstance(lanes, int) and lanes == 0 and _is_compiled(positions):
            return self.words(positions, purpose, 1)[..., 0].double() * 2.0**-32
        zero = torch.zeros((), dtype=torch.int64, device=positions.device)
        counter = (zero + lanes, positions, self.sequences[:, None], zero + int(purpose))
        return reference.philox(counter, (self.seed & _MASK, (self.seed >> 32) & _MASK))[0].double() * 2.0**-32

    def gumbel(self, positions: Tensor, vocabulary: int, purpose: Purpose) -> Tensor:
        """Standard Gumbel noise [B, T, V] in float64, one number per position and token."""
        return -torch.log(-torch.log((self.words(positions, purpose, vocabulary).double() + 0.5) * 2.0**-32))

    def draw(self, law: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        """Tokens [B, T] drawn from law [B, T, V] by the Gumbel-max trick: argmax(log law + the noise of the position)."""
        is_compiled = law.dtype == torch.float32 and _is_compiled(positions)
        make = compiled.gumbel_argmax if is_compiled else reference.gumbel_argmax
        return make(law, self.seed, self.sequences, positions, int(purpose))


def _is_compiled(positions: Tensor) -> bool:
    return positions.device.type == "cpu" and compiled.why_not() is None


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

    def why_not_compiled(self) -> str | None:
        """None if the compiled decoder can choose drafts by this law, else the reason in words."""
        return None if self.is_greedy or not (self.top_k or self.top_p < 1) else "a law with top-k or top-p takes a sort"

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
