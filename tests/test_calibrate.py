"""Ceilings: steady where a machine is not, complete in every header, and the GPU's probes mean what their reference says."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from specdec_kernels.bandwidth import reference
from specdec_lab.engine import calibrate as module
from specdec_lab.engine.calibrate import Ceilings, calibrate, steady
from specdec_lab.view.report import CEILINGS


def test_a_ceiling_is_the_median_of_the_best_of_each_stream():
    calm = [[1.0, 1.1], [5.0, 1.02], [1.01, 9.0]]
    assert steady(calm) == (1.01, pytest.approx(0.02 / 1.01))


def test_one_lucky_stream_and_one_disturbed_one_do_not_move_a_ceiling():
    calm = [[1.0]] * 7
    assert steady([[0.45], *calm, [3.0]])[0] == 1.0
    assert steady([[0.45], *calm, [3.0]])[1] == pytest.approx(2.55)


def test_streams_and_products_take_turns_so_that_both_see_the_whole_stretch(monkeypatch):
    done = []

    def seconds(work, now):
        done.append("product" if work.__name__ == "<lambda>" else "read")
        return 1.0

    monkeypatch.setattr(module, "_seconds", seconds)
    found = module._cpu(torch.device("cpu"), 1 << 20)
    assert done == [*["read"] * module.READS, "product"] * module.STREAMS
    assert (found.read_bytes_per_s, found.read_spread) == (1 << 20, 0.0)


def test_a_cpu_has_a_read_stream_a_product_and_a_spread_and_no_gpu_numbers():
    found = calibrate("cpu", 1, 8 << 20)
    assert found.to_dict().keys() == {"read_bytes_per_s", "gemm_flops_per_s", "read_spread"}
    assert found.read_bytes_per_s > 1e8
    assert calibrate("cpu", 1, 8 << 20) is found


def test_every_ceiling_of_a_header_has_words_and_a_unit_in_a_report():
    assert set(CEILINGS) == {f.name for f in fields(Ceilings)} - {"labels"}
    full = Ceilings(1.0, 1.0, 0.1, 1.0, 1e-6, 1e-6, 1980.0, 1970.0, ("read ceiling by torch.sum",))
    assert set(full.to_dict()) == set(CEILINGS)


@pytest.mark.parametrize(("words", "programs"), [(1, 1), (16, 3), (1000, 7), (4099, 2)])
def test_shares_cover_all_words_once_and_begin_where_wide_loads_can(words, programs):
    share = reference.share_of(words, programs)
    assert share % reference.ALIGNED == 0
    assert (programs - 1) * share < words + programs * reference.ALIGNED
    assert programs * share >= words
    data = torch.randint(-(1 << 31), (1 << 31) - 1, (words,), dtype=torch.int32)
    sums = reference.read_bw(data, torch.full((programs,), 77, dtype=torch.int64))
    assert int(sums.sum()) == int(data.long().sum())


def test_the_clock_readings_of_the_reference_differ_from_each_other():
    ticks = reference.timer_ticks(20, torch.device("cpu"))
    assert (ticks.diff() > 0).all()


IN_THE_INTERPRETER = """
import torch
from specdec_kernels.bandwidth import gpu, reference
for n, programs in ((5000, 3), (4096, 1), (17, 2)):
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (n,), dtype=torch.int32)
    ours, theirs = torch.full((programs,), 7, dtype=torch.int64), torch.zeros(programs, dtype=torch.int64)
    assert torch.equal(gpu.read_bw(words, ours), reference.read_bw(words, theirs)), (n, programs)
    assert torch.equal(gpu.copy_bw(words, torch.full_like(words, 3)), words)
print("equal")
"""

FOR_A_GPU = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from specdec_kernels.bandwidth import gpu

wide = [["tt.divisibility", 16]]
def compiled(kernel, signature, block, aligned, warps):
    constants = {(len(signature) - 1,): gpu.BLOCK} if block else {}
    source = ASTSource(kernel, signature, constexprs=constants, attrs={(i,): wide for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]

numbers = {"num_words": "i64", "share": "i64", "BLOCK": "constexpr"}
read = compiled(gpu.read_kernel, {"words": "*i32", "shares": "*i64", **numbers}, True, (0, 2, 3), gpu.WARPS)
assert read.count("ld.global.v4.b32") == gpu.BLOCK // (4 * 32 * gpu.WARPS), read.count("ld.global")
assert "ld.local" not in read and "st.local" not in read
copy = compiled(gpu.copy_kernel, {"words": "*i32", "target": "*i32", "num_words": "i64", "BLOCK": "constexpr"}, True,
                (0, 1, 2), gpu.WARPS)
assert "ld.global.v4.b32" in copy and "st.global.v4.b32" in copy
ticks = compiled(gpu.ticks_kernel, {"readings": "*i64", "count": "i32"}, False, (), 1)
assert ticks.count("%globaltimer") >= 2
compiled(gpu.nothing_kernel, {}, False, (), 1)
print("compiled")
"""


@pytest.mark.parametrize(("code", "says", "interpret"), [(IN_THE_INTERPRETER, "equal", "1"), (FOR_A_GPU, "compiled", "0")])
def test_the_gpu_probes_equal_their_reference_and_compile_to_wide_loads(code, says, interpret, tmp_path):
    triton = pytest.importorskip("triton")
    if interpret == "1" and triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 cannot range up to a number that a kernel computed (numpy 2.4 and later)")
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == says
