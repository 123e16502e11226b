"""Sensors: what NVML says becomes readings, what it refuses becomes a reason, and the thread ends when told."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from specdec_lab import sensors
from specdec_lab.sensors import (
    ACTIVITY_METRICS,
    CLOCK_EVENTS,
    Absent,
    Conditions,
    Reading,
    Sensors,
    clock_event_names,
    conditions,
    joules_per_token,
)


class NvmlError(Exception):
    pass


class StubNvml(SimpleNamespace):
    """The part of pynvml that sensors use, for one GPU; calls named in `refused` raise."""

    NVMLError = NvmlError
    NVML_SUCCESS, NVML_GPM_METRICS_GET_VERSION = 0, 1
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *refused: str) -> None:
        super().__init__(refused=set(refused), opened=[], num_inits=0, events=0x4, samples=[], has_gpm=1, bad_metric=None)

    def _call(self, name, value):
        if name in self.refused:
            raise NvmlError("Not Supported")
        return value

    def nvmlInit(self):
        self._call("nvmlInit", None)
        self.num_inits += 1

    def nvmlShutdown(self):
        self.num_inits -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        self.opened.append(index)
        return self._call("nvmlDeviceGetHandleByIndex", f"gpu{index}")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.opened.append(uuid)
        return f"gpu{uuid}"

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._call("nvmlDeviceGetPowerUsage", 345_600)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._call("nvmlDeviceGetTotalEnergyConsumption", 7_000_500)

    def nvmlDeviceGetClockInfo(self, handle, which):
        return {1: 1980, 2: 3201}[which]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=123 << 20)

    def nvmlDeviceGetTemperature(self, handle, which):
        return 51

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self._call("nvmlDeviceGetCurrentClocksEventReasons", self.events)

    def nvmlGpmQueryDeviceSupport(self, handle):
        return SimpleNamespace(isSupportedDevice=self._call("nvmlGpmQueryDeviceSupport", self.has_gpm))

    def nvmlGpmSampleAlloc(self):
        self.samples.append(f"sample{len(self.samples)}")
        return self.samples[-1]

    def nvmlGpmSampleGet(self, handle, sample):
        return self._call("nvmlGpmSampleGet", sample)

    def nvmlGpmSampleFree(self, sample):
        self.samples[self.samples.index(sample)] = "freed"

    def c_nvmlGpmMetricsGet_t(self):
        return SimpleNamespace(metrics=[SimpleNamespace(nvmlReturn=0, value=0.0) for _ in range(8)])

    def nvmlGpmMetricsGet(self, asked):
        self._call("nvmlGpmMetricsGet", None)
        assert (asked.version, asked.sample1, asked.sample2) == (1, "sample0", "sample1")
        for metric in asked.metrics[: asked.numMetrics]:
            metric.value = metric.metricId * 8.0
            metric.nvmlReturn = 3 if metric.metricId == self.bad_metric else 0


def ticks(count):
    """A wait that ends the thread after `count` periods, and the periods that it was asked to wait."""
    asked = []

    def wait(seconds):
        asked.append(seconds)
        return len(asked) >= count

    return wait, asked


def test_readings_carry_units_and_the_injected_time():
    reading = Sensors(nvml=StubNvml(), now=lambda: 12.5).read()
    assert (reading.at_s, reading.power_w, reading.energy_j) == (12.5, 345.6, 7000.5)
    assert (reading.sm_mhz, reading.mem_mhz, reading.temperature_c) == (1980, 3201, 51)
    assert reading.memory_used_bytes == 123 << 20
    assert reading.clock_events == ("power cap",)


def test_a_refused_reading_is_absent_with_its_reason_and_the_others_stay():
    reading = Sensors(nvml=StubNvml("nvmlDeviceGetTotalEnergyConsumption")).read()
    assert reading.energy_j == Absent("NVML: Not Supported")
    assert str(reading.energy_j) == "absent (NVML: Not Supported)"
    assert reading.power_w == 345.6


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_without_driver_or_gpu_every_gpu_reading_is_absent_and_nvml_is_let_go(call):
    nvml = StubNvml(call)
    with Sensors(nvml=nvml, wait=lambda _: True) as s:
        assert "Not Supported" in s.gpu_absent.reason
        reading = s.read()
        assert reading.power_w == reading.sm_mhz == reading.clock_events == s.gpu_absent
    assert isinstance(reading.load_average, float | Absent)
    assert nvml.num_inits == 0


def test_a_missing_package_is_absent_with_its_name(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(sensors.importlib, "import_module", missing)
    assert Sensors().gpu_absent == Absent("nvidia-ml-py is not installed")


def test_the_thread_reads_once_per_period_until_it_is_told_to_end():
    times = iter([0.0, 0.2, 0.4])
    wait, asked = ticks(3)
    s = Sensors(nvml=StubNvml(), now=lambda: next(times), wait=wait, hz=5)
    s.start()
    s.stop()
    assert [r.at_s for r in s.readings()] == [0.0, 0.2, 0.4]
    assert asked == [0.2] * 3


def test_stop_ends_a_waiting_thread_and_close_lets_the_driver_go():
    nvml, before = StubNvml(), threading.active_count()
    s = Sensors(nvml=nvml, hz=0.001)  # would wait 1000 s
    with s:
        assert nvml.num_inits == 1
        with pytest.raises(RuntimeError, match="already being read"):
            s.start()
    s.stop()
    s.close()
    assert threading.active_count() == before
    assert nvml.num_inits == 0
    assert len(s.readings()) == 1
    assert s.read().power_w == Absent("the sensors were closed")


def test_a_gpu_is_named_by_index_or_by_uuid_with_or_without_its_prefix():
    nvml = StubNvml()
    for gpu in (3, "GPU-ab", "cd"):
        Sensors(gpu, nvml=nvml)
    assert nvml.opened == [3, "GPU-ab", "GPU-cd"]


@pytest.mark.parametrize("hz", [0, -1, 1000])
def test_an_impossible_rate_is_a_clear_error(hz):
    with pytest.raises(ValueError, match=f"got hz={hz}"):
        Sensors(nvml=StubNvml(), hz=hz)


def test_clock_event_bits_are_those_of_nvml():
    pynvml = pytest.importorskip("pynvml")
    constants = {
        "gpu idle": "GpuIdle", "application clocks": "ApplicationsClocksSetting", "power cap": "SwPowerCap",
        "hardware slowdown": "HwSlowdown", "sync boost": "SyncBoost",
        "software thermal slowdown": "SwThermalSlowdown", "hardware thermal slowdown": "HwThermalSlowdown",
        "power brake": "HwPowerBrakeSlowdown", "display clocks": "DisplayClockSetting",
    }  # fmt: skip
    assert {name: getattr(pynvml, f"nvmlClocksEventReason{c}") for name, c in constants.items()} == {
        name: bit for bit, name in CLOCK_EVENTS.items()
    }


def test_every_clock_event_has_a_word_and_unknown_ones_are_kept():
    assert clock_event_names(0) == ()
    assert clock_event_names(0x44) == ("power cap", "hardware thermal slowdown")
    assert clock_event_names(0x1001) == ("gpu idle", "unknown 0x1000")


ONE = Reading(0.0, 100.0, 50.0, 1900, 3000, 1, 40, ("gpu idle",), 0.5, 2000.0)


def test_conditions_of_a_stretch_are_its_range_mean_difference_and_slowdowns():
    readings = [
        ONE,
        replace(ONE, at_s=1.0, power_w=Absent("hiccup"), sm_mhz=1500, clock_events=("power cap", "gpu idle")),
        replace(ONE, at_s=2.0, power_w=300.0, energy_j=450.0, clock_events=("power cap",)),
    ]
    found = conditions(readings)
    assert (found.seconds, found.sm_mhz, found.power_w) == (2.0, (1500, 1900), 200.0)
    assert (found.energy_j, found.throttle) == (400.0, ("power cap",))


def test_conditions_without_evidence_are_absent_with_the_reason():
    assert conditions([]).power_w == Absent("no reading was taken")
    short = conditions([ONE, replace(ONE, at_s=0.4, energy_j=90.0)])
    assert "0.40 s are too short" in short.energy_j.reason
    no_gpu = Absent("NVML: no driver")
    nothing = replace(ONE, power_w=no_gpu, energy_j=no_gpu, sm_mhz=no_gpu, clock_events=no_gpu)
    assert {conditions([nothing]).sm_mhz, conditions([nothing]).energy_j, conditions([nothing]).throttle} == {no_gpu}


def test_the_cpu_clock_is_the_mean_over_the_cores_that_tell(tmp_path):
    assert sensors.cpu_mhz(tmp_path) == Absent("the kernel shows no CPU clock")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\n")
    assert isinstance(sensors.cpu_mhz(tmp_path), Absent)
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2000.5\nflags : x\ncpu MHz\t\t: 3000.5\n")
    assert sensors.cpu_mhz(tmp_path) == 2500.5
    for core, khz in ((0, "1000000\n"), (1, "2000000\n"), (2, "offline")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(khz)
    assert sensors.cpu_mhz(tmp_path) == 1500.0


def watched(nvml, seconds=0.5):
    times = iter([0.0, seconds])
    s = Sensors(nvml=nvml, now=lambda: next(times))
    with s.watch_activity() as watch:
        pass
    return watch.activity


def test_the_gpus_counters_become_shares_and_every_sample_is_freed():
    nvml = StubNvml()
    found = watched(nvml)
    assert (found.seconds, found.dram_bandwidth, found.sm_occupancy, found.tensor, found.hmma) == (0.5, 0.8, 0.24, 0.4, 0.56)
    assert nvml.samples == ["freed", "freed"]


def test_the_numbers_of_the_counters_are_those_of_nvml():
    pynvml = pytest.importorskip("pynvml")
    names = {"dram_bandwidth": "DRAM_BW_UTIL", "sm_occupancy": "SM_OCCUPANCY", "tensor": "ANY_TENSOR_UTIL",
             "hmma": "HMMA_TENSOR_UTIL"}
    assert {k: getattr(pynvml, f"NVML_GPM_METRIC_{n}") for k, n in names.items()} == ACTIVITY_METRICS
    made = pynvml.c_nvmlGpmMetricsGet_t()
    made.metrics[3].metricId = 7  # the fields that we write exist
    assert {name for name, *_ in made._fields_} == {"version", "numMetrics", "sample1", "sample2", "metrics"}


@pytest.mark.parametrize("call", ["nvmlGpmQueryDeviceSupport", "nvmlGpmSampleGet", "nvmlGpmMetricsGet"])
def test_counters_that_are_refused_are_absent_with_the_reason_and_no_sample_is_left(call):
    nvml = StubNvml(call)
    found = watched(nvml)
    assert {found.dram_bandwidth, found.sm_occupancy, found.tensor, found.hmma} == {Absent("NVML: Not Supported")}
    assert set(nvml.samples) <= {"freed"}


def test_one_refused_counter_leaves_the_others():
    nvml = StubNvml()
    nvml.bad_metric = ACTIVITY_METRICS["hmma"]
    found = watched(nvml)
    assert (found.tensor, found.hmma) == (0.4, Absent("NVML: code 3"))


def test_counters_say_why_they_are_absent_on_an_older_gpu_a_short_stretch_and_no_gpu():
    older = StubNvml()
    older.has_gpm = 0
    assert "Hopper and later" in watched(older).tensor.reason
    assert "0.050 s are too short" in watched(StubNvml(), 0.05).tensor.reason
    assert watched(StubNvml("nvmlInit")).tensor == Absent("NVML: Not Supported")


def test_a_package_without_a_call_is_absent_and_says_that_it_is_too_old():
    class Old(StubNvml):
        nvmlGpmQueryDeviceSupport = property()

    assert "too old" in watched(Old()).tensor.reason


def test_joules_per_token_need_an_energy_and_a_token():
    nothing = Absent("nothing")
    assert joules_per_token(Conditions(2.0, nothing, nothing, 600.0, nothing), 300) == 2.0
    assert joules_per_token(Conditions(2.0, nothing, nothing, nothing, nothing), 300) == nothing
    assert "no token" in joules_per_token(Conditions(2.0, nothing, nothing, 600.0, nothing), 0).reason
