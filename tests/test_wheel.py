"""What an installed copy holds: weights, text, kernel source, front end and schema travel with the code."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = (
    "specdec_lab/demo/target/model.safetensors", "specdec_lab/demo/draft/model.safetensors",
    "specdec_lab/demo/target/tokenizer.json", "specdec_lab/demo/held_out.jsonl.gz", "specdec_lab/demo/LICENSE-PSF.txt",
    "specdec_lab/demo/needle/model.safetensors", "specdec_lab/demo/needle/config.json",
    "specdec_lab/demo/CORPUS.json", "specdec_kernels/cpu.c", "specdec_kernels/tree_attention/cpu.c",
    "specdec_kernels/decoder/cpu.c", "specdec_kernels/noise/cpu.c", "specdec_lab/policy/schema.json",
    "specdec_lab/view/web/live.js", "specdec_lab/_tuning_db/README.md",
)  # fmt: skip


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return set(zipfile.ZipFile(next(folder.glob("*.whl"))).namelist())


@pytest.mark.parametrize("needed", NEEDED)
def test_the_wheel_holds_what_the_code_reads(names, needed):
    assert needed in names


def test_the_wheel_has_two_roots_and_no_tests(names):
    roots = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert roots == {"specdec_lab", "specdec_kernels"}
