"""Ceilings of this machine, measured once per process: how fast it reads memory and multiplies matrices.

A GPU is measured in cuda_ceilings.py. Not known here: what is compared with a ceiling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from statistics import median

import torch

from . import memory

READ_BYTES = 256 << 20  # several times a last-level cache of 32 MiB
STREAMS, READS = 9, 4  # streams spread over the calibration, reads of each
SIDE = 1024  # of the matrices on a CPU


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates that floors are computed from.

    read_bytes_per_s  of a read-only stream; gemm_flops_per_s of a matrix product, float32 on a CPU, bfloat16 on a GPU
    read_spread       (fastest - slowest) / median of the streams behind it
    copy_bytes_per_s  bytes read and written together
    launch_gap_s      from one empty kernel of a graph to the next
    timer_tick_s      step of the clock that kernels can read
    sm_mhz_*          clock before and after the calibration
    labels            what a reader of every number that rests on these must know
    """

    read_bytes_per_s: float
    gemm_flops_per_s: float
    read_spread: float = 0.0
    copy_bytes_per_s: float | None = None
    launch_gap_s: float | None = None
    timer_tick_s: float | None = None
    sm_mhz_before: float | None = None
    sm_mhz_after: float | None = None
    labels: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, float]:
        """The numbers that were measured, as every run header holds them."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "labels"}
        return {name: value for name, value in given.items() if value is not None}


def steady(streams: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Seconds of a ceiling from streams of repeats, and their spread: the median of the streams' best repeats.

    A stream's best leaves out what other work took from it; the median over streams leaves out a stream that was lucky, as
    on a virtual machine whose neighbours pause. The spread is (slowest - fastest) / median of those best repeats.
    """
    best = [min(stream) for stream in streams]
    middle = median(best)
    return middle, (max(best) - min(best)) / middle


@lru_cache(maxsize=8)
def calibrate(device: str, threads: int, read_bytes: int = READ_BYTES) -> Ceilings:
    """Ceilings of `device` with torch's `threads` (part of the key: another count is measured anew).

    read_bytes  of the stream on a CPU, a sum over float32 in memory allocated like the KV cache
    """
    place = torch.device(device)
    if place.type == "cuda":
        from .cuda_ceilings import measure

        return measure(place)
    return _cpu(place, read_bytes)


def _cpu(place: torch.device, read_bytes: int, now: Callable[[], float] = time.perf_counter) -> Ceilings:
    """Streams and products in turns, so that both are spread over the same stretch of time."""
    stream = memory.zeros((read_bytes // 4,), torch.float32, place)
    left = torch.randn(SIDE, SIDE, device=place)
    reads, products = [], []
    for _ in range(STREAMS):
        reads.append([_seconds(stream.sum, now) for _ in range(READS)])
        products.append([_seconds(lambda: left @ left, now)])
    read_s, spread = steady(reads)
    return Ceilings(read_bytes / read_s, 2 * SIDE**3 / min(min(product) for product in products), spread)


def _seconds(work: Callable[[], object], now: Callable[[], float]) -> float:
    start = now()
    work()
    return now() - start
