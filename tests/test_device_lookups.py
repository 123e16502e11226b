"""Device rounds of drafters that look something up: lists of a SnapKV view, n-grams of the text. Held to rounds on the host."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import specdec_lab as sd
import tiny
from specdec_lab.engine import attention, tree_layout
from specdec_lab.engine import session as host_session
from specdec_lab.engine.accounts import count
from specdec_lab.engine.batch import count_forward
from specdec_lab.engine.device import flights, graphs, readings
from specdec_lab.engine.device.booking import FULL
from specdec_lab.engine.device.kernel_deciding import KernelDeciding
from specdec_lab.engine.device.plan import list_bytes
from specdec_lab.engine.device.program import Program
from specdec_lab.engine.device.round import play
from specdec_lab.engine.device.state import DRAFTED
from specdec_lab.engine.drafters import ModelDrafter
from specdec_lab.engine.snapkv import SnapKv
from specdec_lab.records import SpecConfig
from test_device import (
    LAWS,
    Asked,
    NoKernels,
    Timeless,
    by_kernel_references,
    no_kernels,
    stage_of,
    to_meta,
    untimed,
    workload,
)

LISTED = ["self:snapkv8+4/chain3", "self:snapkv8+4r5/chain2", "self:snapkv1+1/3,2,1", "self:snapkv6+3r7/tree:-1,0,-1,0,2",
          "self:snapkv2000+3r9/chain2"]  # fmt: skip
COMPUTED = {"kv_read_bytes", "kv_write_bytes", "linear_flops", "attention_flops", "query_tokens", "weight_bytes"}


@pytest.fixture(scope="module")
def pair():
    return sd.load(tiny.model("llama"), tiny.model("llama", seed=1))


@pytest.fixture(scope="module")
def host(pair):
    return sd.Engine(pair, "sdpa", rounds="host")


@pytest.fixture(scope="module")
def device(pair):
    return sd.Engine(pair, "sdpa", rounds="eager")


def repeating(lengths=(40, 12, 31), tokens=20, seed=0, **more):
    """Texts of two or three tokens, in which most tails occurred before; the last says nothing twice."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(1, 3 + row) for _ in range(n)] for row, n in enumerate(lengths)]
    return sd.Workload("test", (*prompts, range(1, 20)), tokens, **more)


def assert_equal_lookups(there, here, pair):
    """Records are equal; where the host found nothing to draft for any row, all but the counts of what was computed."""
    assert len(there.steps) == len(here.steps)
    computed = 0
    for mine, theirs in zip(untimed(there), untimed(here), strict=True):
        alone = theirs["kind"] == "round" and theirs["config"].startswith("ngram") and not any(theirs["drafted"])
        names = set(mine) - (COMPUTED if alone else set())
        assert {n: mine[n] for n in names} == {n: theirs[n] for n in names}
        if alone:
            depth = SpecConfig.parse(mine["config"]).depth
            counted = count(pair.target, (count_forward(list(mine["context_tokens"]), depth + 1, FULL),), 0)
            assert {n: mine[n] for n in COMPUTED} == {n: getattr(counted, n) for n in COMPUTED}
            computed += 1
    return computed


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", LISTED)
def test_rounds_with_lists_give_the_records_of_rounds_on_the_host(host, device, config, law):
    asked = workload((9, 40, 17, 1), 24, **LAWS[law])
    there, here = sd.record(device.steps(asked, config)), sd.record(host.steps(asked, config))
    assert untimed(there) == untimed(here)
    assert sum(sum(step.drafted) for step in there.rounds) > 20


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", ["ngram/chain1", "ngram/chain4"])
def test_n_gram_rounds_give_the_tokens_and_counts_of_rounds_on_the_host(host, device, pair, config, law):
    asked = repeating(stop_at_eos=False, **LAWS[law])
    there, here = sd.record(device.steps(asked, config)), sd.record(host.steps(asked, config))
    assert_equal_lookups(there, here, pair)
    found = [step.drafted for step in there.rounds]
    assert any(0 < sum(map(bool, row)) < len(row) for row in found), "rows with a match beside rows without"
    assert sum(sum(step.accepted) for step in there.rounds) > 0


def test_where_no_row_has_a_match_the_whole_chain_is_computed_and_counted(host, device, pair):
    asked = workload((9, 12), 3, stop_at_eos=False)
    there, here = (sd.record(e.steps(asked, "ngram/chain3")) for e in (device, host))
    assert not any(map(any, (step.drafted for step in there.rounds)))
    assert assert_equal_lookups(there, here, pair) == len(there.rounds) == 3
    assert [s.query_tokens for s in there.rounds] == [4] * 3
    assert [s.query_tokens for s in here.rounds] == [1] * 3


@pytest.mark.parametrize("rounds", ["host", "eager"])
def test_a_row_says_the_same_whether_or_not_another_row_found_something(pair, rounds):
    engine = sd.Engine(pair, "sdpa", rounds=rounds)
    law = {"temperature": 0.8, "seed": 5, "stop_at_eos": False}
    alone = sd.Workload("test", (range(1, 20),), 12, **law)
    beside = sd.Workload("test", (range(1, 20), [1, 2] * 9), 12, **law)
    runs = [sd.record(engine.steps(asked, "ngram/chain3")) for asked in (alone, beside)]
    assert any(step.drafted == (0, 3) for step in runs[1].rounds)
    assert runs[0].tokens()[0] == runs[1].tokens()[0]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", ["ngram/chain4", "self:snapkv8+4r5/chain2", "self:snapkv6+3/3,2"])
def test_deciding_by_kernels_gives_the_same_records(host, device, pair, config, law, monkeypatch):
    by_kernel_references(monkeypatch)
    asked = repeating((21, 30), 14, stop_at_eos=False, **LAWS[law])
    assert_equal_lookups(sd.record(device.steps(asked, config)), sd.record(host.steps(asked, config)), pair)


@pytest.mark.parametrize("lengths", [(1,), (1, 2, 3), (300, 2, 64, 65, 33)], ids=str)
@pytest.mark.parametrize("config", ["ngram/chain3", "self:snapkv40+32r20/chain3", "self:snapkv5+2/2,2"])
def test_any_batch_of_any_lengths_runs(host, device, pair, lengths, config):
    asked = workload(lengths, 9, stop_at_eos=False)
    assert_equal_lookups(sd.record(device.steps(asked, config)), sd.record(host.steps(asked, config)), pair)


@pytest.mark.parametrize("config", ["ngram/chain3", "self:snapkv8+4r6/chain3", "self:snapkv8+4/2,1"])
def test_rows_that_end_at_different_rounds_emit_nothing_more(pair, config):
    lengths = (9, 30, 17, 5)
    plain = sd.record(sd.Engine(pair, "sdpa").steps(workload(lengths, 40, stop_at_eos=False), "off")).tokens()
    ends = dataclasses.replace(pair, eos_ids=tuple(row[at] for row, at in zip(plain, (3, 9, 14, 22), strict=True)))
    here, there = (sd.record(sd.Engine(ends, "sdpa", rounds=r).steps(workload(lengths, 40), config)) for r in ("host", "eager"))
    assert_equal_lookups(there, here, pair)
    assert len({len(row) for row in there.tokens()}) > 2, "rows ended at different lengths"
    assert max(map(len, there.tokens())) < 40, "by their text, not by the limit"


def test_turns_rewinds_and_switches_keep_the_tokens_of_plain_decoding(host, device):
    turns = tuple(tuple(map(tuple, tiny.prompts([n, 4, 6], seed=n))) for n in (3, 5))
    asked = workload((9, 30, 17), 16, turns=turns, stop_at_eos=False)
    plain = sd.record(host.steps(asked, "off")).tokens()
    order = ["self:snapkv8+4/chain2", "ngram/chain3", "self:snapkv8+3r4/chain2", "self:4+8/chain2", "model:4+8/chain2", "off",
             "self:snapkv6+2/2,1", "ngram/2,1"]  # fmt: skip
    asks = 0

    def choose(live, length):
        nonlocal asks
        asks += 1
        return order[asks // 2 % len(order)]

    opened = device.open(asked)
    runs = [sd.record(opened.steps(config)) for config in (choose, choose, *order[:3])]
    assert all(run.tokens() == plain for run in runs)
    assert len({step.config for run in runs[:2] for step in run.rounds}) == len(order), "every record says what it ran"


@pytest.mark.parametrize("config", ["self:snapkv8+4r6/chain3", "self:snapkv6+2r5/2,2", "ngram/chain3"])
def test_the_records_of_several_turns_and_of_a_second_run_are_the_host_s(host, device, pair, config):
    turns = tuple(tuple(map(tuple, tiny.prompts([n, 40, 6], seed=n))) for n in (3, 5))
    asked = workload((9, 30, 17), 11, turns=turns, stop_at_eos=False, temperature=0.8, seed=3)
    opened = [engine.open(asked) for engine in (device, host)]
    for _ in range(2):
        assert_equal_lookups(*(sd.record(session.steps(config)) for session in opened), pair)


@pytest.mark.parametrize("law", ["greedy", "coupled", "rejection"])
@pytest.mark.parametrize("config", ["ngram/chain3", "self:snapkv8+4r6/chain3", "self:snapkv6+3/3,2"])
def test_forced_acceptance_accepts_what_it_accepts_on_the_host(pair, config, law, monkeypatch):
    forced = "ranks:0.5,0.2" if "3,2" in config else "0.7"
    asked = repeating(tokens=24, stop_at_eos=False, **LAWS[law])
    here, there, kernels = [], [], []
    for found, rounds in ((here, "host"), (there, "eager"), (kernels, "eager")):
        if found is kernels:
            by_kernel_references(monkeypatch)
        run = sd.record(sd.Engine(pair, "sdpa", rounds=rounds, forced=forced).steps(asked, config))
        chain = "3,2" not in config  # of a forced tree only the counts are those of the host
        found += [(s.drafted, s.accepted, s.ranks, s.tokens if chain else ()) for s in run.rounds]
    assert there == here
    assert kernels == here
    assert sum(sum(accepted) for _, accepted, *_ in here) > 5


@pytest.mark.parametrize("config", ["ngram/chain3", "self:snapkv8+4r6/chain3", "self:snapkv8+4/2,2"])
def test_the_rounds_are_played_on_the_device_and_none_in_vain(device, config, monkeypatch):
    played = []
    original = graphs.Eager.play
    monkeypatch.setattr(graphs.Eager, "play", lambda self: played.append(self.program.key) or original(self))
    monkeypatch.setattr(host_session.Session, "round", lambda *_: pytest.fail("a round on the host"))
    run = sd.record(device.steps(workload((9, 40), 37, stop_at_eos=False), config))
    budget = 8 if "snapkv" in config else 0
    assert played == [(config.split(":")[0].split("/")[0], config.split("/")[1], budget)] * len(run.rounds)
    assert run.header.target["rounds"] == "eager, reference operations: no CUDA"


def test_n_gram_trees_still_run_on_the_host(device, host, monkeypatch):
    monkeypatch.setattr(graphs.Eager, "play", lambda *_: pytest.fail("a round on the device"))
    asked = repeating((20, 20), 9, stop_at_eos=False)
    assert untimed(sd.record(device.steps(asked, "ngram/2,2"))) == untimed(sd.record(host.steps(asked, "ngram/2,2")))


def test_the_host_reads_no_text_for_n_grams_that_the_device_looks_for(device):
    opened = device.open(workload((9, 12), 8, stop_at_eos=False))
    sd.record(opened.steps("ngram/chain3"))
    assert not opened._session._ngram._rows
    sd.record(opened.steps("ngram/2,2"))
    assert opened._session._ngram._rows


@pytest.mark.parametrize("config", ["self:snapkv8+4r7/chain3", "self:snapkv8+4r3/chain3", "self:snapkv8+4r40/2,2"])
def test_lists_are_chosen_before_the_same_rounds_as_on_the_host(pair, config, monkeypatch):
    chosen = []
    original = SnapKv._choose
    monkeypatch.setattr(SnapKv, "_choose", lambda self, batch, view, at: chosen.append(at) or original(self, batch, view, at))
    found = {}
    for rounds in ("host", "eager"):
        chosen.clear()
        asked = workload((9, 40, 17), 64, stop_at_eos=False, temperature=0.8, seed=2)
        sd.record(sd.Engine(pair, "sdpa", rounds=rounds).steps(asked, config))
        found[rounds] = list(chosen)
    assert found["eager"] == found["host"]
    assert len(found["host"]) > 1


def test_flights_are_as_long_as_ever_where_nothing_is_chosen_again(device, monkeypatch):
    sent = []
    original = readings.HostPost.send
    monkeypatch.setattr(readings.HostPost, "send", lambda self, log: sent.append(1) or original(self, log))
    for config in ("self:snapkv8+4/chain3", "ngram/chain3"):
        sent.clear()
        run = sd.record(device.steps(workload((9, 40), 64, stop_at_eos=False), config))
        assert len(sent) < len(run.rounds) / 2
    sent.clear()
    run = sd.record(device.steps(workload((9, 40), 64, stop_at_eos=False), "self:snapkv8+4r1/chain3"))
    assert len(sent) == len(run.rounds), "lists of every round"


def test_no_flight_goes_beyond_what_is_certain():
    config = SpecConfig.parse("ngram/chain3")

    def flight(rounds):
        return flights.Flight(config, None, None, 0, rounds, None, 0)

    for tokens in range(1, 60):
        rounds = flights.certain_rounds(tokens, config, [], 1000)
        assert (rounds - 1) * 4 < tokens <= rounds * 4
        assert flights.certain_rounds(tokens, config, [flight(1), flight(2)], 1000) == max(rounds - 3, 0)
        assert flights.certain_rounds(tokens, config, [], 8) == min(rounds, 8)
    assert flights.certain_rounds(-3, config, [], 8) == 1


def with_lists(stage, config, place=lambda x: x):
    """The stage, its lists filled for `config` where it has any."""
    budget = 0 if config.view is None else config.view.budget
    if budget:
        layers, _, rows, kv_heads = stage.target.kv.shape[:4]
        entries = torch.arange(budget, dtype=torch.int32).expand(layers, rows, kv_heads, budget).contiguous()
        stage.lists[budget] = place(entries)
        stage.state.put_window(0, config.view.recent) if place is not to_meta else None
    return stage


CONFIGS = [SpecConfig.parse(text) for text in ("ngram/chain3", "self:snapkv8+4/chain3", "self:snapkv8+4/3,2,1")]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_round_asks_the_host_nothing(pair, config, law):
    stage, program = with_lists(stage_of(pair, LAWS[law]), config), Program.of(config, torch.device("cpu"))
    stage.state.live.fill_(True)
    stage.state.committed.fill_(11)
    with torch.inference_mode(), Asked() as asked:
        for _ in range(3):
            play(stage, program)
    assert not asked.found
    assert int(stage.state.committed.min()) > 11, "the rounds advanced every row"
    assert stage.state.entries[0, :, DRAFTED].tolist() == [config.num_nodes] * 3, "texts of ones repeat"
    assert not stage.state.matching.any()


@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_round_needs_no_value_and_mixes_no_devices(pair, config, law, kernels):
    attention._chain.cache_clear()
    tree_layout.layout_of.cache_clear()
    with torch.inference_mode():
        ops = NoKernels(no_kernels()) if kernels else Timeless()
        stage = with_lists(stage_of(pair, LAWS[law], place=to_meta, ops=ops), config, to_meta)
        if kernels:
            made, seed = stage.deciding, to_meta(torch.zeros(1, dtype=torch.int64))
            stage.deciding = KernelDeciding(made.processor, made.verifier, made.noise, seed, ops.kernels)
        play(stage, Program.of(config, torch.device("meta")))


def test_lists_lie_in_one_buffer_per_budget_that_never_moves(device):
    opened = device.open(workload((9, 40), 20, stop_at_eos=False))
    places = set()
    for config in ("self:snapkv8+4/chain2", "self:snapkv8+3r5/chain2", "self:snapkv8+4r2/2,1"):
        sd.record(opened.steps(config))
        (buffer,) = opened._session._stage.lists.values()
        assert buffer.nbytes == list_bytes(device.pair.target, 2, 8)
        places.add(buffer.data_ptr())
    assert len(places) == 1
    sd.record(opened.steps("self:snapkv6+4/chain2"))
    assert set(opened._session._stage.lists) == {8, 6}


@pytest.mark.parametrize("of", [(SnapKv, "_choose", ["self:snapkv8+4r6/chain2"]),
                                (ModelDrafter, "catch_up", ["self:4+8/chain2", "model:4+8/chain2"])], ids=["lists", "model"])
def test_what_the_host_did_for_drafts_is_drafting_once_and_no_waiting(pair, of, monkeypatch):
    """A clock that only this work moves: the round behind it carries that time as drafting, and nowhere else."""
    room, name, order = of
    now, asks = [1], iter(range(1000))
    original = getattr(room, name)

    def work(self, *given):
        now[0] += 1_000_000
        return original(self, *given)

    monkeypatch.setattr(room, name, work)
    opened = sd.Engine(pair, "sdpa", rounds="eager").open(workload((9, 40), 80, stop_at_eos=False))
    session = opened._session
    session._now, session._ops.now = (lambda: now[0]), (lambda: now[0])
    run = sd.record(opened.steps(lambda *_: order[next(asks) // 5 % len(order)]))
    charged = [step for step in run.rounds if step.wall_s]
    assert charged
    assert all(step.wall_s == step.draft_s == pytest.approx(1e-3) for step in charged)
