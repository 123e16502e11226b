"""`make gpu` takes the Python that has a CUDA build of torch, installs nothing, and says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None or os.name != "posix", reason="needs make and a POSIX shell")

# A Python as make sees it: it answers whether torch can be imported, and for which CUDA, and shows how it was called.
FAKE = """#!/bin/sh
case "$2" in
  *cuda*) exit {no_cuda} ;;
  "import torch") exit {no_torch} ;;
  *) echo "ran $* with $PYTHONPATH" ;;
esac
"""


def make_gpu(tmp_path, *, has_cuda, has_torch, stages="", path=""):
    """(exit code, output) of `make gpu` in a copy of the Makefile's folder that has no environment."""
    shutil.copy(ROOT / "Makefile", tmp_path / "Makefile")
    python = tmp_path / "python"
    python.write_text(FAKE.format(no_cuda=int(not has_cuda), no_torch=int(not has_torch)))
    python.chmod(0o755)
    words = ["make", "gpu", f"PYTHON={python}", *([f"STAGES={stages}"] if stages else [])]
    environment = {**{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}}
    environment |= {"PYTHONPATH": path} if path else {}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Makefile", "python"]  # nothing was made or installed
    return done.returncode, done.stdout


def test_a_python_with_cuda_torch_is_used_as_it_is(tmp_path):
    code, out = make_gpu(tmp_path, has_cuda=True, has_torch=True, stages="calibrate kernels", path="/carried")
    assert (code, out.strip()) == (0, "ran -m specdec_lab gpu calibrate kernels with .:kernels:/carried")


def test_a_python_with_a_cpu_torch_is_left_to_say_what_is_wrong(tmp_path):
    code, out = make_gpu(tmp_path, has_cuda=False, has_torch=True, stages="--rehearse")
    assert (code, out.strip()) == (0, "ran -m specdec_lab gpu --rehearse with .:kernels")


def test_without_torch_it_says_what_to_install_and_installs_nothing(tmp_path):
    code, out = make_gpu(tmp_path, has_cuda=False, has_torch=False)
    assert code != 0
    assert "needs a Python with torch" in out
    assert "installs nothing itself" in out


def test_the_check_for_cuda_is_true_only_of_a_cuda_build():
    lines = (ROOT / "Makefile").read_text().splitlines()
    code = next(line.partition(":= ")[2] for line in lines if line.startswith("HAS_CUDA"))
    for version, code_wanted in (("None", 1), ("'13.0'", 0)):
        fake = f"import sys, types; t = types.ModuleType('torch'); t.version = types.SimpleNamespace(cuda={version}); "
        done = subprocess.run([sys.executable, "-c", f"{fake} sys.modules['torch'] = t; {code}"], check=False)
        assert done.returncode == code_wanted
