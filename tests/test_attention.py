"""Every back end against the float64 meaning, which is itself checked against a loop over the definition; and the choice."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from specdec_kernels.tree_attention import reference
from specdec_lab.engine import backends, conformance
from specdec_lab.engine.attention import Need, SdpaBackend, chain_reads, draft_step_reads
from specdec_lab.engine.backends import BACKENDS, BackendUnavailable, pick
from specdec_lab.engine.cache import CacheTooLarge, KvCache
from specdec_lab.engine.conformance.judging import worst_row
from specdec_lab.records import KvView

GENERATOR = torch.Generator().manual_seed(0)
SMALL = 135  # tokens; the loop in Python floats takes a millisecond per query and head


def filled_cache(lengths, heads=2, dim=16):
    """A one-layer cache with random K/V."""
    cache = KvCache(1, len(lengths), heads, 200, dim, torch.float32, torch.device("cpu"))
    cache.kv.normal_(generator=GENERATOR)
    cache.committed = torch.tensor(lengths)
    return cache


def by_definition(situation, layer):
    """Softmax over exactly the keys that the rule allows, one query and head at a time, in Python floats."""
    q, reads, view, group = situation.q.double(), situation.reads, situation.reads.view, situation.group
    sliding = math.inf if situation.sliding is None else situation.sliding
    k, v = (part.double() for part in situation.cache.layer(layer))
    out = torch.zeros(q.shape, dtype=torch.float64)
    depth = reads.node_depths.tolist()
    for b, committed in enumerate(reads.committed.tolist()):
        for t, node in enumerate(reads.query_nodes.tolist()):
            place = committed + depth[node]
            slots = [(s, s) for s in range(committed)]
            slots += [(committed + c, committed + depth[c]) for c in range(reads.corner.shape[1]) if reads.corner[t, c]]
            slots = [(s, p) for s, p in slots if place - p < sliding]
            seen = [s for s, p in slots if view.kind == "full" or p < view.sink or place - p < view.recent]
            for h in range(q.shape[2]):
                scores = (k[b, h // group, seen] @ q[b, t, h] * situation.scale).tolist()
                highest = max(scores)
                weights = [math.exp(score - highest) for score in scores]
                out[b, t, h] = torch.tensor(weights, dtype=torch.float64) / math.fsum(weights) @ v[b, h // group, seen]
    return out


def small_cases():
    """Cases of the suite with short rows and few queries, of every family that has such."""
    need = Need("cpu", torch.float32, 16, 2, max_queries=9, tree=True, sliding=True)
    return [case for case in conformance.cases(need) if max(case.lengths) <= SMALL]


def test_the_float64_meaning_equals_the_definition_in_python_floats():
    families = Counter()
    for case in small_cases():
        situation = case.build(masks_loads=True)
        expected = [by_definition(situation, layer) for layer in range(situation.num_layers)]
        assert worst_row(conformance.meaning(situation), expected) < 1e-13, case.name
        families[case.family] += 1
    assert families.keys() >= {"views", "borders", "widths", "sizes", "queries", "prompts", "sliding"}
    assert families.total() > 300


def test_the_kernel_s_own_reference_means_the_same():
    compared = 0
    for case in (c for c in small_cases() if c.sliding is None):
        s = case.build(masks_loads=True)
        window = {} if s.reads.view.kind == "full" else {"sink": s.reads.view.sink, "recent": s.reads.view.recent}
        corner = (s.reads.corner, s.reads.node_depths, s.reads.query_nodes)
        outs = [
            reference.tree_attention(s.q, *s.cache.layer(layer), s.reads.committed, *corner, scale=s.scale, **window)[0]
            for layer in range(2)
        ]
        assert worst_row(outs, conformance.meaning(s)) < 1e-13, case.name
        compared += 1
    assert compared > 300


@pytest.mark.parametrize("name", BACKENDS)
def test_a_back_end_conforms_in_every_case_that_it_does_not_refuse(name):
    # the reference is what the others are compared with, and slow: of it one size is enough
    need = Need("cpu", torch.bfloat16, 16, 2, tree=True, sliding=True) if name == "reference" else None
    report = conformance.check(BACKENDS[name], need)
    if report.verdict == "nothing ran":
        pytest.skip(str(report))
    report.raise_if_red()
    assert len(report.ran) > (500 if need else 900), report


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
