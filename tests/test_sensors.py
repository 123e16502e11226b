"""Sensors: what NVML says becomes readings, what it refuses becomes a reason, and the thread ends when told."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from specdec_lab import sensors
from specdec_lab.sensors import CLOCK_EVENTS, Absent, Reading, Sensors, clock_event_names, conditions


class NvmlError(Exception):
    pass


class StubNvml(SimpleNamespace):
    """The part of pynvml that sensors use, for one GPU; calls named in `refused` raise."""

    NVMLError = NvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *refused: str) -> None:
        super().__init__(refused=set(refused), opened=[], num_inits=0, events=0x4)

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
