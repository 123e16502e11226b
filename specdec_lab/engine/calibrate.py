"""Ceilings of this machine, measured once per process: how fast it reads memory and multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import memory

READ_BYTES = 256 << 20  # several times a last-level cache of 32 MiB
READS, MULTIPLIES = 30, 9  # enough that a moment of other work does not lower the ceiling


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates that floors are computed from: bytes/s of a read-only stream, FLOP/s of a float32 GEMM."""

    read_bytes_per_s: float
    gemm_flops_per_s: float


def _best_seconds(work: Callable[[], object], repeats: int, synchronize: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@lru_cache(maxsize=8)
def calibrate(device: str, threads: int, read_bytes: int = READ_BYTES) -> Ceilings:
    """Best of several repeats on `device` with torch's `threads` (part of the key: another count is measured anew).

    The stream is a sum over `read_bytes` of float32 in memory allocated like the KV cache; a ceiling is a best value by
    intention, medians are for results.
    """
    place = torch.device(device)
    synchronize = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    stream = memory.zeros((read_bytes // 4,), torch.float32, place)
    read_s = _best_seconds(stream.sum, READS, synchronize)
    del stream
    side = 1024 if place.type == "cpu" else 8192
    left = torch.randn(side, side, device=place)
    multiply_s = _best_seconds(lambda: left @ left, MULTIPLIES, synchronize)
    return Ceilings(read_bytes / read_s, 2 * side**3 / multiply_s)
