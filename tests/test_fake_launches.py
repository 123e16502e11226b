"""What launches would compile: with strides beyond 32 bits, for other batches, and as they are, without spills."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import specdec_lab as sd
import tiny
from fake_cuda import GpuTensor
from specdec_kernels import contract
from specdec_kernels.kv_compact.gpu import kv_compact
from specdec_kernels.rope_append.gpu import rope_append
from specdec_kernels.tree_attention.gpu import tree_attention
from specdec_lab.bench.gpu.timing import cuda_watches
from test_fake_rounds import REJECTION, SIZES, machine, workload

LAYERS, BATCH, HEADS, SLOTS, DIM = 4, 160, 8, 131072, 128  # a layer of 43 GB, keys beyond 2^31 elements behind values


def nowhere(*shape, dtype=torch.bfloat16):
    """A tensor of any size on the GPU, without numbers."""
    return GpuTensor(torch.empty(shape, dtype=dtype, device="meta"))


def variants(fake):
    return {launch.variant.name: launch.variant for launch in fake.launched}


def test_strides_beyond_32_bits_are_passed_with_64():
    with machine() as fake:
        kv, number = nowhere(LAYERS, 2, BATCH, HEADS, SLOTS, DIM), torch.int32
        at, order = nowhere(BATCH, 5, dtype=number), torch.arange(5, dtype=number, device="cuda")
        rows, table = nowhere(BATCH, dtype=number), nowhere(SLOTS, DIM // 2, dtype=torch.float32)
        q = rope_append(nowhere(BATCH, 5, (32 + 2 * HEADS) * DIM), at, at, table, table, kv[0])
        tree_attention(q, kv[0, 0], kv[0, 1], rows, order[:, None] >= order, order, order, scale=0.1)
        kv_compact(kv, at, rows, rows)
        made = variants(fake)
    wide = {name: {arg for arg, kind in v.signature.items() if kind == "i64"} for name, v in made.items()}
    assert wide == {"rope_kernel": {"kv_two"}, "split_kernel": set(), "combine_kernel": set(),
                    "compact_kernel": {"kv_layer", "kv_two"}}  # fmt: skip
    assert made["compact_kernel"].signature["kv_batch"] == "i32"


@pytest.mark.slow
def test_offsets_are_computed_with_64_bits_where_strides_have_them():
    with machine() as fake:
        at, rows = nowhere(BATCH, 5, dtype=torch.int32), nowhere(BATCH, dtype=torch.int32)
        kv_compact(nowhere(LAYERS, 2, BATCH, HEADS, SLOTS, DIM), at, rows, rows)
        (launch,) = fake.launched
    made = launch.variant.compile()
    assert made.asm["ptx"].count("mul.lo.s64") + made.asm["ptx"].count("mad.lo.s64") > 1
    assert contract._read("kv_compact", 90, made.asm["cubin"], made.metadata.shared).faults == ()


def test_another_batch_compiles_the_plan_of_its_size_and_nothing_else():
    """Numbers of rows are no constants of kernels: a change of batch costs next to nothing."""
    with machine() as fake:
        pair = sd.load(tiny.model("qwen3", **SIZES), device="cuda")
        for lengths in ((9, 30, 17), (5,), (5, 6), (9, 9, 9, 9, 9)):
            before = len(fake.launched)
            sd.record(sd.Engine(pair, rounds="eager").steps(workload(2, lengths, **REJECTION), "self:4+8/chain2"))
            new = {launch.variant.name for launch in fake.launched[before:] if launch.is_new}
            assert before == 0 or new <= {"plan_kernel"}


def test_a_launch_that_cannot_be_captured_leaves_the_stream_as_it_was():
    with machine():
        x, before = torch.ones(2, device="cuda"), torch.cuda.current_stream()
        graph, _ = cuda_watches()
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            graph(lambda turn: x.sum().item(), 1, 2)
        assert torch.cuda.current_stream() is before
        assert len(graph(lambda turn: x.sum(), 1, 2)) == 2
