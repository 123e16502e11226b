"""Sensors through the real nvidia-ml-py over a library that is not there: calls have the arguments that the package takes."""

from __future__ import annotations

from ctypes import c_uint, c_ulonglong

import pytest

from specdec_lab.bench.gpu import readiness
from specdec_lab.sensors import Absent, Sensors

pynvml = pytest.importorskip("pynvml")
UUID = "4f3d2c1b-0000-1111-2222-333344445555"
NOT_SUPPORTED = 3


class Library:
    """The functions of libnvidia-ml that we reach, as C has them: a code is returned, results go where pointers say."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refused: set[str] = set()
        self.open = self.samples = 0

    def find(self, name):
        def call(*args):
            self.asked.append(name)
            return NOT_SUPPORTED if name in self.refused else getattr(self, name)(*args) or 0

        return call

    def nvmlInitWithFlags(self, flags):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        assert uuid.value == f"GPU-{UUID}".encode()

    def nvmlDeviceGetPowerUsage(self, handle, milliwatts):
        milliwatts._obj.value = 345_600

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        assert isinstance(millijoules._obj, c_ulonglong)
        millijoules._obj.value = 1 << 40

    def nvmlDeviceGetClockInfo(self, handle, kind, mhz):
        mhz._obj.value = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[kind.value]

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.used = 123 << 20

    def nvmlDeviceGetTemperature(self, handle, sensor, celsius):
        assert sensor.value == pynvml.NVML_TEMPERATURE_GPU
        celsius._obj.value = 51

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle, reasons):
        reasons._obj.value = 0x4

    def nvmlSystemGetDriverVersion(self, text, size):
        assert isinstance(size, c_uint)
        text.value = b"580.65.06"

    def nvmlGpmQueryDeviceSupport(self, handle, support):
        support._obj.isSupportedDevice = 1

    def nvmlGpmSampleAlloc(self, sample):
        self.samples += 1

    def nvmlGpmSampleGet(self, handle, sample):
        assert isinstance(sample, pynvml.c_nvmlGpmSample_t)

    def nvmlGpmSampleFree(self, sample):
        self.samples -= 1

    def nvmlGpmMetricsGet(self, asked):
        assert asked._obj.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        for metric in asked._obj.metrics[: asked._obj.numMetrics]:
            metric.value = 10.0 * metric.metricId


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", lambda: None)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer", made.find)
    return made


def test_every_reading_comes_through_the_real_package(library):
    with Sensors(UUID, wait=lambda _: True) as sensors:
        assert sensors.gpu_absent is None
        reading = sensors.read()
        assert (reading.power_w, reading.energy_j) == (345.6, (1 << 40) / 1e3)
        assert (reading.sm_mhz, reading.mem_mhz, reading.temperature_c) == (1980, 3201, 51)
        assert reading.memory_used_bytes == 123 << 20
        assert reading.clock_events == ("power cap",)
    assert library.open == 0


def test_counters_come_through_the_real_package_and_their_samples_are_freed(library):
    moments = iter([0.0, 2.0])
    sensors = Sensors(UUID, now=lambda: next(moments))
    with sensors.watch_activity() as watch:
        assert library.samples == 1
    assert (watch.activity.dram_bandwidth, watch.activity.sm_occupancy) == (1.0, 0.3)
    assert (watch.activity.tensor, watch.activity.hmma) == (0.5, 0.7)
    sensors.close()
    assert (library.samples, library.open) == (0, 0)


@pytest.mark.parametrize("call", ["nvmlGpmMetricsGet", "nvmlGpmSampleGet", "nvmlGpmSampleAlloc", "nvmlGpmQueryDeviceSupport"])
def test_counters_that_are_refused_leave_no_sample_behind(library, call):
    library.refused.add(call)
    sensors = Sensors(UUID)
    with sensors.watch_activity() as watch:
        watch._started -= 2
    assert watch.activity.dram_bandwidth == Absent("NVML: Not Supported")
    assert library.samples == 0
    sensors.close()


def test_the_driver_is_told_as_text(library):
    assert readiness.driver() == "580.65.06"
    assert library.open == 0
