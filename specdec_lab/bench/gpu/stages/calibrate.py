"""`calibrate`: the ceilings, twice; and whether the hardware's own counters agree with the bytes that we count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....engine.calibrate import calibrate
from ....sensors import Absent, Sensors
from ..context import Context
from ..ledger import Row, bar_verdict

REPEATABLE = 0.02
TICK_S = 2e-6  # above it phases are timed by events, not by stamps
STEADY_S = 0.5  # of reading, for the counters
COUNTED_WORDS = 1 << 30  # that are read: 4 GiB
COPY_FIGURE = 4.3e12  # bytes/s; what plans for one H200 were made with


def stage(context: Context) -> Iterator[Row]:
    """Both calibrations, their agreement, and the counters over half a second of reading."""
    first = context.ceilings
    calibrate.cache_clear()
    second = calibrate(str(context.device), torch.get_num_threads())
    for number, found in enumerate((first, second), 1):
        yield Row("ceilings", f"calibration {number}", found.to_dict(), labels=found.labels)
    for name in ("read_bytes_per_s", "gemm_flops_per_s", "copy_bytes_per_s"):
        values = [value for found in (first, second) if (value := getattr(found, name)) is not None]
        if len(values) == 2:
            apart = abs(values[0] - values[1]) / max(values)
            verdict = bar_verdict(-apart, -REPEATABLE)
            yield Row("repeatability", name, {"apart": apart}, verdict, f"two calibrations within {REPEATABLE:.0%}")
    if second.timer_tick_s is not None:
        verdict = bar_verdict(-second.timer_tick_s, -TICK_S)
        yield Row("tick", "clock of the kernels", {"tick_s": second.timer_tick_s}, verdict, f"at most {TICK_S * 1e6:.0f} us")
    if context.is_gpu:
        yield Row("planning", "read ceiling over the planning figure of one H200", {
            "over": second.read_bytes_per_s / COPY_FIGURE, "read_bytes_per_s": second.read_bytes_per_s})
        yield _counters(context)


def peak_bytes_per_s(properties: Any) -> float | None:
    """The memory's theoretical bandwidth, of which the counters give a share: double data rate, kHz, bits."""
    clock, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return None if not clock or not width else 2 * 1e3 * clock * width / 8


def _counters(context: Context) -> Row:
    """Read memory for a while, and ask the GPU how busy its memory was."""
    words = torch.empty(COUNTED_WORDS, dtype=torch.int32, device=context.device).random_()
    once, rounds = context.timed(lambda turn: words.sum(), 1).seconds, 0
    rounds = max(1, int(STEADY_S / once))
    sensors = Sensors(str(torch.cuda.get_device_properties(context.device).uuid))
    try:
        with sensors.watch_activity() as watch:
            for _ in range(rounds):
                words.sum()
            context.synchronize()
    finally:
        sensors.close()
    found = watch.activity
    if isinstance(found.dram_bandwidth, Absent):
        return Row("counters", "GPM", reason=str(found.dram_bandwidth))
    peak = peak_bytes_per_s(torch.cuda.get_device_properties(context.device))
    if peak is None:
        told = {"dram_share": found.dram_bandwidth}
        return Row("counters", "GPM", told, reason="this torch does not tell the clock of the memory")
    counted = 4 * words.numel() * rounds / found.seconds
    return Row("counters", "GPM", {
        "dram_share": found.dram_bandwidth, "counted_share": counted / peak, "counted_bytes_per_s": counted,
        "peak_bytes_per_s": peak, "over": found.dram_bandwidth * peak / counted, "seconds": found.seconds,
    })  # fmt: skip
