"""Kernels of others that read pages, against stand-ins with their signatures and float64 inside; both layouts of a cache."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

from specdec_lab.bench.gpu import layouts, paged_calls
from specdec_lab.bench.gpu.attention_calls import PLANNED, Call, Stage, best, error_of, others
from specdec_lab.bench.gpu.context import Context, OutOfTime
from specdec_lab.bench.gpu.ledger import RED, Ledger, Row
from specdec_lab.bench.gpu.sizes import FULL, TINY, KernelCell
from specdec_lab.bench.gpu.stages import kernels as kernels_stage
from specdec_lab.bench.kernel_shapes import KernelShape
from specdec_lab.records import KvView

CPU = torch.device("cpu")
DECODE = KernelCell(KernelShape.parse("3x300/2x16g2"), 1)  # rows of two pages
VERIFY = KernelCell(KernelShape.parse("2x509/3x16"), 4)  # 513 keys: one in the last page of three
WINDOW = replace(DECODE, view=KvView.window(2, 9))


def quiet(line):
    """Says nothing."""


@pytest.fixture
def context(tmp_path):
    return Context(CPU, TINY, Ledger(tmp_path / "gpu.jsonl", "r", {}), 60.0, quiet)


def attend(q, k, v, scale):
    """q [T, Hq, D] over k, v [Hkv, N, D] in float64, without a mask."""
    group = q.shape[1] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    weights = (torch.einsum("thd,hnd->htn", q.double(), k) * scale).softmax(-1)
    return torch.einsum("htn,hnd->thd", weights, v).to(q.dtype)


def row_of(pages, table, used):
    """[P, Hkv, PAGE, D] and one row's pages -> [Hkv, used, D]"""
    return torch.cat([pages[page] for page in table.tolist()], 1)[:, :used]


# Pages.


@pytest.mark.parametrize("cell", [DECODE, VERIFY], ids=str)
def test_pages_are_a_view_of_the_cache_and_the_table_finds_every_row(cell):
    board = Stage(cell, 2, torch.float32, CPU)
    k, _ = board.cache.layer(1)
    pages = paged_calls.pages_of(k)
    assert pages.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    keys = cell.shape.cell.length + cell.queries
    table = paged_calls.page_table(board.cache.batch, board.cache.kv_heads, board.cache.slots, keys, CPU)
    assert int(table.max()) < pages.shape[0]
    for row in range(board.cache.batch):
        assert torch.equal(row_of(pages, table[row], keys), k[row, :, :keys])
    pages[-1, -1, -1, -1] = 7.0  # the last element of the view is inside the cache
    assert (k == 7.0).sum() == 1


def test_a_cache_whose_rows_are_no_whole_pages_is_refused():
    with pytest.raises(ValueError, match="300 slots"):
        paged_calls.pages_of(torch.zeros(1, 2, 300, 16))
    with pytest.raises(ValueError, match="no run of whole pages"):
        paged_calls.pages_of(torch.zeros(1, 512, 2, 16).transpose(1, 2))


# torch's variable-length attention.


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False,
                seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    """As of torch 2.12.1, whose pages are [P, PAGE, Hkv, D]."""
    assert key.shape[1] == paged_calls.PAGE
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert {x.dtype for x in (cu_seq_q, cu_seq_k, seqused_k, block_table)} == {torch.int32}
    assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
    rows = []
    for row, used in enumerate(seqused_k.tolist()):
        k, v = (row_of(x.transpose(1, 2), block_table[row], used) for x in (key, value))
        rows.append(attend(query[cu_seq_q[row] : cu_seq_q[row + 1]], k, v, scale))
    return torch.cat(rows)


def without_pages(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """As of torch 2.11."""
    raise AssertionError("it was called")


@pytest.fixture
def varlen(monkeypatch):
    import torch.nn.attention.varlen as module

    def put(function):
        monkeypatch.setattr(module, "varlen_attn", function)

    return put


@pytest.mark.parametrize("cell", [DECODE, VERIFY], ids=str)
def test_varlen_attention_reads_our_cache_by_pages_and_is_right(cell, varlen):
    varlen(varlen_attn)
    board = Stage(cell, 2, torch.float32, CPU)
    (call,) = others(board, ("varlen_attn",))
    assert isinstance(call, Call), call
    assert error_of(call, board, is_ours=False) < 4e-6
    assert not torch.equal(call.launch(0), call.launch(1))  # layers take turns
    assert torch.equal(call.launch(0), call.launch(2))


def test_a_varlen_attention_without_pages_is_told_by_its_signature_and_never_called(varlen):
    varlen(without_pages)
    ((name, reason),) = others(Stage(DECODE, 1, torch.float32, CPU), ("varlen_attn",))
    assert name == "varlen_attn"
    assert f"of torch {torch.__version__} takes no seqused_k and no block_table (both come with torch 2.12.1)" in reason


# FlashInfer.


class Wrapper:
    """What both wrappers have: pages in HND, a plan, then runs. Signatures as documented for flashinfer 0.6."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, **more):
        assert (float_workspace_buffer.dtype, int(float_workspace_buffer.max())) == (torch.uint8, 0)
        assert float_workspace_buffer.numel() == 128 << 20
        assert (kv_layout, use_cuda_graph) == ("HND", False)
        self.more = more

    def keep(self, starts, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, options):
        assert {x.dtype for x in (starts, indptr, indices, last_page_len)} == {torch.int32}
        assert int(indptr[-1]) == indices.numel()
        assert (last_page_len >= 1).all()
        assert (last_page_len <= page_size).all()
        assert options["q_data_type"] == options["kv_data_type"]
        self.starts, self.indptr, self.indices, self.last = starts, indptr, indices, last_page_len
        self.sizes, self.page_size, self.scale = (heads, kv_heads, head_dim), page_size, options["sm_scale"]

    def run(self, q, paged_kv_cache):
        k, v = paged_kv_cache
        assert (q.shape[1], k.shape[1], k.shape[3]) == self.sizes
        rows = []
        for row, (first, end) in enumerate(zip(self.indptr[:-1].tolist(), self.indptr[1:].tolist(), strict=True)):
            used = (end - first - 1) * self.page_size + int(self.last[row])
            found = [row_of(x, self.indices[first:end], used) for x in (k, v)]
            rows.append(attend(q[self.starts[row] : self.starts[row + 1]], *found, self.scale))
        return torch.cat(rows)


class Decode(Wrapper):
    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **options):
        assert self.more == {"use_tensor_cores": num_qo_heads != num_kv_heads}
        starts = torch.arange(indptr.numel(), dtype=torch.int32)
        self.keep(starts, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, options)


class Prefill(Wrapper):
    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
             head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False, **options):
        assert (self.more, causal, custom_mask) == ({}, False, None)
        pages = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.keep(qo_indptr, *pages, num_qo_heads, num_kv_heads, head_dim_qk, page_size, options)


@pytest.fixture
def flashinfer(monkeypatch):
    """Puts a module of that name in place; None: it is not installed."""

    def put(**attributes):
        module = ModuleType("flashinfer")
        module.__spec__ = ModuleSpec("flashinfer", None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, "flashinfer", module)

    return put


def both(**more):
    return {"BatchDecodeWithPagedKVCacheWrapper": Decode, "BatchPrefillWithPagedKVCacheWrapper": Prefill, **more}


@pytest.mark.parametrize("cell", [DECODE, VERIFY], ids=str)
def test_flashinfer_is_planned_once_reads_our_cache_by_pages_and_is_right(cell, flashinfer):
    flashinfer(**both())
    board = Stage(cell, 2, torch.float32, CPU)
    (call,) = others(board, ("flashinfer",))
    assert isinstance(call, Call), call
    assert error_of(call, board, is_ours=False) < 4e-6
    assert not torch.equal(call.launch(0), call.launch(1))
    assert PLANNED in call.says


def test_a_flashinfer_that_cannot_is_told_in_words(flashinfer, monkeypatch):
    board = Stage(DECODE, 1, torch.float32, CPU)

    def reason():
        ((_, words),) = others(board, ("flashinfer",))
        return words

    monkeypatch.setattr(paged_calls, "find_spec", lambda name: None)
    assert "FlashInfer is not installed" in reason()
    monkeypatch.undo()
    flashinfer()
    assert reason() == "the flashinfer package here has no BatchDecodeWithPagedKVCacheWrapper"

    class NoCompiler(Decode):
        def plan(self, *_, **__):
            raise FileNotFoundError("ninja")

    flashinfer(BatchDecodeWithPagedKVCacheWrapper=NoCompiler)
    assert reason() == "FileNotFoundError: ninja"


def test_a_comparator_that_ignores_strides_is_red_and_gets_no_speed(context, flashinfer):
    class Dense(Decode):
        def run(self, q, paged_kv_cache):
            return super().run(q, tuple(x.flatten().roll(16).view(x.shape) for x in paged_kv_cache))

    flashinfer(**both(BatchDecodeWithPagedKVCacheWrapper=Dense))
    (row,) = kernels_stage.measure_others(context, DECODE, ("flashinfer",))
    assert (row.kind, row.verdict) == ("attention", RED)
    assert "median_s" not in row.values


def test_windows_are_no_pages(flashinfer):
    flashinfer(**both())
    board = Stage(WINDOW, 1, torch.float32, CPU)
    assert {reason for _, reason in others(board, ("flashinfer", "varlen_attn"))} == {paged_calls.NO_WINDOW}


def test_what_compiles_is_not_begun_without_time_and_says_so_once(tmp_path):
    class OnGpu(Context):
        is_gpu = True

    moments = iter([0.0] + [55.0] * 20)
    late = OnGpu(CPU, TINY, Ledger(tmp_path / "gpu.jsonl", "r", {}), 60.0, quiet, now=lambda: next(moments))
    (row,) = kernels_stage._compiled(late, "flashinfer")
    assert (row.kind, row.what) == ("left out", f"{TINY.kernels[0]} flashinfer")
    assert "taken to need 60 s (assumed), 5 s are left" in row.reason
    with pytest.raises(OutOfTime):
        list(kernels_stage._compiled(OnGpu(CPU, TINY, late.ledger, 0.0, quiet), "flex"))


def test_what_a_contestant_cannot_do_for_one_reason_is_said_once_and_everything_else_is_kept():
    absent = [Row("refused", f"{cell} flashinfer", reason="absent") for cell in TINY.kernels]
    other = Row("refused", f"{TINY.kernels[0]} flashinfer", reason="another")
    failed = [Row("failed", f"{cell} flashinfer", reason="absent") for cell in TINY.kernels]
    assert list(kernels_stage._once([*absent, other, *failed])) == [absent[0], other, *failed]


# Layouts.


def test_a_cache_laid_out_by_tokens_holds_the_same_and_has_a_tokens_heads_side_by_side():
    (cell,) = TINY.layouts
    board = Stage(cell, 2, torch.float32, CPU)
    twin = layouts.in_nhd(board)
    assert torch.equal(twin.cache.kv, board.cache.kv)
    heads, slots, dim = board.cache.kv.shape[-3:]
    assert board.cache.kv.stride()[-3:] == (slots * dim, dim, 1)
    assert twin.cache.kv.stride()[-3:] == (dim, heads * dim, 1)
    assert twin.situation.cache is twin.cache
    assert board.situation.cache is board.cache


def test_layouts_are_timed_in_turns_after_their_bits_were_found_to_be_the_same(context, monkeypatch):
    (cell,) = TINY.layouts
    order, seconds = [], {"HND": 1.0, "NHD": 1.05}
    names = {}

    def timed(launch, turns):
        launch(0)
        if launch not in names:
            names[launch] = layouts.LAYOUTS[len(names)]
        name = names[launch]
        order.append(name)
        return SimpleNamespace(seconds=seconds[name], disagreement=0.004)

    monkeypatch.setattr(context, "timed", timed)
    (row,) = layouts.layout_rows(context, cell)
    assert order == ["HND", "NHD", "NHD", "HND", "HND", "NHD"]
    assert row.values["nhd_over_hnd"] == pytest.approx(1.05)
    assert (row.values["low"], row.values["high"]) == (pytest.approx(1.05), pytest.approx(1.05))
    assert row.flags == ("NHD takes 5.0% longer than HND, the decision",)
    assert row.reason == "HND is the decision, NHD a check"
    seconds["NHD"] = 1.019
    names.clear()
    (row,) = layouts.layout_rows(context, cell)
    assert row.flags == ()


def test_a_layout_with_other_bits_is_red_and_gets_no_speed(context, monkeypatch):
    (cell,) = TINY.layouts
    usual = layouts.in_nhd

    def other(board):
        twin = usual(board)
        twin.cache.kv = twin.cache.kv * 1.0001
        return twin

    monkeypatch.setattr(layouts, "in_nhd", other)
    (row,) = layouts.layout_rows(context, cell)
    assert (row.verdict, row.values["same_bits"]) == (RED, False)
    assert "nhd_over_hnd" not in row.values


def test_layouts_that_do_not_fit_twice_or_have_no_kernel_of_ours_are_rows_with_words(context, tmp_path, monkeypatch):
    class Small(Context):
        free_bytes = 1e9

    (row,) = layouts.layout_rows(Small(CPU, FULL, context.ledger, 60.0), FULL.layouts[0])
    assert (row.kind, row.reason) == ("left out", "one layer of it does not fit twice")
    monkeypatch.setattr(layouts, "best", lambda board: "sdpa")
    (row,) = layouts.layout_rows(context, TINY.layouts[0])
    assert (row.kind, row.reason) == ("refused", "attention would be by sdpa here, which has no layouts to compare")


def test_the_layouts_of_the_run_are_those_of_the_four_main_cells():
    assert [str(cell) for cell in FULL.layouts] == [str(cell) for cell in FULL.kernels[:4]]
    assert all(cell.view is None for cell in FULL.layouts)
    assert best(Stage(TINY.layouts[0], 1, torch.float32, CPU)) in layouts.BY_STRIDES
