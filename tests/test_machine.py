"""Facts about the machine: limits of containers count, caches are counted once, and nothing private leaves."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from specdec_lab import __version__, machine
from specdec_lab.bench.provenance import made_with, provenance


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_facts_are_plain_json_and_name_neither_host_nor_path(monkeypatch):
    def asked():
        pytest.fail("the host name was asked for")

    monkeypatch.setattr(platform, "node", asked)
    machine._facts.cache_clear()
    facts = machine.facts()
    assert set(facts) == {"cpu", "cores", "memory_bytes", "last_level_cache_bytes", "os", "python"}
    text = json.dumps({**facts, "device": machine.device_name(None, 2), "versions": machine.versions()})
    assert not [p for p in {str(Path.home()), sys.prefix, os.getcwd()} - {"/"} if p in text]


def test_a_caller_cannot_change_the_facts_of_the_next():
    machine.facts()["cores"] = -1
    assert machine.facts()["cores"] >= 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("AMD EPYC", "AMD_EPYC_2t"),
        ("AMD EPYC 9654 96-Core Processor", "AMD_EPYC_9654_2t"),
        ("Intel(R) Xeon(R) Platinum 8480C", "Intel_Xeon_Platinum_8480C_2t"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "Intel_Core_i7-8700_2t"),
        ("../../etc", "etc_2t"),
    ],
)
def test_a_cpu_is_filed_under_its_model_and_threads(monkeypatch, model, name):
    monkeypatch.setattr(machine, "cpu_model", lambda: model)
    assert machine.device_name(None, 2) == name


def test_a_gpu_is_filed_under_its_name():
    assert machine.device_name("NVIDIA H200", 8) == "NVIDIA_H200"
    assert machine.device_name("NVIDIA A100-SXM4-80GB", 1) == "NVIDIA_A100-SXM4-80GB"


def test_the_cpu_model_is_the_first_named_one_or_the_architecture(tmp_path):
    write(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t:  Good CPU \nmodel name\t: Other\n"})
    assert machine.cpu_model(tmp_path) == "Good CPU"
    assert machine.cpu_model(tmp_path / "nowhere") == (platform.processor() or platform.machine())


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
    ],
)
def test_usable_cores_respect_affinity_and_cgroup_quota(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(machine, "_affinity", lambda: frozenset(range(8)))
    assert machine.usable_cores(write(tmp_path, files)) == cores


def test_memory_is_cut_to_the_limit_of_the_cgroup(tmp_path):
    physical = machine.memory_bytes(tmp_path)
    assert physical > 1 << 28
    assert machine.memory_bytes(write(tmp_path, {"sys/fs/cgroup/memory.max": "max\n"})) == physical
    assert machine.memory_bytes(write(tmp_path, {"sys/fs/cgroup/memory.max": "1048576\n"})) == 1 << 20
    write(tmp_path, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert machine.memory_bytes(tmp_path) == 1 << 20


def cache_files(core: int, index: int, level: int, kind: str, size: str, shared: str) -> dict[str, str]:
    folder = f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
    values = {"level": str(level), "type": kind, "size": size, "shared_cpu_list": shared}
    return {f"{folder}/{name}": value + "\n" for name, value in values.items()}


def test_the_last_level_cache_is_counted_once_per_cache_and_not_per_core(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_affinity", lambda: frozenset({0, 1, 2}))
    assert machine.last_level_cache_bytes(tmp_path) is None
    for core, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3"), (4, "4-5")):
        write(tmp_path, cache_files(core, 0, 1, "Data", "32K", str(core)))
        write(tmp_path, cache_files(core, 1, 1, "Instruction", "64K", str(core)))
        write(tmp_path, cache_files(core, 3, 3, "Unified", "32768K", shared))
    assert machine.last_level_cache_bytes(tmp_path) == 2 * (32 << 20)  # core 4 is not ours


def test_versions_are_told_without_importing_the_packages():
    program = (
        "import sys; from specdec_lab import machine; v = machine.versions(); machine.facts();"
        "assert v['torch'][0].isdigit(); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_package_that_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "MEASURED_WITH", ("surely-not-installed", "pytest"))
    assert machine.versions() == {"pytest": pytest.__version__}


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *name, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    package = write(tmp_path, {"package/__init__.py": "", "venv/lib/package/__init__.py": ""}) / "package"
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "one")
    return package


def test_the_commit_is_that_of_the_checkout_and_says_when_files_changed(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert machine.commit.__wrapped__(checkout) == head
    (checkout / "__init__.py").write_text("changed = True\n")
    assert machine.commit.__wrapped__(checkout) == f"{head}-dirty"


def test_a_package_installed_below_somebody_elses_checkout_has_no_commit(checkout):
    assert machine.commit.__wrapped__(checkout.parent / "venv/lib/package") == "unknown"


def test_outside_a_checkout_or_without_git_the_commit_is_unknown(tmp_path, checkout, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit.__wrapped__(write(tmp_path.parent / "elsewhere", {"__init__.py": ""})) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit.__wrapped__(checkout) == "unknown"


def test_openmp_libraries_of_the_process_are_counted_once_each(tmp_path):
    maps = tmp_path / "proc/self/maps"
    maps.parent.mkdir(parents=True)
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 1 /usr/lib/libgomp.so.1\n7f01-7f02 r--p 00000000 08:01 1 /usr/lib/libgomp.so.1\n"
        "7f02-7f03 r-xp 00000000 08:01 2 /opt/x/libgomp-a34b.so.1.0.0\n7f03-7f04 rw-p 00000000 00:00 0\n"
        "7f04-7f05 r-xp 00000000 08:01 3 /usr/lib/libcomposite.so\n"
    )
    assert machine.openmp_libraries(tmp_path) == ("libgomp.so.1", "libgomp-a34b.so.1.0.0")
    assert machine.openmp_libraries(tmp_path / "nowhere") == ()


def test_a_commit_is_shown_in_twelve_digits_and_still_says_that_files_changed():
    assert machine.short("0123456789abcdef" + "0" * 24) == "0123456789ab"
    assert machine.short("0123456789abcdef" + "0" * 24 + "-dirty") == "0123456789ab-dirty"
    assert machine.short("unknown") == "unknown"


def test_a_row_of_the_bench_folder_names_what_it_was_made_with(monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "0123456789abcdef-dirty")
    made = provenance()
    assert made["versions"]["specdec_lab"] == __version__
    assert made_with(made) == f"torch {made['versions']['torch']}, commit 0123456789ab-dirty, {made['created'][:10]}"
