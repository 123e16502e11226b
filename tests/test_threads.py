"""The thread count of each kind of forward is the one that was measured to be fastest."""

from __future__ import annotations

import pytest
import torch

import specdec_lab as sd
import tiny
from specdec_kernels.decoder import cpu as decoder
from specdec_lab.engine import threads as module
from specdec_lab.engine.threads import KEPT_S, PATIENCE, Threads, candidates


class World:
    """Time passes by what a forward costs at torch's thread count."""

    def __init__(self, costs):
        self.costs, self.now_s, self.runs, self.count = costs, 0.0, [], 1

    def now(self):
        return self.now_s

    def work(self):
        self.runs.append(self.count)
        self.now_s += self.costs[self.count]


@pytest.fixture
def torch_threads(monkeypatch):
    """torch's count as a variable, so that a test may ask for more threads than there are cores."""
    held = World({})
    monkeypatch.setattr(module.torch, "set_num_threads", lambda n: setattr(held, "count", n))
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: held.count)
    return held


def test_candidates_are_powers_of_two_and_all():
    assert [candidates(n) for n in (1, 2, 3, 6, 8)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 6), (1, 2, 4, 8)]


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ({1: 1e-3, 2: 1.2e-3, 4: 5e-3}, 1),
        ({1: 1e-3, 2: 0.6e-3, 4: 0.61e-3}, 2),
        ({1: 1e-3, 2: 0.99e-3, 4: 0.98e-3}, 1),  # not worth it
        ({1: 8e-3, 2: 4e-3, 4: 2e-3}, 4),
        ({1: 1e-3, 2: 20e-3, 4: 0.5e-3}, 4),
    ],
)
def test_the_fastest_count_is_used_unless_more_threads_gain_nothing(torch_threads, costs, best):
    torch_threads.costs = costs
    threads = Threads(4, torch_threads.now)
    pauses = []
    used = threads.use("draft", torch_threads.work, lambda: pauses.append("off"), lambda: pauses.append("on"))
    assert used == best == torch_threads.count
    assert pauses == ["off", "on"]
    ran = len(torch_threads.runs)
    assert threads.use("draft", torch_threads.work, None, None) == best
    assert len(torch_threads.runs) == ran, "measured once"
    threads.restore()
    assert torch_threads.count == 4


def test_hopeless_counts_are_given_up_early_and_tiny_forwards_measured_on_one_thread_only(torch_threads):
    torch_threads.costs = {1: 1e-3, 2: 1.0, 4: 1.0}
    Threads(4, torch_threads.now).use("a", torch_threads.work, lambda: None, lambda: None)
    assert torch_threads.runs.count(2) == torch_threads.runs.count(4) == 3
    torch_threads.costs, torch_threads.runs = {1: 1e-5, 2: 1e-6, 4: 1e-6}, []
    assert Threads(4, torch_threads.now).use("b", torch_threads.work, lambda: None, lambda: None) == 1
    assert set(torch_threads.runs) == {1}


def test_a_machine_that_becomes_busy_is_measured_again(torch_threads):
    torch_threads.costs = {1: 1e-3, 2: 0.5e-3}
    threads = Threads(2, torch_threads.now)
    nothing = (lambda: None, lambda: None)
    assert threads.use("verify", torch_threads.work, *nothing) == 2
    torch_threads.costs = {1: 1e-3, 2: 20e-3}
    for _ in range(PATIENCE):
        assert threads.use("verify", torch_threads.work, *nothing) == 2
        threads.took("verify", 20e-3)
    assert threads.use("verify", torch_threads.work, *nothing) == 1
    assert threads.choices["verify"].measured == 2
    threads.took("verify", 20e-3)
    threads.took("verify", 1e-3)
    assert threads.choices["verify"].slow == 0


def test_choices_are_forgotten_after_a_while(torch_threads):
    torch_threads.costs = {1: 1e-3, 2: 5e-3}
    threads = Threads(2, torch_threads.now)
    threads.use("a", torch_threads.work, lambda: None, lambda: None)
    threads.forget_old()
    assert "a" in threads.choices
    torch_threads.now_s += KEPT_S
    threads.forget_old()
    assert not threads.choices


def test_the_engine_records_its_threads_and_gives_torch_its_own_back():
    before = torch.get_num_threads()
    engine = sd.Engine(sd.load(tiny.model("llama")))
    run = sd.record(engine.steps(sd.Workload("test", tiny.prompts([40, 9]), 12, stop_at_eos=False), "self:4+8/chain2"))
    assert torch.get_num_threads() == before
    assert all(1 <= s.verify_threads <= before and 1 <= s.draft_threads <= before for s in run.rounds)
    assert all(s.draft_threads == 0 for s in sd.record(engine.steps(
        sd.Workload("test", tiny.prompts([40, 9]), 5, stop_at_eos=False), "ngram/chain2")).rounds)  # fmt: skip
    if before > 1:
        assert engine.threads.choices


@pytest.mark.parametrize(
    ("sampling", "one_call"), [({}, True), ({"temperature": 0.7}, True), ({"temperature": 0.7, "top_p": 0.9}, False)]
)
def test_chains_are_drafted_in_one_call_unless_the_law_needs_a_sort(monkeypatch, sampling, one_call):
    engine = sd.Engine(sd.load(tiny.model("llama")))
    if engine.pair.target.why_not_compiled(engine.backend) is not None:
        pytest.skip("no compiled decoder here")
    calls = []
    real = decoder.Decoder.draft
    monkeypatch.setattr(decoder.Decoder, "draft", lambda *a: calls.append(a[4] == (1, 1, 0)) or real(*a))
    workload = sd.Workload("test", tiny.prompts([40, 9]), 12, stop_at_eos=False, **sampling)
    run = sd.record(engine.steps(workload, "self:4+8/chain2"))
    assert (len(calls) >= len(run.rounds)) == one_call
    assert bool(calls) == one_call
