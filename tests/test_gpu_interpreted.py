"""Stages of the GPU run whose kernels Triton can interpret: the aliased read, and the preferred back end in the small cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

from specdec_lab.bench.gpu import layouts, round_kernels  # noqa: E402  # after the check for Triton
from specdec_lab.bench.gpu.attention_calls import Call, Stage, attend_with, error_of, ours  # noqa: E402
from specdec_lab.bench.gpu.context import Context  # noqa: E402
from specdec_lab.bench.gpu.ledger import Ledger  # noqa: E402
from specdec_lab.bench.gpu.round_calls import round_calls  # noqa: E402
from specdec_lab.bench.gpu.sizes import TINY  # noqa: E402
from specdec_lab.bench.gpu.stages.exposed import _aliased, alias_mask, attention_of  # noqa: E402
from specdec_lab.engine.backends import BACKENDS  # noqa: E402

CPU = torch.device("cpu")


def test_an_aliased_read_is_attention_over_the_few_slots_that_it_names_and_is_timed_beside_the_real_one(tmp_path):
    (cell,) = TINY.exposed
    sizes = replace(TINY, repeats=1, most_layers=1)
    rows = list(_aliased(Context(CPU, sizes, Ledger(tmp_path / "gpu.jsonl", "r", {}), 60.0), cell))
    assert [row.kind for row in rows] == ["exposed"]
    assert rows[0].values["alias_slots"] == alias_mask(cell, 4, 1 << 20) + 1
    assert rows[0].values["exposed_s"] == pytest.approx(rows[0].values["attention_s"] - rows[0].values["aliased_s"])


def test_aliasing_changes_what_is_read_and_nothing_else():
    (cell,) = TINY.exposed
    board = Stage(cell, 2, torch.float32, CPU)
    real, cut = attention_of(board)(1), attention_of(board, mask=15)(1)
    assert real.shape == cut.shape
    assert not torch.equal(real, cut)
    keys = board.cache.kv.shape[-2]
    board.cache.kv[1].copy_(board.cache.kv[1][..., torch.arange(keys) & 15, :].clone())
    assert torch.equal(attention_of(board)(1), cut)


def test_the_triton_back_end_is_among_ours_and_right():
    board = Stage(TINY.kernels[0], 2, torch.float32, CPU)
    (call,) = [made for made in ours(board) if isinstance(made, Call) and made.name == "triton"]
    assert error_of(call, board, is_ours=True) < 4e-6


def test_the_kernel_gives_the_same_bits_over_a_cache_laid_out_by_tokens_and_is_timed_beside_the_other(tmp_path, monkeypatch):
    (cell,) = TINY.layouts
    board = Stage(cell, 2, torch.float32, CPU)
    made, same = (attend_with(BACKENDS["triton"], at)(1) for at in (board, layouts.in_nhd(board)))
    assert torch.equal(made, same)
    monkeypatch.setattr(layouts, "best", lambda board: "triton")
    monkeypatch.setattr(layouts, "BLOCKS", 1)
    sizes = replace(TINY, repeats=1, most_layers=1)
    (row,) = layouts.layout_rows(Context(CPU, sizes, Ledger(tmp_path / "gpu.jsonl", "r", {}), 60.0), cell)
    assert row.what == f"{cell} triton"
    assert row.values["nhd_over_hnd"] == pytest.approx(row.values["nhd_s"] / row.values["hnd_s"])


@pytest.mark.parametrize("case", [round_kernels.rope_append, round_kernels.kv_compact, round_kernels.row_lse,
                                  round_kernels.accept, round_kernels.sample_rows, round_kernels.noise,
                                  round_kernels.ngram_match])  # fmt: skip
def test_the_cases_of_round_kernels_run_the_kernels_and_find_them_right(case):
    ours, reference = round_kernels.both("row_lse", CPU)
    assert ours is not reference
    for what, error, allowed in case(CPU):
        if "rope_append bfloat16" not in what:  # the interpreter truncates where a GPU rounds
            assert error <= allowed, what


def test_the_calls_of_round_kernels_run_with_the_sizes_that_they_are_timed_with():
    calls = list(round_calls(TINY.round_size, torch.float32, CPU))
    assert [call.name for call in calls] == ["rope_append", "kv_compact", "row_lse", "accept_chain", "draw_residual"]
    for call in calls:
        call.launch(0)
        call.launch(call.turns)
        assert call.moved_bytes > 0
