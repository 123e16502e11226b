"""The flash_attn back end over a stand-in for flash_attn_with_kvcache: the same signature, float64 inside; and the choice."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from specdec_lab.engine import conformance, flash_backend
from specdec_lab.engine.attention import Need, draft_step_reads
from specdec_lab.engine.backends import AUTOMATIC, BACKENDS, BackendUnavailable, pick
from specdec_lab.engine.cache import KvCache
from specdec_lab.engine.flash_backend import FlashBackend, FlashPlan, join
from specdec_lab.records import KvView

CUDA = Need("cuda", torch.bfloat16, 128, 4)


class FlashAttn:
    """flash_attn_with_kvcache of flash-attn 2.7 and 2.8, whole prefixes only; counts its calls.

    What it gives for a row without keys is what it might: 0 with an infinite log-sum-exp.
    """

    def __init__(self):
        self.calls = 0

    def __call__(
        self, q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
        cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        self.calls += 1
        assert (k, v, causal, softcap, window_size, block_table) == (None, None, False, 0.0, (-1, -1), None)
        assert q.dtype == k_cache.dtype == v_cache.dtype
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert cache_seqlens.dtype == torch.int32
        assert k_cache.stride(3) == 1
        assert return_softmax_lse
        group = q.shape[2] // k_cache.shape[2]
        keys, values = (part.double().repeat_interleave(group, 2) for part in (k_cache, v_cache))  # [B, S, Hq, D]
        beyond = torch.arange(keys.shape[1]) >= cache_seqlens[:, None].long()
        scores = torch.einsum("bthd,bshd->bhts", q.double(), keys) * softmax_scale
        scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        out = torch.einsum("bhts,bshd->bthd", torch.exp(scores - lse.clamp(min=-1e300)[..., None]), values)
        empty = (cache_seqlens == 0)[:, None, None]
        return out.masked_fill(empty[..., None], 0.0).to(q.dtype), lse.masked_fill(empty, torch.inf).float()


@pytest.mark.parametrize(("dtype", "queries", "cases"), [(torch.float16, 9, 100), (torch.bfloat16, 64, 400)], ids=str)
def test_prefix_and_corner_joined_conform_in_every_case(dtype, queries, cases):
    flash, is_whole = FlashAttn(), dtype == torch.bfloat16
    need = Need("cpu", dtype, 64, 2, max_queries=queries, tree=True, window=is_whole, sliding=is_whole)
    report = conformance.check(FlashBackend(flash), need)
    report.raise_if_red()
    assert len(report.ran) > cases
    assert flash.calls > 3 * cases / 2, "rounds over everything go through flash_attn_with_kvcache"
    assert all("sliding" in reason for reason in report.refusals)


def test_a_window_is_read_by_sdpa_and_not_by_flash_attn():
    flash = FlashAttn()
    backend, cache = FlashBackend(flash), KvCache(1, 2, 1, 100, 16, torch.float16, torch.device("cpu"))
    cache.committed = torch.tensor([60, 70])
    for view, is_flash in ((KvView.full(), True), (KvView.window(4, 12), False)):
        plan = backend.plan(draft_step_reads(cache.committed, 1, view, 70, False), cache, 1)
        assert isinstance(plan, FlashPlan) == is_flash
        backend.attend(torch.zeros(2, 1, 1, 16, dtype=torch.float16), cache, 0, plan, 1.0)
        assert flash.calls == 1


def test_joining_two_sets_of_keys_is_attention_over_both():
    draw = torch.Generator().manual_seed(3)
    scores, values = torch.randn(4, 9, generator=draw).double() * 5, torch.randn(9, 3, generator=draw).double()
    for cut in (0, 1, 5, 9):
        left, left_lse = scores[:, :cut].softmax(-1) @ values[:cut], scores[:, :cut].logsumexp(-1)
        right, right_lse = scores[:, cut:].softmax(-1) @ values[cut:], scores[:, cut:].logsumexp(-1)
        assert torch.allclose(join(left, left_lse, right, right_lse), scores.softmax(-1) @ values)
    nothing = torch.zeros(4, 3), torch.full((4,), -torch.inf)
    assert not join(*nothing, *nothing).any()


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (Need("cuda", torch.float32, 128, 4), "float16 or bfloat16 KV, not float32"),
        (Need("cuda", torch.bfloat16, 512, 4), "up to 256, not 512"),
        (Need("cuda", torch.bfloat16, 128, 4, index_list=True), "reads no index lists"),
        (Need("cuda", torch.bfloat16, 128, 4, tree=True, max_queries=65), "trees of up to 64 nodes, root counted, not 65"),
        (Need("cuda", torch.bfloat16, 128, 4, softcap=True), "without soft-capping"),
    ],
    ids=["dtype", "head size", "lists", "tree", "softcap"],
)
def test_flash_attn_says_why_it_cannot(need, reason):
    assert reason in FlashBackend(FlashAttn()).why_not(need)


def test_flash_attn_is_told_by_its_attribute_and_not_by_its_name(monkeypatch):
    backend = FlashBackend()
    with pytest.raises(BackendUnavailable, match="flash_attn needs a CUDA device. Use backend='auto'"):
        pick("flash_attn", Need("cpu", torch.bfloat16, 128, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flash_backend, "find_spec", lambda name: None)
    assert "flash-attn is not installed" in backend.why_not(CUDA)
    monkeypatch.setattr(flash_backend, "find_spec", lambda name: object())
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert "has no flash_attn_with_kvcache" in backend.why_not(CUDA)
    package.flash_attn_with_kvcache = FlashAttn()
    assert backend.why_not(CUDA) is None


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (Need("cpu", torch.float32, 64, 1), "need a CUDA device"),
        (CUDA, "torch sees no CUDA device"),
        (Need("mps", torch.float32, 64, 1), "do not run on mps"),
        (Need("cuda", torch.bfloat16, 128, 4, tree=True, max_queries=65), "trees of up to 64 nodes, root counted, not 65"),
        (Need("cuda", torch.bfloat16, 128, 4, sink_logits=True), "no sink logits"),
        (Need("cuda", torch.bfloat16, 128, 4, index_list=True, sliding=True), "sliding-window layers"),
    ],
    ids=["cpu", "no GPU", "mps", "tree", "sink logits", "lists and sliding"],
)
def test_triton_says_why_it_cannot(need, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match=reason):
        pick("triton", need)


def test_triton_refuses_dtypes_and_head_sizes_that_its_kernels_do_not_take(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    why_not = BACKENDS["triton"].why_not
    assert why_not(CUDA) is None
    assert "not float64" in why_not(Need("cuda", torch.float64, 128, 4))
    assert "up to 256, not 257" in why_not(Need("cuda", torch.bfloat16, 257, 4))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0" in why_not(CUDA)


def test_on_cuda_triton_is_preferred_and_then_sdpa_with_the_reason():
    assert AUTOMATIC["cuda"] == ("triton", "sdpa")
    chosen, refused = pick("auto", CUDA)  # there is no GPU here
    if not torch.cuda.is_available():
        assert chosen.name == "sdpa"
        assert list(refused) == ["triton"]
    assert not {"reference", "flash_attn"} & {name for names in AUTOMATIC.values() for name in names}
