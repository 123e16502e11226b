"""The compiled attention kernel against its float64 reference, and how it is built."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import build
from specdec_kernels.tree_attention import cpu, reference

TARGETS = [t for t in build.TARGETS if cpu.why_not(64, torch.float32, t) is None]
NAN = float("nan")


def random_tree(nodes, generator, chain=False):
    """Corner and depths of a random tree of `nodes` nodes, root included."""
    corner, depth = torch.eye(nodes, dtype=torch.bool), [0] * nodes
    for node in range(1, nodes):
        parent = node - 1 if chain else int(torch.randint(0, node, (1,), generator=generator))
        corner[node] |= corner[parent]
        depth[node] = depth[parent] + 1
    return corner, torch.tensor(depth)


def case(seed, *, batch=2, queries=5, heads=4, kv_heads=2, dim=64, slots=300, dtype=torch.float32, chain=False, committed=None):
    """Arguments of tree_attention with ragged lengths; slots beyond each row's corner hold NaN."""
    g = torch.Generator().manual_seed(seed)
    if committed is None:
        committed = torch.randint(0, slots - queries + 1, (batch,), generator=g)
        committed[0] = slots - queries  # the last slot is used
    committed = torch.as_tensor(committed)
    corner, depth = random_tree(queries, g, chain)
    q = torch.randn(batch, queries, heads, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, slots, dim, generator=g).to(dtype) for _ in "kv")
    for row, length in enumerate(committed.tolist()):
        k[row, :, length + queries :] = NAN
        v[row, :, length + queries :] = NAN
    return q, k, v, committed, corner, depth, torch.arange(queries)


def assert_equals_reference(arguments, target="native", tolerance=4e-6, **view):
    scale = arguments[0].shape[-1] ** -0.5
    o, lse = cpu.tree_attention(*arguments, scale=scale, target=target, **view)
    expected, expected_lse = reference.tree_attention(*arguments, scale=scale, **view)
    error = ((o - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-3)).max()
    assert error < tolerance, float(error)
    assert (lse - expected_lse).abs().max() < 2e-5


def test_this_machine_builds_the_kernel_or_says_why():
    reason = cpu.why_not(64, torch.float32)
    assert reason is None or "compile" in reason
    if sys.platform == "linux":
        assert TARGETS, reason


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 3), queries=st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 33, 64]),
    group=st.sampled_from([1, 2, 3]), kv_heads=st.integers(1, 3), dim=st.sampled_from([16, 48, 64, 80, 128, 256]),
    slots=st.sampled_from([64, 65, 127, 128, 129, 300]), bf16=st.booleans(),
    view=st.sampled_from([(0, 0), (4, 12), (0, 1), (3, 1), (9, 64), (2, 1000)]),
)  # fmt: skip
def test_the_kernel_equals_float64_on_ugly_shapes(target, seed, batch, queries, group, kv_heads, dim, slots, view, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float32
    sizes = {"batch": batch, "queries": queries, "heads": group * kv_heads, "kv_heads": kv_heads, "dim": dim, "slots": slots}
    arguments = case(seed, dtype=dtype, **sizes)
    assert_equals_reference(arguments, target, sink=view[0], recent=view[1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 2042, 2043, 2044, 2048, 4096 + 7])
def test_lengths_around_blocks_and_chunks(target, length):
    for chain in (True, False):
        arguments = case(length, batch=1, queries=5, slots=length + 5, chain=chain, committed=[length])
        assert_equals_reference(arguments, target)
        assert_equals_reference(arguments, target, sink=4, recent=60)


@pytest.mark.parametrize("target", TARGETS)
def test_an_index_list_takes_the_place_of_the_sinks(target):
    q, k, v, _, corner, depth, nodes = case(3, batch=2, queries=3, slots=200, dtype=torch.float32, committed=[150, 190])
    index = torch.stack([torch.randperm(120, generator=torch.Generator().manual_seed(i))[:31].sort().values for i in range(4)])
    arguments = (q, k, v, torch.tensor([150, 190]), corner, depth, nodes)
    assert_equals_reference(arguments, target, recent=16, index=index.view(2, 2, 31))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("entries", [1, 63, 64, 65, 2040, 2100])
def test_a_list_is_read_up_to_the_window_in_lengths_around_blocks_and_chunks(target, entries):
    committed = [0, 5, entries + 14, 2200]
    q, k, v, _, corner, depth, nodes = case(entries, batch=4, queries=3, slots=2300, committed=committed)
    index = torch.arange(entries).repeat(4, 2, 1)
    g = torch.Generator().manual_seed(1)
    index[3] = torch.stack([torch.randperm(2185, generator=g)[:entries].sort().values for _ in "kv"])
    assert_equals_reference((q, k, v, torch.tensor(committed), corner, depth, nodes), target, recent=16, index=index)


def test_a_chain_is_causal_attention():
    q, k, v, _, corner, depth, nodes = case(5, batch=1, queries=9, heads=2, slots=73, chain=True, committed=[64])
    o, _ = cpu.tree_attention(q, k, v, torch.tensor([64]), corner, depth, nodes, scale=0.125)
    mask = torch.ones(9, 73, dtype=torch.bool).tril(64)
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=0.125)
    assert torch.allclose(o, expected.transpose(1, 2), atol=2e-6)


def test_results_do_not_depend_on_threads_or_the_rest_of_the_batch():
    arguments = case(8, batch=3, queries=4, slots=5000)
    one, _ = cpu.tree_attention(*arguments, scale=0.1, threads=1)
    two, _ = cpu.tree_attention(*arguments, scale=0.1, threads=2)
    assert torch.equal(one, two)
    q, k, v, committed, *rest = arguments
    alone, _ = cpu.tree_attention(q[1:2], k[1:2], v[1:2], committed[1:2], *rest, scale=0.1)
    assert torch.equal(alone, one[1:2])


def test_strided_queries_and_large_scores_are_read_right():
    q, *rest = case(9, batch=2, queries=3)
    wide = torch.zeros(2, 3, 9, 64)
    wide[:, :, 2:6] = q * 40  # scores in the hundreds: the online maximum must carry
    assert_equals_reference((wide[:, :, 2:6], *rest), tolerance=2e-5)


def test_offsets_beyond_two_to_the_31_elements():
    slots = (1 << 24) + 64
    try:
        cache = torch.empty(2, 1, slots, 128, dtype=torch.bfloat16)  # 8.6 GB, of which only touched pages exist
    except RuntimeError:
        pytest.skip("this machine does not give 8.6 GB of address space")
    assert cache.stride(0) > 1 << 31
    small = case(4, batch=2, queries=2, heads=1, kv_heads=1, dim=128, slots=40, dtype=torch.bfloat16, committed=[9, 30])
    q, k, _, committed, corner, depth, nodes = small
    cache[:, :, :40] = k
    expected, _ = reference.tree_attention(q, k, k, committed, corner, depth, nodes, scale=0.1)
    o, _ = cpu.tree_attention(q, cache, cache, committed, corner, depth, nodes, scale=0.1)
    assert torch.allclose(o.double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"committed": torch.tensor([10, 298])}, r"row 1 has more committed tokens .* than its 300 slots"),
        ({"committed": torch.tensor([-1, 20])}, "row 0"),
        ({"query_node": torch.tensor([0, 1, 2, 3, 7])}, "corner nodes"),
        ({"index": torch.full((2, 2, 3), 299), "recent": 8}, "index entry"),
        ({"k": torch.zeros(2, 3, 300, 64), "v": torch.zeros(2, 3, 300, 64)}, "do not fit together"),
    ],
)  # fmt: skip
def test_lengths_beyond_capacity_are_refused_before_memory_is_touched(change, words):
    names = ("q", "k", "v", "committed", "corner", "node_depth", "query_node")
    arguments = dict(zip(names, case(1, committed=torch.tensor([10, 20])), strict=True))
    with pytest.raises(ValueError, match=words):
        cpu.tree_attention(**{**arguments, **change}, scale=0.1)


def test_unsupported_head_sizes_and_dtypes_say_why():
    assert "multiples of" in cpu.why_not(24 + 1, torch.float32)
    assert "up to 256, not 512" in cpu.why_not(512, torch.float32)
    assert "not float16" in cpu.why_not(64, torch.float16)
    arguments = case(1)
    with pytest.raises(ValueError, match="float32 queries"):
        cpu.tree_attention(arguments[0].double(), *arguments[1:], scale=0.1)


def test_without_a_compiler_the_reason_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler" in cpu.why_not(64, torch.float32, folder=tmp_path / "none")


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "brokencc"
    says = '[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "cpu.c:1: error: no luck today" >&2\nexit 1\n'
    broken.write_text("#!/bin/sh\n" + says)
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert "no luck today" in cpu.why_not(64, torch.float32, folder=tmp_path / "kernels")


def test_a_damaged_library_is_built_again(tmp_path):
    path = build.library_path("native", tmp_path)
    path.write_bytes(b"\x7fELF and then nothing")
    assert cpu.why_not(64, torch.float32, folder=tmp_path) is None
    assert path.stat().st_size > 10_000


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in cpu.why_not(64, torch.float32, folder=blocked / "kernels")


def test_two_processes_may_compile_at_once(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from specdec_kernels.tree_attention import cpu; "
        "print(cpu.why_not(64, torch.float32, folder=Path(sys.argv[1])))"
    )
    with ThreadPoolExecutor(2) as pool:
        command = [sys.executable, "-c", code, str(tmp_path)]
        runs = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=True), "ab"))
    assert [r.stdout.strip() for r in runs] == ["None", "None"]
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"], "no temporary file is left"
