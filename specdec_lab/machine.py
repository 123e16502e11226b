"""Facts about this machine that travel with every number: cores, memory, caches, versions, commit, time.

Standard library only. No host name and no path leaves this module.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path("/")
PACKAGE = Path(__file__).parent
MEASURED_WITH = ("torch", "transformers", "numpy", "triton", "tokenizers", "optuna")
# Words of a CPU's marketing name that do not tell machines apart.
CPU_NOISE = re.compile(r"\((?:R|TM|C)\)|@.*$|\b\d+-Core\b|\b(?:CPU|Processor)\b", re.IGNORECASE)


@cache
def _facts(root: Path) -> dict[str, Any]:
    return {
        "cpu": cpu_model(root),
        "cores": usable_cores(root),
        "memory_bytes": memory_bytes(root),
        "last_level_cache_bytes": last_level_cache_bytes(root),
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        "python": platform.python_version(),
    }


def facts() -> dict[str, Any]:
    """cpu, cores (usable logical ones), memory_bytes, last_level_cache_bytes (None if unknown), os, python."""
    return dict(_facts(ROOT))


def cpu_model(root: Path = ROOT) -> str:
    """The CPU's name as its maker writes it; the architecture where the system does not tell."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # macOS and Windows pin nothing


def usable_cores(root: Path = ROOT) -> int:
    """Logical cores that this process may keep busy: its affinity, cut to the whole cores of its cgroup's quota."""
    return max(1, math.floor(min(len(_affinity()), _cpu_quota(root))))


def _cgroups(root: Path) -> list[Path]:
    """The folders that may hold this process's limits: its own cgroup (v2), and the root of v2 or of v1 controllers."""
    base = root / "sys/fs/cgroup"
    lines = (_read(root / "proc/self/cgroup") or "").splitlines()
    own = [base / line.split("::", 1)[1].lstrip("/") for line in lines if line.startswith("0::")]
    return [*own, base, base / "cpu", base / "memory"]


def _cpu_quota(root: Path) -> float:
    """Cores' worth of time that the cgroup grants; infinite when unlimited."""
    quotas = [math.inf]
    for folder in _cgroups(root):
        quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")  # v2
        if not period:
            quota, period = _read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "1"  # v1
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas)


def memory_bytes(root: Path = ROOT) -> int:
    """Memory of the machine, or the limit of this process's cgroup where that is less."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _cgroups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name) or "max"
            limits += [int(limit)] if limit.isdigit() else []
    return min(limits)


def last_level_cache_bytes(root: Path = ROOT) -> int | None:
    """Last-level data cache that the usable cores reach, every cache counted once; None where sysfs does not tell."""
    caches: dict[tuple[int, str], int] = {}  # (level, the cores that share it) -> bytes
    for core in _affinity():
        for index in root.glob(f"sys/devices/system/cpu/cpu{core}/cache/index*"):
            size = re.fullmatch(r"(\d+)([KM]?)", _read(index / "size") or "")
            if size and _read(index / "type") in ("Data", "Unified"):
                level, shared = int(_read(index / "level") or 0), _read(index / "shared_cpu_list") or str(core)
                caches[level, shared] = int(size[1]) << {"": 0, "K": 10, "M": 20}[size[2]]
    if not caches:
        return None
    last = max(level for level, _ in caches)
    return sum(size for (level, _), size in caches.items() if level == last)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def openmp_libraries(root: Path = ROOT) -> tuple[str, ...]:
    """File names of the OpenMP libraries in this process, each of which has threads of its own; empty where unknown."""
    found: dict[str, None] = {}
    for line in (_read(root / "proc/self/maps") or "").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if re.match(r"lib(gomp|omp|iomp5)[.-]", path.name):
            found[path.name] = None
    return tuple(found)


def device_name(torch_device_name: str | None, threads: int) -> str:
    """The name under which measurements are filed: `NVIDIA_H200`, or for a CPU its model and threads, `AMD_EPYC_2t`.

    torch_device_name  what torch.cuda.get_device_name() says, None on a CPU
    """
    name = torch_device_name if torch_device_name is not None else f"{CPU_NOISE.sub(' ', cpu_model())} {threads}t"
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("_.")


def versions() -> dict[str, str]:
    """Versions of the installed packages that numbers depend on; nothing is imported."""
    found = {}
    for name in MEASURED_WITH:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, to the millisecond, ISO 8601: runs of one second keep their order."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@cache
def commit(package: Path = PACKAGE) -> str:
    """The commit of the checkout that this package is part of, with "-dirty" if changed; else "unknown"."""
    # A package installed below somebody's checkout lies in that work tree and is not tracked by it.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"


def short(commit: str) -> str:
    """A commit as it is shown: twelve digits, and "-dirty" where files were changed."""
    digits, dash, state = commit.partition("-")
    return f"{digits[:12]}{dash}{state}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
