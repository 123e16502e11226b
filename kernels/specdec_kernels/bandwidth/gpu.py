"""The probes on an NVIDIA GPU, in Triton; meanings in reference.py, same arguments.

A read stream is what floors are computed from: attention and linear layers read, and a copy, half of which is writing, says
less about them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from .reference import share_of

BLOCK, WARPS = 4096, 8  # words a program has in flight: four 16-byte loads of each of its 256 threads
PROGRAMS_PER_SM = 8  # 2,048 threads, all that an SM holds


@triton.jit
def read_kernel(words, shares, num_words, share, BLOCK: tl.constexpr):
    """One program sums one contiguous share."""
    start = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(start + share, num_words)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for at in range(start, end, BLOCK):
        offsets = at + tl.arange(0, BLOCK)
        total += tl.load(words + offsets, mask=offsets < end, other=0).to(tl.int64)
    tl.store(shares + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def copy_kernel(words, target, num_words, BLOCK: tl.constexpr):
    """One program copies one block."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_words
    tl.store(target + offsets, tl.load(words + offsets, mask=inside), mask=inside)


@triton.jit
def ticks_kernel(readings, count):
    """One warp reads the clock until it has changed `count` times."""
    last = cuda.globaltimer()
    for place in range(count):
        now = cuda.globaltimer()
        while now == last:
            now = cuda.globaltimer()
        tl.store(readings + place, now)
        last = now


@triton.jit
def nothing_kernel():
    """For launch gaps."""


def programs(device: torch.device) -> int:
    """How many shares keep every multiprocessor of this GPU full."""
    return PROGRAMS_PER_SM * int(torch.cuda.get_device_properties(device).multi_processor_count)


def read_bw(words: Tensor, sums: Tensor) -> Tensor:
    """See reference.read_bw."""
    share = share_of(words.numel(), sums.numel())
    _launch(read_kernel, sums.numel(), words, sums, words.numel(), share, BLOCK=BLOCK, num_warps=WARPS)
    return sums


def copy_bw(words: Tensor, target: Tensor) -> Tensor:
    """See reference.copy_bw."""
    blocks = triton.cdiv(words.numel(), BLOCK)
    _launch(copy_kernel, blocks, words, target, words.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return target


def timer_ticks(count: int, device: torch.device) -> Tensor:
    """See reference.timer_ticks; the clock is %globaltimer, which all multiprocessors share."""
    readings = torch.empty(count, dtype=torch.int64, device=device)
    _launch(ticks_kernel, 1, readings, count, num_warps=1)
    return readings


def nothing(device: torch.device) -> None:
    """See reference.nothing."""
    with torch.cuda.device(device):
        _launch(nothing_kernel, 1, num_warps=1)


def _launch(kernel: Any, blocks: int, *arguments: Any, **constants: Any) -> None:
    kernel[(blocks,)](*arguments, **constants)
