"""NVIDIA's memory checker and profiler, run over our small cases in a process of their own, and what they print.

Not known here: kernels.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

SMALL_CASES = (sys.executable, "-m", "specdec_lab.bench.gpu.small_cases")
CHECKS = ("memcheck", "racecheck")
ERROR_CODE = 9
READ_METRIC = "dram__bytes_read.sum"
SCALES = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}
Spawn = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a tool said: is_good None where it could not be run, with the reason in `words`."""

    is_good: bool | None
    words: str
    read_bytes: float | None = None
    counted_bytes: int | None = None


def sanitize(tool: str, seconds: float, spawn: Spawn = subprocess.run) -> Found:
    """Run the small cases under compute-sanitizer with this tool."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        return Found(None, "compute-sanitizer is not on PATH")
    command = [path, "--tool", tool, "--error-exitcode", str(ERROR_CODE), *SMALL_CASES, "cases"]
    done = _run(command, seconds, spawn)
    if isinstance(done, str):
        return Found(None, done)
    text = done.stdout + done.stderr
    if (summary := re.search(r"(ERROR|RACECHECK) SUMMARY: (.*)", text)) is None:
        return Found(None, f"no summary in its output; it ended with code {done.returncode}: {_last(text)}")
    return Found(done.returncode == 0, summary[2])


def count_bytes(seconds: float, spawn: Spawn = subprocess.run) -> Found:
    """Bytes that the memory delivered during one large attention call, beside those that we count."""
    path = shutil.which("ncu")
    if path is None:
        return Found(None, "ncu is not on PATH")
    command = [path, "--clock-control", "none", "--profile-from-start", "off", "--metrics", READ_METRIC, "--csv",
               *SMALL_CASES, "bytes"]  # fmt: skip
    done = _run(command, seconds, spawn)
    if isinstance(done, str):
        return Found(None, done)
    counted = re.search(r'"kv_bytes": (\d+)', done.stdout)
    read = read_bytes_in(done.stdout)
    if counted is None or read is None:
        said = _last(done.stdout + done.stderr)
        return Found(None, f"no counters in its output; it ended with code {done.returncode}: {said}")
    return Found(True, "", read, int(counted[1]))


def read_bytes_in(text: str) -> float | None:
    """The sum of the metric over all kernels of ncu's CSV, which other lines surround; None where there is none."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if '"Metric Name"' in line), None)
    if start is None:
        return None
    rows = [row for row in csv.DictReader(lines[start:]) if row.get("Metric Name") == READ_METRIC]
    if not rows:
        return None
    return sum(float(row["Metric Value"].replace(",", "")) * SCALES[row["Metric Unit"]] for row in rows)


def _run(command: list[str], seconds: float, spawn: Spawn) -> subprocess.CompletedProcess[str] | str:
    try:
        return spawn(command, capture_output=True, text=True, timeout=max(1.0, seconds), check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0].rpartition('/')[2]} was not done after {seconds:.0f} s"
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
