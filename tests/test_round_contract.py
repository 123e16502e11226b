"""What the round's kernels compile to for GPUs that are not here.

A few of them; `python -m specdec_kernels.round_contract` compiles all.
"""

from __future__ import annotations

import pytest

from specdec_kernels.round_contract import compile_variant, shipped, variants

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

STREAMING = (
    "rope_append with norms", "kv_compact", "row_lse", "accept_tree", "glance at logits", "draw_gumbel",
    "sums of draw_residual of a tree", "draw_residual of a tree",
)  # fmt: skip


@pytest.mark.parametrize("name", STREAMING)
def test_a_kernel_that_streams_spills_nothing_and_reads_16_bytes_at_a_time(name):
    (variant,) = (v for v in variants() if v.name == name)
    compiled = compile_variant(variant, 90, "bf16")
    assert compiled.faults == (), str(compiled)
    assert compiled.wide_loads > 0, str(compiled)
    assert compiled.tensor_cores == ()


def test_compaction_passes_nothing_between_threads():
    """The proof that it needs no barrier has each element loaded and stored by one thread: no shared memory."""
    (variant,) = (v for v in variants() if v.name == "kv_compact")
    for dtype in ("bf16", "fp32"):
        compiled = compile_variant(variant, 90, dtype)
        assert compiled.shared_bytes == 0, str(compiled)
        assert compiled.wide_loads == 4 * (1 if dtype == "bf16" else 2), "four entries are in flight"


def test_every_kernel_of_a_round_is_in_the_list_for_every_gpu():
    """Each `*_kernel` of the folders; a new one that nobody compiles would go unseen."""
    from importlib import import_module

    folders = {v.kernel.split(":")[0] for v in variants()}
    made = {f"{f}:{name}" for f in folders for name in dir(import_module(f"specdec_kernels.{f}.gpu_kernels"))
            if name.endswith("_kernel")}  # fmt: skip
    assert made == {v.kernel for v in variants()}
    assert len(list(shipped())) == len(variants()) * 3 * 2
