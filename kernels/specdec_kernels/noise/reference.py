"""What the noise means, in torch on any device. Every other file of this folder computes the same; same arguments, same order.

A number is a function of (seed, sequence, position, purpose, index), so it depends neither on batch order nor on schedule.
Philox-4x32-10: Salmon 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def words(seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, count: int) -> Tensor:
    """The first `count` 32-bit words of every position, as int64.

    seed  an int, or int64 [1] on the device
    sequences [B], positions [B, T] int32 or int64 (their low 32 bits count); returns [B, T, count]
    """
    blocks = torch.arange(-(-count // 4), dtype=torch.int64, device=positions.device)
    which = torch.full((), purpose, dtype=torch.int64, device=positions.device)
    counter = (blocks, positions.long()[..., None] & _MASK, sequences.long()[:, None, None] & _MASK, which)
    made = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(torch.broadcast_tensors(*made), -1).flatten(-2)[..., :count]


def uniform(seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, lanes: Tensor | int = 0) -> Tensor:
    """One float64 in [0, 1) per position [B, ...]: the first word of block `lane`, 32 bits. Lanes broadcast with positions."""
    which = torch.full((), purpose, dtype=torch.int64, device=positions.device)
    whose = sequences.long().view(-1, *[1] * (positions.dim() - 1)) & _MASK
    counter = (which * 0 + lanes, positions.long() & _MASK, whose, which)
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))[0].double() * 2.0**-32


def gumbel(seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, count: int) -> Tensor:
    """Standard Gumbel noise float64 [B, T, count]: -log(-log u), u = (word + 1/2) / 2^32."""
    return -torch.log(-torch.log((words(seed, sequences, positions, purpose, count).double() + 0.5) * 2.0**-32))


def gumbel_argmax(law: Tensor, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """Tokens drawn from law [B, T, V] by the Gumbel-max trick with the words of their positions [B, T] -> [B, T].

    The token of largest log law - log(-log u), u = (word + 1/2) / 2^32 in float64, the first of equals.
    """
    return (law.double().log() + gumbel(seed, sequences, positions, purpose, law.shape[-1])).argmax(-1)
