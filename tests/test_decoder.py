"""The compiled decoder against its float64 reference: shapes, layouts, rows left out, and what it refuses."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import build
from specdec_kernels.decoder import cpu, reference
from specdec_kernels.noise import reference as noise
from specdec_kernels.tree_attention import cpu as attention
from test_kernels import random_tree

TARGETS = [t for t in build.TARGETS if cpu.why_not(torch.float32, t) is None]
NAN = float("nan")


def weights(g, *, layers=2, hidden=48, heads=4, kv_heads=2, dim=16, intermediate=40, vocab=61, biased=False, normed=False,
            dtype=torch.float32, positions=160):  # fmt: skip
    """Random weights of ugly sizes; norms and biases in float32."""

    def matrix(rows, columns):
        return (torch.randn(rows, columns, generator=g) * columns**-0.5).to(dtype)

    def norm(size):
        return torch.rand(size, generator=g) + 0.5

    def block():
        return reference.Block(
            norm(hidden), matrix((heads + 2 * kv_heads) * dim, hidden),
            torch.randn((heads + 2 * kv_heads) * dim, generator=g) * 0.1 if biased else None,
            norm(dim) if normed else None, norm(dim) if normed else None, matrix(hidden, heads * dim),
            torch.randn(hidden, generator=g) * 0.1 if biased else None, norm(hidden),
            matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate),
        )  # fmt: skip

    angles = torch.arange(positions)[:, None] * 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
    embedding = torch.randn(vocab, hidden, generator=g).to(dtype)
    return reference.Weights(
        tuple(block() for _ in range(layers)), embedding, embedding, norm(hidden), angles.cos(), angles.sin(), heads, kv_heads,
        dim, 1e-5,
    )  # fmt: skip


class Case:
    """A forward of `queries` tokens over a ragged, poisoned cache; run() gives what the kernel made of it."""

    def __init__(self, seed, *, batch=3, queries=5, slots=150, kv_dtype=torch.float32, committed=None, chain=True, sink=0,
                 recent=0, listed=0, **sizes):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.weights = weights(g, **sizes)
        w = self.weights
        self.committed = torch.tensor(committed) if committed else torch.randint(0, slots - queries + 1, (batch,), generator=g)
        self.corner, self.depth = random_tree(queries, g, chain)
        self.nodes = torch.arange(queries, dtype=torch.int32)
        self.tokens = torch.randint(0, w.embedding.shape[0], (batch, queries), generator=g)
        self.kv = torch.randn(len(w.blocks), 2, batch, w.kv_heads, slots, w.head_dim, generator=g).to(kv_dtype)
        for row, length in enumerate(self.committed.tolist()):
            self.kv[:, :, row, :, length:] = NAN
        self.view, self.scale = {"sink": sink, "recent": recent}, w.head_dim**-0.5
        self.index = None  # [layers, B, Hkv, listed] positions before the window, all of them where they are few
        if listed:
            self.index = torch.arange(listed, dtype=torch.int32).repeat(len(w.blocks), len(self.committed), w.kv_heads, 1)
            for layer, row, head in itertools.product(*map(range, self.index.shape[:3])):
                before = int(self.committed[row]) + 1 - recent
                if before > listed:
                    self.index[layer, row, head] = torch.randperm(before, generator=g)[:listed].sort().values

    def expected(self):
        kv = self.kv.clone()
        keep = torch.arange(self.tokens.shape[1])
        arguments = (self.tokens, kv, self.committed, self.corner, self.depth, self.nodes, keep)
        logits, best = reference.decoder(self.weights, *arguments, scale=self.scale, index=self.index, **self.view)
        return logits, best, kv

    def call(self, kv, target, threads, rows):
        """A call of the kernel over `kv`, and the memory it points to."""
        w, queries = self.weights, self.tokens.shape[1]
        bits, depth = attention.corner_bits(self.corner), self.depth.to(torch.int32)
        call = attention.Call()
        call.k, call.v, call.committed = kv[0, 0].data_ptr(), kv[0, 1].data_ptr(), self.committed.data_ptr()
        call.corner, call.node_depth, call.query_node = bits.data_ptr(), depth.data_ptr(), self.nodes.data_ptr()
        call.batch, call.queries, call.heads, call.kv_heads = kv.shape[2], queries, w.heads, w.kv_heads
        call.dim, call.nodes, call.slots = w.head_dim, self.corner.shape[1], kv.shape[4]
        _, _, call.kv_batch, call.kv_head, call.kv_slot, _ = kv.stride()
        call.sink, call.recent, call.bf16, call.threads = *self.view.values(), int(kv.dtype == torch.bfloat16), threads
        call.scale = self.scale
        if self.index is not None:
            call.index, call.index_len, call.index_layer = self.index.data_ptr(), self.index.shape[3], self.index.stride(0)
        if rows is not None:
            rows = torch.tensor(rows, dtype=torch.int32)
            call.rows, call.num_rows = rows.data_ptr(), rows.shape[0]
        library = build.load_library(target)
        code = library.tree_attention_check(ctypes.byref(call))
        space = attention.aligned(1 if code else library.tree_attention_workspace(ctypes.byref(call)))
        call.workspace = space.data_ptr()
        return call, (bits, depth, rows, space)

    def run(self, target="native", threads=1, rows=None, keep=None, decoder=None):
        kv, w, queries = self.kv.clone(), self.weights, self.tokens.shape[1]
        call, kept = self.call(kv, target, threads, rows)
        keep = torch.arange(queries, dtype=torch.int32) if keep is None else torch.tensor(keep, dtype=torch.int32)
        logits = torch.full((kv.shape[2], keep.shape[0], w.embedding.shape[0]), -7.0)
        best = torch.full(logits.shape[:2], -7)
        decoder = decoder or cpu.Decoder(w, target)
        self.attention_ns = decoder.forward(self.tokens, call, kv.stride(0), keep, logits, best)
        del kept
        return logits, best, kv

    def draft(self, depth, draw, target="native", threads=1, rows=None):
        """What decoder.draft makes of the chain `tokens`, and the cache it leaves."""
        kv = self.kv.clone()
        call, kept = self.call(kv, target, threads, rows)
        drafted = cpu.Decoder(self.weights, target).draft(self.tokens, call, kv.stride(0), (*[1] * depth, 0), draw)
        del kept
        return drafted, kv


def step_by_step(case, depth, choose):
    """The chain that single forwards draft: choose(logits [B, V], position [B], step) -> tokens [B]."""
    single = Case(0)
    single.weights, single.view, single.scale = case.weights, case.view, case.scale
    lag, kv, tokens = case.tokens.shape[1] - 1, case.kv, []
    single.committed, single.tokens, queries = case.committed, case.tokens, lag + 1
    for step in range(depth):
        single.kv, single.corner = kv, torch.ones(queries, queries, dtype=torch.bool).tril()
        single.depth = torch.arange(queries)
        single.nodes = torch.arange(queries, dtype=torch.int32)
        logits, _, kv = single.run(keep=[queries - 1])
        tokens.append(choose(logits[:, 0], single.committed + queries, step))
        single.committed, single.tokens, queries = single.committed + queries, tokens[-1][:, None].contiguous(), 1
    return torch.stack(tokens, 1), kv


def assert_equals_reference(case, **how):
    logits, best, kv = case.run(**how)
    expected, expected_best, expected_kv = case.expected()
    scale = expected.abs().max()
    assert (logits - expected).abs().max() < 2e-5 * scale
    assert torch.equal(best, logits.argmax(-1))
    assert (expected.gather(2, best[..., None]) > expected.gather(2, expected_best[..., None]) - 1e-4 * scale).all()
    written = ~expected_kv.float().isnan()
    tolerance = 1e-5 if kv.dtype == torch.float32 else 0.05
    assert torch.equal(kv.float().isnan(), ~written), "only the slots of the tokens are written"
    assert (kv.float() - expected_kv.float())[written].abs().max() < tolerance


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 4), queries=st.sampled_from([1, 2, 3, 5, 8, 9, 17]),
    group=st.sampled_from([1, 2, 3]), kv_heads=st.integers(1, 2), dim=st.sampled_from([16, 32, 64]),
    hidden=st.sampled_from([16, 33, 48, 96]), intermediate=st.sampled_from([8, 40, 100]), vocab=st.sampled_from([5, 61, 200]),
    biased=st.booleans(), normed=st.booleans(), chain=st.booleans(), threads=st.sampled_from([1, 2, 3]),
    view=st.sampled_from([(0, 0), (4, 12), (0, 3)]),
)  # fmt: skip
def test_the_decoder_equals_float64_on_ugly_shapes(
    target, seed, batch, queries, group, kv_heads, dim, hidden, intermediate, vocab, biased, normed, chain, threads, view
):
    case = Case(
        seed, batch=batch, queries=queries, heads=group * kv_heads, kv_heads=kv_heads, dim=dim, hidden=hidden,
        intermediate=intermediate, vocab=vocab, biased=biased, normed=normed, chain=chain, sink=view[0], recent=view[1],
    )  # fmt: skip
    assert_equals_reference(case, target=target, threads=threads)


@pytest.mark.parametrize("target", TARGETS)
def test_weights_may_be_bfloat16(target):
    assert_equals_reference(Case(1, dtype=torch.bfloat16), target=target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_bfloat16_cache_is_rounded_to_nearest(target):
    case = Case(2, kv_dtype=torch.bfloat16)
    _, _, kv = case.run(target=target)
    exact = replace_cache(case, torch.float32)
    _, _, precise = exact.run(target=target)
    first = case.committed[0]  # the first layer's entries do not depend on rounded ones
    assert torch.equal(kv[0, :, 0, :, first], precise[0, :, 0, :, first].to(torch.bfloat16))


def replace_cache(case, dtype):
    other = Case(2)
    other.kv = case.kv.to(dtype)
    return other


@pytest.mark.parametrize("target", TARGETS)
def test_scoring_several_tokens_gives_bit_for_bit_what_single_steps_give(target):
    together = Case(3, queries=6, committed=[0, 63, 100], slots=140)
    logits, _, kv = together.run(target=target, threads=2)
    alone = Case(3, queries=6, committed=[0, 63, 100], slots=140)
    for step in range(6):
        single = Case(3, queries=1, committed=[0, 63, 100], slots=140)
        single.weights, single.kv = alone.weights, alone.kv
        single.committed, single.tokens = alone.committed + step, alone.tokens[:, step : step + 1].contiguous()
        one, _, alone.kv = single.run(target=target)
        assert torch.equal(one[:, 0], logits[:, step]), step
    assert torch.equal(kv.nan_to_num(), alone.kv.nan_to_num())


def test_results_do_not_depend_on_threads_or_on_the_rest_of_the_batch():
    case = Case(4, batch=4, queries=3, hidden=96, intermediate=100)
    one, two = case.run(threads=1), case.run(threads=2)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, two, strict=True))
    alone = Case(4, batch=4, queries=3, hidden=96, intermediate=100)
    alone.kv, alone.tokens, alone.committed = case.kv[:, :, 2:3], case.tokens[2:3].contiguous(), case.committed[2:3].clone()
    assert torch.equal(alone.run()[0][0], one[0][2])


@pytest.mark.parametrize("rows", [[0], [1, 3], [0, 1, 3], [3], [0, 1, 2, 3]])
def test_rows_that_are_left_out_cost_nothing_and_stay_untouched(rows):
    case = Case(5, batch=4, queries=2)
    case.tokens[[r for r in range(4) if r not in rows]] = -99  # would be refused
    whole = Case(5, batch=4, queries=2).run()
    logits, best, kv = case.run(rows=rows, threads=2)
    for row in range(4):
        if row in rows:
            assert torch.equal(logits[row], whole[0][row])
            assert torch.equal(kv[:, :, row].nan_to_num(), whole[2][:, :, row].nan_to_num())
        else:
            assert (logits[row] == -7).all()
            assert (best[row] == -7).all()
            assert torch.equal(kv[:, :, row].nan_to_num(), case.kv[:, :, row].nan_to_num())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("recent", [1, 9, 40])
@pytest.mark.parametrize("listed", [1, 30, 70])
def test_every_layer_reads_its_own_lists(target, listed, recent):
    for queries, chain in ((1, True), (4, True), (5, False)):
        committed = [0, 1, 30, 64, 130]
        lists = {"recent": recent, "listed": listed, "layers": 3}
        case = Case(listed + recent, batch=5, queries=queries, committed=committed, chain=chain, **lists)
        assert_equals_reference(case, target=target)
    assert not torch.equal(case.index[0], case.index[2])


def test_a_list_of_any_layer_that_reaches_into_the_window_is_refused_before_memory_is_touched():
    case = Case(3, batch=2, queries=1, committed=[90, 100], recent=8, listed=5, layers=3)
    case.index[2, 1, 0, -1] = 95
    with pytest.raises(ValueError, match="row 1 has .*window of 8"):
        case.run()


def test_only_the_kept_queries_are_scored():
    case = Case(6, queries=4)
    everything, _, _ = case.run()
    some, best, _ = case.run(keep=[3, 1])
    assert torch.equal(some, everything[:, [3, 1]])
    assert torch.equal(best, some.argmax(-1))
    assert case.run(keep=[])[0].shape[1] == 0


def test_the_first_of_equal_logits_is_the_arg_max():
    case = Case(7, queries=1, vocab=200)
    flat = replace(case.weights, head=torch.zeros(200, 48))
    case.weights = flat
    assert (case.run()[1] == 0).all()


def test_attention_time_is_reported():
    case = Case(8)
    case.run()
    assert case.attention_ns > 0


NOISE = {"seed": 2**40 + 5, "sequences": torch.tensor([7, 1, 4])}
CHAIN = {"batch": 3, "slots": 140, "vocab": 200}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("view", [(0, 0), (4, 12)])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_chain_drafted_in_one_call_is_bit_for_bit_the_chain_of_single_steps(target, view, lag, threads):
    case = Case(11, queries=lag + 1, committed=[3, 63, 127], sink=view[0], recent=view[1], **CHAIN)
    greedy = cpu.Draw(0.0, NOISE["sequences"], 0, 0, False)
    drafted, kv = case.draft(5, greedy, target, threads)
    expected, expected_kv = step_by_step(case, 5, lambda logits, position, step: logits.argmax(-1))
    assert torch.equal(drafted.tokens, expected)
    assert drafted.law is None
    if target == "native":
        assert torch.equal(kv.nan_to_num(), expected_kv.nan_to_num())
    assert drafted.attention_ns > 0


@pytest.mark.parametrize("lag", [0, 1])
def test_a_coupled_chain_draws_with_the_noise_of_its_positions(lag):
    case = Case(12, queries=lag + 1, committed=[3, 63, 100], **CHAIN)
    drafted, _ = case.draft(4, cpu.Draw(0.8, NOISE["sequences"], NOISE["seed"], 3, True))

    def draw(logits, position, step):
        law = (logits / 0.8).softmax(-1)[:, None]
        return noise.gumbel_argmax(law, NOISE["seed"], NOISE["sequences"], position[:, None], 3)[:, 0]

    assert torch.equal(drafted.tokens, step_by_step(case, 4, draw)[0])
    assert drafted.law is None


def test_a_sampled_chain_returns_the_law_that_its_tokens_were_drawn_from():
    case = Case(13, queries=1, committed=[3, 63, 100], **CHAIN)
    drafted, _ = case.draft(4, cpu.Draw(0.8, NOISE["sequences"], NOISE["seed"], 0, False), threads=2)
    laws = []

    def draw(logits, position, step):
        laws.append((logits / 0.8).softmax(-1))
        words = noise.words(NOISE["seed"], NOISE["sequences"], position[:, None], 0, 1)[:, 0, 0]
        cumulative = drafted.law[:, step].double().cumsum(-1)
        wanted = (words.double() * 2.0**-32 * cumulative[:, -1])[:, None]
        return torch.searchsorted(cumulative, wanted, right=True)[:, 0]

    expected, _ = step_by_step(case, 4, draw)
    assert torch.equal(drafted.tokens, expected)
    assert (drafted.law - torch.stack(laws, 1)).abs().max() < 1e-6
    assert (drafted.law.sum(-1) - 1).abs().max() < 1e-5


def test_rows_that_are_left_out_draft_nothing():
    case = Case(14, queries=1, committed=[3, 63, 100], **CHAIN)
    greedy = cpu.Draw(0.0, NOISE["sequences"], 0, 0, False)
    whole, _ = case.draft(3, greedy)
    some, kv = case.draft(3, greedy, rows=[0, 2], threads=2)
    assert torch.equal(some.tokens[[0, 2]], whole.tokens[[0, 2]])
    assert (some.tokens[1] == 0).all()
    assert torch.equal(kv[:, :, 1].nan_to_num(), case.kv[:, :, 1].nan_to_num())


@pytest.mark.parametrize(("depth", "committed"), [(65, [3, 4, 5]), (3, [3, 4, 138]), (0, [3, 4, 5])])
def test_a_chain_that_does_not_fit_is_refused(depth, committed):
    case = Case(15, queries=1, committed=committed, **CHAIN)
    with pytest.raises(ValueError, match="does not fit into 64 nodes, 140 slots"):
        case.draft(depth, cpu.Draw(0.0, NOISE["sequences"], 0, 0, False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"committed": [10, 149, 20]}, "row 1 has more committed tokens"),
        ({"token": 61}, "token 61 of row 2, query 1 is not one of 61 ids"),
        ({"token": -1}, "token -1 of row 2"),
        ({"positions": 100, "committed": [10, 20, 97]}, "beyond the 100 positions"),
        ({"keep": [5]}, "kept query"),
        ({"rows": [0, 3]}, "row to attend for is not in the batch"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_before_memory_is_touched(change, words):
    sizes = {"positions": change["positions"]} if "positions" in change else {}
    case = Case(9, committed=change.get("committed", [10, 20, 30]), **sizes)
    if "token" in change:
        case.tokens[2, 1] = change["token"]
    with pytest.raises(ValueError, match=words):
        case.run(rows=change.get("rows"), keep=change.get("keep"))


def test_other_weight_types_say_why():
    assert "not float16" in cpu.why_not(torch.float16)
