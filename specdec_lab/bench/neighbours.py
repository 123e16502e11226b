"""How much processor time other processes take while we measure. Linux only; elsewhere the answer is None."""

from __future__ import annotations

import os
from pathlib import Path

STAT = Path("/proc/stat")
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; not idle and iowait, guests are in user


def busy_s(stat: Path = STAT) -> float | None:
    """Processor seconds that everything on this machine has used since it started, and that its host took away."""
    try:
        fields = stat.read_text().split("\n", 1)[0].split()[1:]
        return sum(int(fields[at]) for at in BUSY_FIELDS) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def other_cores(busy_before: float | None, busy_after: float | None, own_cpu_s: float, wall_s: float) -> float | None:
    """Cores' worth of time that others had in a stretch of `wall_s` in which we used `own_cpu_s`."""
    if busy_before is None or busy_after is None or wall_s <= 0:
        return None
    return max(0.0, busy_after - busy_before - own_cpu_s) / wall_s
