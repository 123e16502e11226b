"""Ceilings of a GPU in one to two seconds: reads, copies, matrix products, empty launches, the clock's tick.

Random data throughout: zeros draw less power and run faster than real data does. Not known here: what is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..sensors import Absent, Sensors
from .calibrate import Ceilings, steady

READ_BYTES = 4 << 30  # many times any L2
SMALLEST_READ_BYTES = 512 << 20  # still several times an L2 of 60 MB
STREAMS, REPEATS = 7, 4
WARM_UP = 40  # matrix products: an idle GPU's clock needs tens of milliseconds to rise
SIDE = 8192
LAUNCHES, TICKS = 100, 64
TORCH_READS = "read ceiling by torch.sum: Triton cannot run here"

Launch = Callable[[], object]


def measure(device: torch.device) -> Ceilings:
    """The ceilings of this GPU, now; what they were measured in is given back to the driver."""
    with torch.cuda.device(device):
        try:
            return _measured(device)
        finally:
            torch.cuda.empty_cache()


def _measured(device: torch.device) -> Ceilings:
    before = _sm_mhz(device)
    left = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    right = torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(left)
    for _ in range(WARM_UP):
        torch.mm(left, right, out=product)
    words = _random_words(device)
    half = words.numel() // 2
    read, labels = _reader(words)
    read_s, spread = steady(_timed(read))
    copy_s, _ = steady(_timed(lambda: words[half : 2 * half].copy_(words[:half])))
    multiply_s, _ = steady(_timed(lambda: torch.mm(left, right, out=product)))
    has_kernels = not labels
    return Ceilings(
        4 * words.numel() / read_s, 2 * SIDE**3 / multiply_s, spread, 2 * 4 * half / copy_s,
        _launch_gap(device) if has_kernels else None, _timer_tick(device) if has_kernels else None,
        before, _sm_mhz(device), labels,
    )  # fmt: skip


def _random_words(device: torch.device) -> Tensor:
    """As many as are wanted, or as fit into a quarter of what is free."""
    free = int(torch.cuda.mem_get_info(device)[0])
    if free < 2 * SMALLEST_READ_BYTES:
        raise MemoryError(f"calibrating {device} needs {2 * SMALLEST_READ_BYTES:,} bytes of its memory, {free:,} are free; "
                          "end what else holds memory there (nvidia-smi lists it)")
    size = min(READ_BYTES, max(SMALLEST_READ_BYTES, free // 4))
    return torch.empty(size // 4, dtype=torch.int32, device=device).random_()


def _reader(words: Tensor) -> tuple[Launch, tuple[str, ...]]:
    """A launch that reads every word, and what a reader must know of it."""
    if find_spec("triton") is None or torch.cuda.get_device_capability(words.device) < (8, 0):
        return words.sum, (TORCH_READS,)
    from specdec_kernels.bandwidth import gpu

    sums = torch.empty(gpu.programs(words.device), dtype=torch.int64, device=words.device)
    gpu.read_bw(words, sums)  # compiles
    return lambda: gpu.read_bw(words, sums), ()


def _timed(launch: Launch) -> list[list[float]]:
    """Seconds on the GPU's own clock, REPEATS of every stream between the same two waits."""
    found = []
    launch()
    for _ in range(STREAMS):
        marks: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            launch()
            mark.record()
        torch.cuda.synchronize()
        found.append([a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:], strict=False)])
    return found


def _launch_gap(device: torch.device) -> float:
    """Seconds per empty kernel of a graph that holds nothing else."""
    from specdec_kernels.bandwidth import gpu

    gpu.nothing(device)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            gpu.nothing(device)
    return steady(_timed(graph.replay))[0] / LAUNCHES


def _timer_tick(device: torch.device) -> float:
    """The smallest step that the clock of the kernels was seen to make."""
    from specdec_kernels.bandwidth import gpu

    readings = gpu.timer_ticks(TICKS, device).tolist()
    return 1e-9 * float(min(b - a for a, b in zip(readings, readings[1:], strict=False)))


def _sm_mhz(device: torch.device) -> float | None:
    """The clock that NVML tells now, if it does."""
    watch = Sensors(str(torch.cuda.get_device_properties(device).uuid))
    try:
        clock = watch.read().sm_mhz
    finally:
        watch.close()
    return None if isinstance(clock, Absent) else float(clock)
