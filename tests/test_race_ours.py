"""Our engine as peers of the race: the engine's own tokens, prompts read once for all, floors and rounds of the records."""

from __future__ import annotations

import time

import pytest

import letters
import specdec_lab as sd
import tiny
from racers import CELL
from specdec_lab.bench.race import lineup
from specdec_lab.bench.race.ours import OurPeer, SharedSession
from specdec_lab.bench.race.peer import PeerFailed
from specdec_lab.costs import Limits, forward_floor
from specdec_lab.records import SpecConfig
from specdec_lab.stream import Stream, record
from specdec_lab.workload import Workload


@pytest.fixture(scope="module")
def engine():
    return sd.Engine(letters.pair())


def prepared(engine, *configs, lengths=(30, 30), new_tokens=9):
    shared, prompts = SharedSession(engine), tiny.prompts(list(lengths))
    peers = [OurPeer(shared, SpecConfig.parse(config)) for config in configs]
    return peers, [peer.prepare(prompts, new_tokens) for peer in peers], prompts


def test_our_peers_give_the_tokens_of_the_engine_again_and_again_and_ignore_end_of_text(engine):
    peers, _, prompts = prepared(engine, "off", "self:4+12/chain3", "model:4+20/chain2", "ngram/chain4")
    expected = [tiny.plain_greedy(tiny.model(), prompt, 9, eos=None) for prompt in prompts]
    for peer in (*peers, *peers[::-1]):
        assert peer.decode().tokens == expected
    assert [peer.name for peer in peers] == ["ours/off", "ours/self:4+12/chain3", "ours/model:4+20/chain2", "ours/ngram/chain4"]


def test_our_prompts_are_read_once_for_all_configurations(engine):
    peers, prefill_s, _ = prepared(engine, "off", "self:4+12/chain3", "model:4+20/chain2")
    assert prefill_s[0] > 0
    assert prefill_s[1] == 0
    assert prefill_s[2] > 0  # the draft's
    assert peers[0].prepare(tiny.prompts([30, 30]), 9) == 0
    assert peers[0].prepare(tiny.prompts([31, 31]), 9) > 0


def test_the_floor_of_plain_decoding_is_that_of_its_forwards(engine):
    (peer,), _, _ = prepared(engine, "off")
    rates, shape = engine.ceilings, engine.pair.target.shape
    limits = Limits(rates.read_bytes_per_s, rates.gemm_flops_per_s)
    floors = [forward_floor(shape, limits, 2, 1, 29 + i, element_bytes=4).total_s for i in range(9)]
    assert peer.decode().extra["floor_s"] == pytest.approx(sum(floors), rel=0.02)


def test_tokens_per_round_are_those_of_the_records(engine):
    (peer,), _, prompts = prepared(engine, "ngram/chain4", new_tokens=40)
    run = record(engine.open(Workload("race", tuple(map(tuple, prompts)), 40, stop_at_eos=False)).steps("ngram/chain4"))
    row_rounds = sum(sum(step.live) for step in run.rounds)
    assert peer.decode().extra["tokens_per_round"] == 80 / row_rounds
    assert row_rounds < 80


class Slow:
    """A session whose steps take 20 ms longer to arrive."""

    def __init__(self, session):
        self.session = session

    def steps(self, choose):
        stream = self.session.steps(choose)

        def late():
            for step in stream:
                time.sleep(0.02)
                yield step

        return Stream(stream.header, late())


def test_the_timed_window_holds_all_rounds(engine):
    (peer,), _, _ = prepared(engine, "off")
    peer._session = Slow(peer._session)
    began = time.perf_counter()
    decoded = peer.decode()
    assert 9 * 0.02 <= decoded.seconds <= time.perf_counter() - began
    assert decoded.extra["cpu_s"] < decoded.seconds


def test_a_configuration_that_cannot_run_says_why(engine):
    alone = sd.Engine(sd.load(tiny.model()))
    peer = OurPeer(SharedSession(alone), SpecConfig.parse("model:4+20/chain2"))
    assert "no draft model is loaded" in peer.why_not(CELL)
    assert OurPeer(SharedSession(alone), SpecConfig.off()).why_not(CELL) is None
    with pytest.raises(PeerFailed, match="before its prompts were read"):
        peer.decode()


class Always:
    """A policy that chooses one configuration."""

    def __init__(self, config, reason=None):
        self.config, self.reason = config, reason

    def mismatch(self, identity):
        return self.reason

    def chooser(self, identity):
        return lambda batch, length: self.config


def test_a_policy_races_on_what_it_chooses_and_one_of_another_machine_is_skipped(engine):
    peer = lineup.our_peers(engine, (), Always("ngram/chain4"))[-1]
    assert peer.name == "ours/policy"
    assert peer.why_not(CELL) is None
    peer.prepare(tiny.prompts([30, 30]), 9)
    expected = [tiny.plain_greedy(tiny.model(), prompt, 9, eos=None) for prompt in tiny.prompts([30, 30])]
    assert peer.decode().tokens == expected
    assert peer.settings()["configurations"] == ["ngram/chain4"]
    assert OurPeer(SharedSession(engine), Always("off", "another device"), "ours/policy").why_not(CELL) == "another device"


def test_the_default_line_up_is_plain_decoding_and_each_configuration_once(engine):
    found = lineup.our_peers(engine, (SpecConfig.off(), *lineup.DEFAULT_CONFIGS, lineup.DEFAULT_CONFIGS[0]), None)
    assert [peer.name for peer in found] == ["ours/off", *(f"ours/{config}" for config in lineup.DEFAULT_CONFIGS)]


def test_prompts_that_do_not_fit_are_a_failure_of_the_peer(engine):
    with pytest.raises(PeerFailed, match="positions"):
        OurPeer(SharedSession(engine), SpecConfig.off()).prepare([[1] * 2000], 9)
