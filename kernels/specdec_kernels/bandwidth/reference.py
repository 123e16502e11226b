"""What the probes of a machine compute, in torch on any device. Every other file of this folder does the same; same arguments.

Memory is made of int32 words, summed in int64: a sum over gigabytes is exact, in whatever order it is taken.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

ALIGNED = 16  # words; shares begin where the widest loads can


def share_of(num_words: int, programs: int) -> int:
    """Words that each of `programs` reads, the last ones fewer: a multiple of `ALIGNED`."""
    return -(-num_words // (programs * ALIGNED)) * ALIGNED


def read_bw(words: Tensor, sums: Tensor) -> Tensor:
    """Read every word once and keep next to nothing: sums[p] becomes the sum of the p-th share of words.

    words  [n] int32, contiguous; sums [P] int64, overwritten and returned
    """
    share = share_of(words.numel(), sums.numel())
    for place in range(sums.numel()):
        sums[place] = words[place * share : (place + 1) * share].sum(dtype=torch.int64)
    return sums


def copy_bw(words: Tensor, target: Tensor) -> Tensor:
    """Copy words [n] into target [n], which is returned."""
    return target.copy_(words)


def timer_ticks(count: int, device: torch.device) -> Tensor:
    """`count` successive readings of the device's clock that differ from each other, in nanoseconds. [count] int64"""
    readings = [time.perf_counter_ns()]
    while len(readings) < count:
        now = time.perf_counter_ns()
        if now != readings[-1]:
            readings.append(now)
    return torch.tensor(readings, dtype=torch.int64, device=device)


def nothing(device: torch.device) -> None:
    """A launch that does nothing."""
