"""The Triton attention kernels, interpreted, against the float64 reference and against themselves.

Only float32 and float16: the interpreter multiplies bfloat16 wrongly. What they compile to is in test_triton_contract.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from specdec_kernels.tree_attention import gpu, reference
from specdec_kernels.work_list import gpu as work_list_gpu
from specdec_kernels.work_list import reference as work_list_reference
from specdec_lab.engine import conformance
from specdec_lab.engine.attention import Need
from specdec_lab.engine.conformance.cases import chain, draft_step, leaves, star, tree
from specdec_lab.engine.triton_backend import TritonBackend

pytest.importorskip("triton")
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")]

ALLOWED = {torch.float32: 2e-6, torch.float16: 6e-4}
CHEAP = 1200  # keys times queries times heads of a row of the conformance suite that the interpreter is to bear
BLOCK, CHUNK = 64, 128  # keys of a step and of a part here: small, so that short contexts have several
DRAW = torch.Generator().manual_seed(7)


class Call:
    """Arguments of one call: rows of `lengths` committed tokens, NaN in every slot beyond a row's corner."""

    def __init__(self, lengths, corner, *, kv_heads=2, group=2, dim=64, dtype=torch.float32, slots=None):
        self.seen, self.depth, self.node = corner.tensors(torch.device("cpu"))
        self.committed = torch.tensor(lengths)
        slots = slots or max(lengths) + len(self.depth) + 3
        self.q = torch.randn(len(lengths), len(self.node), kv_heads * group, dim, generator=DRAW).to(dtype)
        self.k, self.v = torch.randn(2, len(lengths), kv_heads, slots, dim, generator=DRAW).to(dtype)
        for row, length in enumerate(lengths):
            self.k[row, :, length + len(self.depth) :] = self.v[row, :, length + len(self.depth) :] = torch.nan
        self.scale = 1.25 * dim**-0.5

    @property
    def arguments(self):
        return self.q, self.k, self.v, self.committed, self.seen, self.depth, self.node

    def kernel(self, **more):
        return gpu.tree_attention(*self.arguments, scale=self.scale, **({"chunk": CHUNK} | more))

    def meaning(self, **more):
        return reference.tree_attention(*self.arguments, scale=self.scale, **more)

    def row(self, row):
        alone = object.__new__(Call)
        alone.__dict__.update(self.__dict__)
        pick = slice(row, row + 1)
        alone.q, alone.k, alone.v, alone.committed = self.q[pick], self.k[pick], self.v[pick], self.committed[pick]
        return alone


def assert_means_the_same(got, right, allowed):
    (out, lse), (true_out, true_lse) = got, right
    errors = (out.double() - true_out).norm(dim=-1) / true_out.norm(dim=-1).clamp(min=1e-6)
    assert out.isfinite().all()
    assert errors.max() <= allowed
    assert (lse - true_lse).abs().max() <= 1e-5 + allowed * true_lse.abs().max() / 2


# --- meaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize(
    ("corner", "group", "dim"),
    [(chain(1), 4, 128), (chain(5), 1, 64), (star(5), 4, 64), (tree(8), 2, 128), (draft_step(3), 1, 16), (leaves(9), 2, 80),
     (tree(33), 1, 32), (chain(64), 1, 64)],
    ids=lambda value: getattr(value, "name", str(value)),
)  # fmt: skip
def test_any_tree_over_ragged_rows_means_what_the_reference_says(corner, group, dim, dtype):
    call = Call((150, 3), corner, group=group, dim=dim, dtype=dtype, kv_heads=1)
    assert_means_the_same(call.kernel(), call.meaning(), ALLOWED[dtype])


@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 5, 2 * CHUNK])
def test_lengths_at_the_borders_of_blocks_and_parts(length):
    call = Call((length,), tree(5), kv_heads=1)
    assert_means_the_same(call.kernel(), call.meaning(), ALLOWED[torch.float32])


@pytest.mark.parametrize("corner", [chain(1), draft_step(3), tree(7), leaves(9), chain(5)], ids=lambda corner: corner.name)
@pytest.mark.parametrize(("sink", "recent"), [(4, 12), (0, 1), (3, 1), (9, 500), (70, 65)])
def test_a_window_with_sinks_counts_every_key_once(corner, sink, recent):
    call = Call((200, 5, 0), corner, kv_heads=1)
    got = call.kernel(sink=sink, recent=recent, chunk=BLOCK)
    assert_means_the_same(got, call.meaning(sink=sink, recent=recent), ALLOWED[torch.float32])


@pytest.mark.parametrize("corner", [draft_step(0), draft_step(2), leaves(9)], ids=lambda corner: corner.name)
def test_index_lists_are_read_as_far_as_there_are_keys_before_the_window(corner):
    call, budget, recent = Call((200, 30, 5), corner), 20, 14
    lists = torch.arange(budget).repeat(3, 2, 1)  # a row with fewer keys lists all of them
    lists[0, 0] = torch.arange(budget) * 9
    lists[0, 1] = torch.arange(budget) * 3 + 100
    got = call.kernel(recent=recent, index=lists.int(), chunk=BLOCK)
    assert_means_the_same(got, call.meaning(recent=recent, index=lists.int()), ALLOWED[torch.float32])
    assert not torch.equal(got[0], call.kernel(recent=recent, sink=budget, chunk=BLOCK)[0]), "the lists made no difference"


def test_a_window_on_the_device_is_read_at_the_launch_and_zero_means_everything():
    call, window = Call((200, 5), draft_step(2), kv_heads=1), gpu.window_scalars(4, 12, torch.device("cpu"))
    for sink, recent in ((4, 12), (0, 30), (0, 0)):
        window[:2] = torch.tensor([sink, recent])
        assert_means_the_same(
            call.kernel(window=window, longest=256), call.meaning(sink=sink, recent=recent), ALLOWED[torch.float32]
        )


def test_float32_queries_over_shorter_kv_and_queries_out_of_a_wider_projection():
    call = Call((150, 3), chain(5), dtype=torch.float16)
    call.q = torch.randn(2, 5, 8, 64, generator=DRAW)[:, :, 2:6]
    assert not call.q.is_contiguous()
    out, lse = call.kernel()
    assert out.dtype == torch.float32
    call.q = call.q.half().float()
    assert_means_the_same((out, lse), call.meaning(), 2 * ALLOWED[torch.float16])


def test_a_query_that_sees_nothing_gets_zero():
    call = Call((0,), tree(3), kv_heads=1)
    call.seen = torch.zeros(3, 3, dtype=torch.bool)
    for chunk in (BLOCK, CHUNK):
        out, lse = call.kernel(chunk=chunk, longest=CHUNK)
        assert not out.any()
        assert (lse == -torch.inf).all()


def test_offsets_beyond_two_to_the_31_elements():
    small = Call((70,), chain(2), kv_heads=2, dtype=torch.float16, slots=80)
    try:
        memory = torch.empty(2**31 + 2**20, dtype=torch.float16)  # pages that nobody touches cost nothing
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    strides = (2**31, 2**31, 64, 1)  # the second KV head begins where 31 bits end
    for name in ("k", "v"):
        far = memory[2**18 * (name == "v") :].as_strided((1, 2, 80, 64), strides)
        far.copy_(getattr(small, name))
        setattr(small, name, far)
    got = small.kernel()
    small.k, small.v = small.k.contiguous(), small.v.contiguous()
    assert_means_the_same(got, small.meaning(), ALLOWED[torch.float16])


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [{}, {"sink": 4, "recent": 100}], ids=["full", "window"])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(view):
    call = Call((300, 5, 130), tree(6), kv_heads=1)
    out, lse = call.kernel(**view)
    for row in range(3):
        alone = call.row(row).kernel(**view, longest=int(call.committed[row]) + 6)
        assert torch.equal(alone[0][0], out[row])
        assert torch.equal(alone[1][0], lse[row])


@pytest.mark.parametrize("view", [{}, {"sink": 4, "recent": 100}], ids=["full", "window"])
@pytest.mark.parametrize(
    ("nodes", "group", "longest"), [(6, 2, 320), (6, 2, 4 * CHUNK), (9, 8, 320)], ids=["tight", "room to spare", "row blocks"]
)
def test_a_work_list_gives_the_same_bits_as_the_grid(view, nodes, group, longest):
    call = Call((290, 5), tree(nodes), group=group)
    work = work_list_gpu.work_list(
        call.committed, call.depth, call.node, kv_heads=2, chunk=CHUNK, longest=longest, **view
    )
    assert work.programs < work.items.shape[0]
    got, right = call.kernel(work=work, longest=longest, **view), call.kernel(**view)
    assert torch.equal(got[0], right[0])
    assert torch.equal(got[1], right[1])


@pytest.mark.parametrize("view", [{}, {"sink": 4, "recent": 12}, {"recent": 100}, {"recent": 12, "list_len": 40}], ids=str)
@pytest.mark.parametrize("lengths", [(130, 5, 0), (64,), (57, 58, 700, 3, 3)], ids=str)
def test_the_work_list_is_that_of_the_reference_and_resets_stamps(lengths, view):
    _, depth, nodes = tree(7).tensors(torch.device("cpu"))
    sizes = {"kv_heads": 3, "chunk": BLOCK, **view}
    stamps = torch.full((2, 2), 5)
    made = work_list_gpu.work_list(torch.tensor(lengths), depth, nodes[3:], longest=1024, stamps=stamps, **sizes)
    items, count = work_list_reference.work_list(torch.tensor(lengths), depth, nodes[3:], **sizes)
    assert made.count.tolist() == count.tolist()
    assert torch.equal(made.items[: len(items)], items)
    assert stamps.tolist() == [[2**63 - 1, 0]] * 2


@pytest.mark.parametrize("view", [{}, {"sink": 4, "recent": 100}], ids=["full", "window"])
def test_an_aliased_read_is_attention_over_the_aliased_slots(view):
    call, mask = Call((200, 40), tree(5), kv_heads=1), 31
    got = call.kernel(alias_mask=mask, **view)
    aliased = torch.arange(call.k.shape[2]) & mask
    call.k, call.v = call.k[:, :, aliased], call.v[:, :, aliased]
    assert_means_the_same(got, call.meaning(**view), ALLOWED[torch.float32])


@pytest.mark.parametrize("longest", [64, 320])
def test_what_is_preallocated_is_used_whatever_it_held_and_nothing_beside_it_is_written(longest):
    call = Call((50, 5), tree(6), kv_heads=1)
    out = torch.full((2, 8, 2, 64), torch.nan)
    lse = torch.full((2, 6, 2), torch.nan)
    workspace = torch.full((gpu.workspace_floats(2, 2, 6, 64, longest, CHUNK) + 5,), torch.nan)
    packed = gpu.pack_corner(call.seen)
    given = {"out": out[:, 1:7], "lse": lse, "workspace": workspace, "longest": longest}
    got = gpu.tree_attention(*call.arguments[:4], packed, call.depth, call.node, scale=call.scale, chunk=CHUNK, **given)
    assert got[0].data_ptr() == out[:, 1:7].data_ptr()
    assert got[1] is lse
    assert_means_the_same(got, call.meaning(), ALLOWED[torch.float32])
    assert out[:, [0, 7]].isnan().all()
    assert workspace[-5:].isnan().all()


@pytest.mark.parametrize("longest", [64, 190])
def test_keys_beyond_what_longest_allows_show_as_nan_and_never_as_an_answer(longest):
    call = Call((300, 5), chain(3), kv_heads=1)
    out, _ = call.kernel(longest=longest)
    assert out[0].isnan().all()
    assert torch.equal(out[1], call.kernel()[0][1])


def test_packed_corners_hold_every_bit_the_sign_included():
    for nodes in (1, 31, 32, 33, 64):
        seen = torch.rand(5, nodes, generator=DRAW) < 0.5
        seen[0] = True
        words = gpu.pack_corner(seen)
        assert words.dtype == torch.int32
        assert words.shape == (5, -(-nodes // 32))
        order = torch.arange(nodes)
        assert torch.equal((words[:, order // 32] >> (order % 32)) & 1 == 1, seen)


# --- refusals and the back end --------------------------------------------------------------------------------------


def test_what_would_read_the_wrong_memory_is_refused_before_the_launch():
    call = Call((50,), chain(3), kv_heads=1)
    for wrong, message in (
        ({"scale": -1.0}, "scale -1.0 must be above 0"),
        ({"chunk": 100}, "multiple of 32 keys, got 100"),
        ({"window": torch.zeros(2, dtype=torch.int32)}, r"window is int32 \[3\]"),
        ({"workspace": torch.empty(3), "longest": 300}, "workspace must hold"),
        ({"lse": torch.empty(1, 3, 3)}, "lse must be"),
    ):
        with pytest.raises(ValueError, match=message):
            gpu.tree_attention(*call.arguments, **{"scale": 1.0, "chunk": CHUNK, **wrong})
    with pytest.raises(ValueError, match="1 to 64 queries"):
        Call((5,), chain(65), kv_heads=1).kernel()
    with pytest.raises(ValueError, match=r"corner of 3 queries and 3 nodes is bool \[3, 3\]"):
        gpu.tree_attention(*call.arguments[:4], call.seen[:, :2], call.depth, call.node, scale=1.0)


def test_the_back_end_conforms_in_a_few_cases_of_every_family():
    backend, run = TritonBackend(), Counter()
    for dtype, head_dim, group in ((torch.float32, 64, 1), (torch.float16, 64, 2)):
        need = Need("cpu", dtype, head_dim, group, tree=True, sliding=True)
        assert backend.why_not(need) is None
        for case in few(conformance.cases(need), 1 if dtype == torch.float32 else 3):
            verdict = conformance.judge(backend, case)
            assert not verdict.faults, str(verdict)
            run[case.family] += verdict.refusal is None
    assert run.keys() >= {"views", "borders", "widths", "queries", "prompts", "sliding", "changes"}
    assert run["changes"] == 2
    assert min(run[family] for family in ("views", "borders", "widths", "sliding")) >= 3


def few(cases, fewer):
    """Every so-manieth of the cheap cases of each family; of those that are asked many times over one, with shorter rows."""
    met = Counter()
    for case in cases:
        if case.family == "changes":
            case = replace(case, lengths=(150, 5, 70)[: len(case.lengths)])
        if max(case.lengths) * len(case.corner.queries) * case.kv_heads <= CHEAP:
            every = fewer * {"views": 37, "borders": 7, "sliding": 5, "widths": 4, "changes": 100}.get(case.family, 12)
            if met[case.family] % every == 0:
                yield case
            met[case.family] += 1
