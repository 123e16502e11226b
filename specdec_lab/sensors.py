"""Power, clocks, temperature and load while something runs: a background thread that reads NVML a few times per second.

Absent hardware, or a reading that it refuses, is a value with a reason and never an error. Not known here: what runs.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

MAX_READINGS = 36_000  # two hours at 5 Hz
MIN_ENERGY_WINDOW_S = 1.0  # the energy counter is refreshed too rarely for less
MIN_ACTIVITY_WINDOW_S = 0.1  # NVML's GPM counters need as much between two samples
CLOCK_EVENTS = {
    0x01: "gpu idle", 0x02: "application clocks", 0x04: "power cap", 0x08: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip
# An idle GPU and clocks set on purpose lower the clock too, but do not disturb a measurement.
HARMLESS_EVENTS = frozenset({"gpu idle", "application clocks", "display clocks"})

# What `Activity` asks of GPM, in its order; these are NVML's own numbers.
ACTIVITY_METRICS = {"dram_bandwidth": 10, "sm_occupancy": 3, "tensor": 5, "hmma": 7}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Absent:
    """A reading that this machine does not give, and why."""

    reason: str

    def __str__(self) -> str:
        return f"absent ({self.reason})"


@dataclass(frozen=True, slots=True)
class Reading:
    """What the sensors said at one moment.

    energy_j       the GPU's counter since the driver was loaded: differences count, over at least a second
    clock_events   why the GPU's clock is below its maximum, `CLOCK_EVENTS` in words
    load_average   processes that ran or waited for a core, mean of the last minute
    """

    at_s: float
    power_w: float | Absent
    energy_j: float | Absent
    sm_mhz: int | Absent
    mem_mhz: int | Absent
    memory_used_bytes: int | Absent
    temperature_c: int | Absent
    clock_events: tuple[str, ...] | Absent
    load_average: float | Absent
    cpu_mhz: float | Absent


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a stretch of readings says about the measurement made during it.

    throttle  clock events that slow the GPU down, each once
    """

    seconds: float
    sm_mhz: tuple[int, int] | Absent  # lowest, highest
    power_w: float | Absent  # mean
    energy_j: float | Absent
    throttle: tuple[str, ...] | Absent


@dataclass(frozen=True, slots=True)
class Activity:
    """What the GPU's own counters (NVML GPM, Hopper and later) say of a stretch: shares of the maximum, 0 to 1.

    dram_bandwidth  of the memory's theoretical bandwidth, reads and writes together; it checks a byte model in steady state
    sm_occupancy    warps that were active, of those that could be
    tensor, hmma    time in which tensor cores, or their 16-bit instructions, were at work
    """

    seconds: float
    dram_bandwidth: float | Absent
    sm_occupancy: float | Absent
    tensor: float | Absent
    hmma: float | Absent


class _Gpu:
    """One GPU behind NVML; every verb gives a value or an Absent."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, nvml: Any | None, gpu: int | str) -> _Gpu | Absent:
        """gpu is an NVML index or a UUID. The driver is initialised once for every open GPU."""
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")
            except ImportError:
                return Absent("nvidia-ml-py is not installed")
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            return Absent(f"NVML: {error}")
        try:
            if isinstance(gpu, int):
                return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(gpu))
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(gpu if gpu.startswith("GPU-") else f"GPU-{gpu}"))
        except nvml.NVMLError as error:
            nvml.nvmlShutdown()
            return Absent(f"GPU {gpu}: {error}")

    def ask(self, read: Callable[[Any, Any], T]) -> T | Absent:
        try:
            return read(self._nvml, self._handle)
        except self._nvml.NVMLError as error:
            return Absent(f"NVML: {error}")
        except AttributeError as error:  # an older nvidia-ml-py
            return Absent(f"this nvidia-ml-py is too old: {error}")

    def activity(self, first: Any, last: Any, seconds: float) -> Activity:
        """The counters between two GPM samples."""
        if seconds < MIN_ACTIVITY_WINDOW_S:
            return _no_activity(seconds, Absent(
                f"{seconds:.3f} s are too short for the GPU's counters; they need {MIN_ACTIVITY_WINDOW_S:g} s"
            ))
        found = self.ask(lambda nvml, _: _gpm_metrics(nvml, first, last))
        return _no_activity(seconds, found) if isinstance(found, Absent) else Activity(seconds, *found)

    def close(self) -> None:
        self.ask(lambda nvml, _: nvml.nvmlShutdown())


def _gpm_metrics(nvml: Any, first: Any, last: Any) -> list[float | Absent]:
    """Each metric on its own may be refused; NVML says so in its return code."""
    asked = nvml.c_nvmlGpmMetricsGet_t()
    asked.version, asked.numMetrics = nvml.NVML_GPM_METRICS_GET_VERSION, len(ACTIVITY_METRICS)
    asked.sample1, asked.sample2 = first, last
    for place, number in enumerate(ACTIVITY_METRICS.values()):
        asked.metrics[place].metricId = number
    nvml.nvmlGpmMetricsGet(asked)
    given = [asked.metrics[place] for place in range(len(ACTIVITY_METRICS))]
    return [
        metric.value / 100 if metric.nvmlReturn == nvml.NVML_SUCCESS else Absent(f"NVML: code {metric.nvmlReturn}")
        for metric in given
    ]


def _no_activity(seconds: float, reason: Absent) -> Activity:
    return Activity(seconds, reason, reason, reason, reason)


class ActivityWatch:
    """`with sensors.watch_activity() as watch: work()`, then `watch.activity`: what the GPU's counters say of the work.

    Without a GPU, or where its counters are refused, every share is absent with the reason. The work must have ended on the
    GPU before the block does: counters know nothing of what was only launched.
    """

    def __init__(self, gpu: _Gpu | Absent, now: Callable[[], float]) -> None:
        self._gpu, self._now, self._started = gpu, now, 0.0
        self._first: Any = gpu
        self.activity = _no_activity(0.0, Absent("nothing was watched yet"))

    def __enter__(self) -> Self:
        self._first, self._started = self._sample(), self._now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds, last = self._now() - self._started, self._sample()
        samples = [s for s in (self._first, last) if not isinstance(s, Absent)]
        try:
            if isinstance(self._gpu, Absent) or len(samples) < 2:
                reason = next(s for s in (self._gpu, self._first, last) if isinstance(s, Absent))
                self.activity = _no_activity(seconds, reason)
            else:
                self.activity = self._gpu.activity(self._first, last, seconds)
        finally:
            for sample in samples:
                self._release(sample)

    def _sample(self) -> Any | Absent:
        gpu = self._gpu
        if isinstance(gpu, Absent):
            return gpu
        support = gpu.ask(lambda nvml, handle: nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice)
        if isinstance(support, Absent) or not support:
            return support if isinstance(support, Absent) else Absent("this GPU has no GPM counters (Hopper and later do)")
        sample = gpu.ask(lambda nvml, _: nvml.nvmlGpmSampleAlloc())
        if isinstance(sample, Absent):
            return sample
        taken = gpu.ask(lambda nvml, handle: nvml.nvmlGpmSampleGet(handle, sample))
        if isinstance(taken, Absent):
            self._release(sample)
        return taken

    def _release(self, sample: Any) -> None:
        assert isinstance(self._gpu, _Gpu)
        self._gpu.ask(lambda nvml, _: nvml.nvmlGpmSampleFree(sample))


def clock_event_names(bits: int) -> tuple[str, ...]:
    """The words for an NVML bit mask of clock event reasons."""
    unknown = bits & ~sum(CLOCK_EVENTS)
    names = tuple(name for bit, name in CLOCK_EVENTS.items() if bits & bit)
    return (*names, f"unknown {unknown:#x}") if unknown else names


def load_average() -> float | Absent:
    """Mean number of running or waiting processes over the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return Absent("this system gives no load average")


def cpu_mhz(root: Path = Path("/")) -> float | Absent:
    """Mean current clock over the cores, as the kernel tells it."""
    cores = [_number(p) for p in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]
    khz = [c for c in cores if c is not None]
    if khz:
        return sum(khz) / len(khz) / 1000
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return Absent("the kernel shows no CPU clock")
    mhz = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(mhz) / len(mhz) if mhz else Absent("the kernel shows no CPU clock")


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None  # a core that is offline, or not ours to read


class Sensors:
    """Reads the GPU's and CPU's sensors in the background: `with Sensors() as sensors: ...; sensors.readings()`.

    gpu    NVML index or UUID; torch's index differs where CUDA_VISIBLE_DEVICES is set, its UUID never does
    now    seconds; readings are stamped with it
    wait   waits for a period, returns True when the thread shall end; None waits for stop()
    nvml   the pynvml module, imported when None
    """

    def __init__(
        self, gpu: int | str = 0, *, hz: float = 5.0, now: Callable[[], float] = time.perf_counter,
        wait: Callable[[float], bool] | None = None, nvml: Any | None = None,
    ) -> None:
        if not 0 < hz <= 100:
            raise ValueError(f"sensors can be read 0 to 100 times per second, got hz={hz}")
        self._period, self._now = 1 / hz, now
        self._stopping = threading.Event()
        self._wait = wait or self._stopping.wait
        self._gpu = _Gpu.open(nvml, gpu)
        self._readings: deque[Reading] = deque(maxlen=MAX_READINGS)
        self._thread: threading.Thread | None = None

    @property
    def gpu_absent(self) -> Absent | None:
        """Why there are no GPU readings, or None when there are."""
        return self._gpu if isinstance(self._gpu, Absent) else None

    def _ask(self, read: Callable[[Any, Any], T]) -> T | Absent:
        return self._gpu if isinstance(self._gpu, Absent) else self._gpu.ask(read)

    def read(self) -> Reading:
        """One reading now, in the caller's thread; it is not kept."""
        return Reading(
            at_s=self._now(),
            power_w=self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3),
            energy_j=self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3),
            sm_mhz=self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
            mem_mhz=self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
            memory_used_bytes=self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used),
            temperature_c=self._ask(lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
            clock_events=self._ask(
                lambda nvml, gpu: clock_event_names(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
            ),
            load_average=load_average(),
            cpu_mhz=cpu_mhz(),
        )

    def watch_activity(self) -> ActivityWatch:
        """The GPU's own counters over the block that follows; see ActivityWatch."""
        return ActivityWatch(self._gpu, self._now)

    def readings(self) -> tuple[Reading, ...]:
        """What the thread has read so far, oldest first; the last two hours at most."""
        return tuple(self._readings)

    def start(self) -> None:
        """Start reading in the background."""
        if self._thread is not None:
            raise RuntimeError("these sensors are already being read; stop() them first")
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="specdec-lab-sensors", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._readings.append(self.read())
            if self._wait(self._period):
                return

    def stop(self) -> None:
        """Stop reading; the readings stay. Stopping twice is harmless."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Stop, and let the driver go."""
        self.stop()
        if isinstance(self._gpu, _Gpu):
            self._gpu.close()
            self._gpu = Absent("the sensors were closed")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def conditions(readings: Iterable[Reading]) -> Conditions:
    """What the readings of a measurement, oldest first, say about it."""
    kept = list(readings)
    if not kept:
        nothing = Absent("no reading was taken")
        return Conditions(0.0, nothing, nothing, nothing, nothing)
    seconds = kept[-1].at_s - kept[0].at_s
    clocks = _present([r.sm_mhz for r in kept])
    power = _present([r.power_w for r in kept])
    events = _present([r.clock_events for r in kept])
    return Conditions(
        seconds=seconds,
        sm_mhz=clocks if isinstance(clocks, Absent) else (min(clocks), max(clocks)),
        power_w=power if isinstance(power, Absent) else sum(power) / len(power),
        energy_j=_energy(kept[0].energy_j, kept[-1].energy_j, seconds),
        throttle=events if isinstance(events, Absent) else _harmful(events),
    )


def joules_per_token(found: Conditions, tokens: int) -> float | Absent:
    """Energy of the whole GPU over the tokens that were emitted meanwhile."""
    if isinstance(found.energy_j, Absent):
        return found.energy_j
    return found.energy_j / tokens if tokens > 0 else Absent("no token was emitted")


def _present(values: list[T | Absent]) -> list[T] | Absent:
    """The values that are there, or why none is."""
    present = [v for v in values if not isinstance(v, Absent)]
    return present or next(v for v in values if isinstance(v, Absent))


def _energy(first: float | Absent, last: float | Absent, seconds: float) -> float | Absent:
    for value in (first, last):
        if isinstance(value, Absent):
            return value
    if seconds < MIN_ENERGY_WINDOW_S:
        return Absent(f"{seconds:.2f} s are too short for the energy counter; it needs {MIN_ENERGY_WINDOW_S:.0f} s")
    return last - first  # type: ignore[operator]  # both are numbers: the loop returned otherwise


def _harmful(events: list[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in events for name in names if name not in HARMLESS_EVENTS))
