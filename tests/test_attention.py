"""Attention back ends against the float64 reference, which is itself checked against a loop over the definition."""

from __future__ import annotations

import math

import pytest
import torch

from specdec_lab.engine import backends
from specdec_lab.engine.attention import Need, Reads, SdpaBackend, chain_reads, draft_step_reads
from specdec_lab.engine.backends import BACKENDS, BackendUnavailable, pick
from specdec_lab.engine.cache import CacheTooLarge, KvCache
from specdec_lab.records import KvView, TreeShape

GENERATOR = torch.Generator().manual_seed(0)
VIEWS = [KvView.parse(v) for v in ("full", "4+12", "0+1", "3+1", "0+63", "9+500")]


def filled_cache(lengths, heads=2, dim=16, poison=0.0):
    """A one-layer cache with random K/V; slots beyond each row's appended nodes hold `poison`."""
    cache = KvCache(1, len(lengths), heads, 200, dim, torch.float32, torch.device("cpu"))
    cache.kv.normal_(generator=GENERATOR)
    cache.committed = torch.tensor(lengths)
    for row, length in enumerate(lengths):
        cache.kv[:, :, row, :, length + 9 :] = poison
    return cache


def by_definition(q, cache, reads, group):
    """Softmax over exactly the keys that the rule allows, one query at a time, in Python floats."""
    k, v = (part.double() for part in cache.layer(0))
    out = torch.zeros_like(q)
    depth = reads.node_depths.tolist()
    for b, committed in enumerate(reads.committed.tolist()):
        for t, node in enumerate(reads.query_nodes.tolist()):
            place = committed + depth[node]
            slots = [(s, s) for s in range(committed)]
            slots += [(committed + c, committed + depth[c]) for c in range(reads.corner.shape[1]) if reads.corner[t, c]]
            view = reads.view
            seen = [s for s, p in slots if view.kind == "full" or p < view.sink or place - p < view.recent]
            for h in range(q.shape[2]):
                scores = k[b, h // group, seen] @ q[b, t, h].double() / math.sqrt(q.shape[-1])
                out[b, t, h] = (scores.softmax(0) @ v[b, h // group, seen]).float()
    return out


def cases():
    for lengths in ([0, 0], [1, 7], [64, 64], [65, 63], [0, 130]):
        for view in VIEWS:
            committed = torch.tensor(lengths)
            uniform = lengths[0] == lengths[1]
            for width in (1, 2, 5, 9):
                yield lengths, chain_reads(committed, width, view, max(lengths), uniform)
            for step in (0, 3):
                yield lengths, draft_step_reads(committed, step, view, max(lengths), uniform)
            tree = TreeShape.parse("tree:-1,-1,0,0,1")
            nodes = tree.num_nodes + 1
            corner = torch.eye(nodes, dtype=torch.bool)
            for node, parent in enumerate(tree.parents):
                corner[node + 1] |= corner[parent + 1]
            depths = torch.tensor([0, *tree.depths])
            yield lengths, Reads(committed, corner, depths, torch.arange(nodes), view, max(lengths) + nodes, uniform)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("name", BACKENDS)
def test_a_back_end_equals_the_definition_on_ugly_shapes(name, group):
    backend, count = BACKENDS[name], 0
    for lengths, reads in cases():
        cache = filled_cache(lengths, poison=3.0 if name == "sdpa" else float("nan"))
        q = torch.randn(2, reads.num_queries, 2 * group, 16, generator=GENERATOR)
        out = backend.attend(q, cache, 0, backend.plan(reads, cache, group), 16**-0.5)
        assert torch.allclose(out, by_definition(q, cache, reads, group), atol=2e-6), (lengths, reads)
        count += 1
    assert count == 5 * len(VIEWS) * 7


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_a_sliding_window_of_the_model_is_honoured(name):
    backend = BACKENDS[name]
    cache = filled_cache([50, 20])
    reads = chain_reads(cache.committed, 3, KvView.full(), 50, False)
    q = torch.randn(2, 3, 2, 16, generator=GENERATOR)
    out = backend.attend(q, cache, 0, backend.plan(reads, cache, 1, sliding=16), 16**-0.5)
    windowed = chain_reads(cache.committed, 3, KvView.window(0, 16), 50, False)
    assert torch.allclose(out, by_definition(q, cache, windowed, 1), atol=2e-6)


def test_the_first_forward_of_equal_prompts_is_plain_causal_attention():
    cache = filled_cache([0, 0])
    reads = chain_reads(cache.committed, 7, KvView.full(), 0, True)
    assert reads.is_causal_prefill
    assert BACKENDS["sdpa"].plan(reads, cache, 1).causal


def test_a_window_is_gathered_and_not_masked_out_of_the_whole_cache():
    cache = filled_cache([150, 140])
    plan = BACKENDS["sdpa"].plan(draft_step_reads(cache.committed, 0, KvView.window(4, 12), 150, False), cache, 1)
    assert plan.slots is not None
    assert plan.slots.shape == (2, 17)


def test_automatic_choice_reports_whom_it_passed_over(monkeypatch):
    need = Need("cpu", torch.float32, 64, 1)

    class Refuses(SdpaBackend):
        name = "picky"

        def why_not(self, need):
            return "picky never wants to"

    monkeypatch.setitem(BACKENDS, "picky", Refuses())
    monkeypatch.setitem(backends.AUTOMATIC, "cpu", ("picky", "sdpa"))
    backend, refused = pick("auto", need)
    assert backend.name == "sdpa"
    assert refused == {"picky": "picky never wants to"}
    with pytest.raises(BackendUnavailable, match="picky never wants to.*auto"):
        pick("picky", need)
    with pytest.raises(BackendUnavailable, match="no back end 'tritn'; known: auto, .*sdpa"):
        pick("tritn", need)
    with pytest.raises(BackendUnavailable, match="soft-capping"):
        pick("auto", Need("cpu", torch.float32, 64, 1, softcap=True))


def test_a_cache_that_cannot_fit_is_refused_before_allocation_with_the_bytes():
    with pytest.raises(CacheTooLarge, match=r"1000000 sequences x 100000 tokens needs [\d,]+ bytes; [\d,]+ are free on cpu"):
        KvCache(32, 1_000_000, 32, 100_000, 128, torch.float32, torch.device("cpu"))


def test_padding_goes_to_a_slot_that_nobody_reads():
    cache = KvCache(1, 1, 1, 10, 2, torch.float32, torch.device("cpu"))
    slots = torch.tensor([[0, cache.scratch_slot]])
    cache.append(0, torch.ones(2, 1, 1, 2, 2), cache.write_index(slots))
    assert cache.kv[0, 0, 0, 0, 0, 0] == 1
    assert cache.kv[0, 0, 0, 0, 1 : cache.capacity].abs().sum() == 0
    assert cache.capacity >= 10
