"""What the Triton attention kernels compile to for GPUs that are not here: no spills, wide loads, tensor cores.

A few of the tiles that we ship; `python -m specdec_kernels.contract` compiles all of them.
"""

from __future__ import annotations

import os

import pytest

from specdec_kernels import contract
from specdec_kernels.contract import SHARED_LIMIT, Compiled
from specdec_kernels.tree_attention.gpu_contract import combine, shipped, split
from specdec_kernels.tree_attention.gpu_tiles import CHUNK, ROW_BLOCKS, WINDOW_CHUNK, Tile, row_block, tile

pytest.importorskip("triton")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("make", "cores"),
    [
        (lambda: split(90, 20, 128, "bf16"), {"HMMA"}),  # a chain of 5 with 4 query heads per KV head
        (lambda: split(90, 64, 128, "bf16", FINAL=True), {"HGMMA"}),
        (lambda: split(90, 4, 128, "bf16", "window", STAMPED=True), {"HMMA"}),
        (lambda: split(90, 4, 128, "fp16", "lists"), {"HMMA"}),
        (lambda: split(90, 20, 128, "bf16", work_list=True, ALIASED=True), {"HMMA"}),
        (lambda: split(80, 20, 128, "bf16"), {"HMMA"}),
        (lambda: split(100, 64, 128, "bf16"), {"UTCHMMA"}),
        (lambda: combine(90, 128, "bf16"), set()),
        (lambda: split(90, 5, 64, "fp32"), set()),
    ],
    ids=["verify", "tree of 16 x 4", "window", "lists", "work list", "sm_80", "sm_100", "combine", "float32"],
)
def test_a_shipped_kernel_keeps_the_contract(make, cores):
    compiled = make()
    assert compiled.faults == (), str(compiled)
    assert compiled.wide_loads > 0, str(compiled)
    assert set(compiled.tensor_cores) == cores, str(compiled)


def test_the_contract_sees_a_kernel_that_spills_and_one_that_does_not_fit():
    spilling = split(90, 16, 128, "fp32", chosen=Tile(16, 32, 4, 2))
    assert any("spill" in fault for fault in spilling.faults), str(spilling)
    too_large = Compiled("x", 80, 100, SHARED_LIMIT[80] + 1, 0, 0, 1, ("HMMA",))
    assert too_large.faults == ("166,913 bytes of shared memory, sm_80 has 166,912",)


def test_nothing_is_compiled_where_triton_interprets(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 is set, so Triton compiles nothing"):
        combine(90, 64, "bf16")


def test_the_command_compiles_what_ships_and_fails_with_a_fault(monkeypatch, capsys):
    made = iter([Compiled("good one", 90, 1, 1, 0, 0, 1, ()), Compiled("bad one", 90, 1, 1, 8, 2, 1, ())])
    monkeypatch.setattr("specdec_kernels.tree_attention.gpu_contract.shipped", lambda: [lambda: next(made)] * 2)
    assert contract.main() == 1
    assert "2 instructions spill, 8 bytes of stack" in capsys.readouterr().out


def test_every_row_block_head_size_and_gpu_has_a_tile_that_fits_whole_parts():
    for sm in (80, 86, 89, 90, 100, 120):
        for minor in (6, 7, 9):
            for dim in (16, 64, 80, 128, 256):
                for size in (2, 4):
                    for rows in (1, 16, 17, 32, 33, 64, 65, 256):
                        for windowed in (False, True):
                            chosen = tile(rows, dim, size, sm, minor, windowed=windowed)
                            listed = tile(rows, dim, size, sm, minor, windowed=windowed, work_list=True)
                            assert chosen.block_m == row_block(rows, dim, size) >= listed.block_m
                            assert {chosen.block_m, listed.block_m} <= set(ROW_BLOCKS)
                            assert all(n % t.block_n == 0 for n in (CHUNK, WINDOW_CHUNK) for t in (chosen, listed))
    assert len(list(shipped())) > 100
