"""Profiles: what is measured beside what, from where, in which order, and what happens to a wrong token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

import builders
import letters
import made_policies
import specdec_lab as sd
from specdec_lab.bench import judges
from specdec_lab.bench.demo_run import DemoResult, NotADemoFolder, fresh_folder
from specdec_lab.bench.doctor import MISSING, NOTE, OK, examine, ipykernel_advice
from specdec_lab.bench.judges import BlockTimes, Mismatch, TokenGate, repeated_share
from specdec_lab.bench.overhead import OutputsDiffer, _measure, overhead
from specdec_lab.bench.profile import BASELINE_ADDED, Profile, check_configs, limited, profile
from specdec_lab.bench.sessions import Sessions
from specdec_lab.engine.cache import CacheTooLarge
from specdec_lab.records import Cell, SpecConfig, UnsupportedConfig
from specdec_lab.sensors import Absent, Reading
from specdec_lab.stream import Stream, record
from specdec_lab.summary import Comparison, PairedRatio

CONFIGS = ("off", "self:4+28/chain3", "model:4+20/chain2", "ngram/chain4")


@pytest.fixture(scope="module")
def engine():
    return sd.Engine(letters.pair())


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """One round is too short to tell a disturbed block: tests that are not about them have none."""
    monkeypatch.setattr(judges, "DISTURBED", float("inf"))


def kv_bytes_per_token(engine):
    return engine.pair.target.shape.kv_bytes_per_token(4)


def drained(engine, cells=("2x30",), configs=CONFIGS, **options):
    options = {"workload": letters.random_text(), "blocks": 3, "block_s": 1e-9, **options}
    blocks = profile(engine, cells, configs, **options)
    return blocks, [record(stream) for stream in blocks]


def test_every_block_holds_every_configuration_once_and_says_which_block_it_is(engine):
    _, runs = drained(engine, cells=("1x20", "2x33"))
    places = [(str(run.header.cell), run.header.block, run.header.config) for run in runs]
    assert sorted(places) == sorted((c, b, k) for c in ("1x20", "2x33") for b in range(3) for k in CONFIGS)
    assert [cell for cell, _, _ in places] == ["1x20"] * 12 + ["2x33"] * 12


def test_the_order_is_shuffled_and_the_next_block_runs_it_backwards(engine):
    _, runs = drained(engine, blocks=4)
    orders = [[run.header.config for run in runs[i : i + 4]] for i in range(0, 16, 4)]
    assert orders[1] == orders[0][::-1]
    assert orders[3] == orders[2][::-1]
    assert orders[0] != orders[2] or list(CONFIGS) != orders[0]


def test_plain_decoding_is_always_measured_and_the_reader_is_told(engine):
    blocks, runs = drained(engine, configs=("ngram/chain2",), blocks=1)
    assert {run.header.config for run in runs} == {"off", "ngram/chain2"}
    assert blocks.notices[0] == BASELINE_ADDED
    assert drained(engine, configs=("off",), blocks=1)[0].notices[0] != BASELINE_ADDED


def test_prompts_are_read_once_and_no_scored_run_holds_a_prefill(engine):
    blocks, runs = drained(engine)
    assert all(step.kind == "round" for run in runs for step in run.steps)
    assert all(step.context_tokens[0] == 29 for run in runs for step in run.steps[:1])
    assert "2x30: prompts read in" in blocks.notices[0]


def test_a_block_ends_after_its_seconds_of_engine_time():
    steps = [builders.prefill_step()] + [builders.round_step(index=i) for i in range(1, 9)]  # 1 s each
    for seconds, rounds in ((0.5, 1), (1.0, 1), (2.5, 3), (100.0, 8)):
        run = record(limited(Stream(builders.header(), iter(steps)), seconds))
        assert len(run.rounds) == rounds
    assert len(record(limited(Stream(builders.header(), iter(steps)), 1.0, min_rounds=4)).rounds) == 4


def test_ending_a_block_closes_the_engine_behind_it():
    closed = []

    def endless():
        try:
            while True:
                yield builders.round_step()
        finally:
            closed.append(True)

    assert len(record(limited(Stream(builders.header(), endless()), 2.0)).steps) == 2
    assert closed == [True]


def test_runs_of_one_profile_are_comparable_block_by_block(engine):
    _, runs = drained(engine)
    rows = {c.config: c for c in sd.compare(runs)}
    assert set(rows) == set(CONFIGS)
    assert all(rows[config].speedup.num_blocks == 3 for config in CONFIGS[1:])


def test_greedy_configurations_continue_as_plain_decoding_does(engine):
    blocks, runs = drained(engine, block_s=0.01)
    assert blocks.mismatches == {}
    plain = max((run.tokens() for run in runs if run.header.config == "off"), key=lambda rows: len(rows[0]))
    for run in runs:
        assert all(a == b for mine, right in zip(run.tokens(), plain, strict=True) for a, b in zip(mine, right, strict=False))


def _lying(session, config_that_lies):
    """The session, but one configuration emits another second token in row 1."""

    class Lying:
        def steps(self, config, *, block=None):
            stream = session.steps(config, block=block)
            return Stream(stream.header, map(self.bent if str(config) == config_that_lies else lambda step: step, stream))

        @staticmethod
        def bent(step):
            if step.context_tokens[1] != 29 or not step.tokens[1]:
                return step
            first, *rest = step.tokens[1]
            return replace(step, tokens=(step.tokens[0], ((first + 1) % 61, *rest)))

    return Lying()


def test_a_wrong_token_is_named_with_its_place_and_its_speed_is_withheld(engine, monkeypatch):
    honest = Sessions.open
    monkeypatch.setattr(Sessions, "open", lambda self, cell: _lying(honest(self, cell), "ngram/chain4"))
    blocks, runs = drained(engine)
    (found,) = blocks.mismatches.values()
    assert (found.cell, found.config, found.row, found.place) == (Cell(2, 30), "ngram/chain4", 1, 0)
    assert "row 1 emits token" in str(found)
    assert "its speed means nothing" in str(found)
    assert {c.config for c in blocks.comparisons(runs)} == {*CONFIGS} - {"ngram/chain4"}
    labelled = {run.header.config for run in runs if "other tokens than plain decoding" in run.header.labels}
    assert labelled == {"ngram/chain4"}


def test_the_gate_compares_what_both_emitted_and_nothing_beyond():
    gate, ours = TokenGate(Cell(2, 8)), SpecConfig.parse("ngram/chain2")
    gate.take(ours, [[1, 2, 3, 4], [5]])
    assert gate.find(ours) is None
    gate.take(SpecConfig.off(), [[1, 2], [5, 6, 7]])
    assert gate.find(ours) is None
    gate.take(SpecConfig.off(), [[1, 2, 9], [5]])
    assert gate.find(ours) == Mismatch(Cell(2, 8), "ngram/chain2", 0, 2, 3, 9)


def test_a_block_that_took_much_longer_for_the_same_rounds_is_disturbed():
    times, off, ours = BlockTimes(), SpecConfig.off(), SpecConfig.parse("ngram/chain2")
    for block, walls in enumerate(([1.0, 1.0, 2.0, 1.0], [1.25, 1.25], [1.0, 1.0, 2.5], [1.0])):
        times.add(off, block, walls)
    assert times.slowdowns() == {0: 1.0, 1: 1.25, 2: 1.125, 3: 1.0}
    times.add(ours, 0, [1.0, 1.0])
    times.add(ours, 1, [4.0])
    assert times.slowdowns()[1] == 4.0


def test_disturbed_blocks_are_measured_again_and_left_out(engine, monkeypatch):
    monkeypatch.setattr(BlockTimes, "disturbed", lambda self: frozenset({1}))
    monkeypatch.setattr(BlockTimes, "slowdowns", lambda self: {1: 7.0})
    blocks, runs = drained(engine, configs=("off", "ngram/chain2"), blocks=3)
    assert {run.header.block for run in runs} == {0, 1, 2, 3}
    assert [c.speedup.num_blocks for c in blocks.comparisons(runs) if c.speedup] == [3]
    assert any("1 of 4 blocks were disturbed and are left out; the same rounds took up to 7.0" in n for n in blocks.notices)


def test_a_machine_that_is_always_busy_ends_a_profile_and_is_named(engine, monkeypatch):
    monkeypatch.setattr(BlockTimes, "disturbed", lambda self: frozenset(range(1, 9)))
    monkeypatch.setattr(BlockTimes, "slowdowns", lambda self: {1: 7.0})
    blocks, runs = drained(engine, configs=("off", "ngram/chain2"), blocks=3)
    assert {run.header.block for run in runs} == set(range(6))
    assert [c.speedup.num_blocks for c in blocks.comparisons(runs) if c.speedup] == [6]
    assert blocks.busy == {Cell(2, 30)}
    assert any("busy throughout" in notice and "quote no number of this cell" in notice for notice in blocks.notices)


def test_a_reader_is_told_when_the_text_loops(engine, monkeypatch):
    loop = [1, 2, 3, 4, 5, 6, 7, 8] * 4  # of 25 runs of 8 tokens, 8 are new
    assert repeated_share([loop]) == pytest.approx(1 - 8 / 25)
    assert repeated_share([list(range(40)), list(range(40))]) == 0
    assert repeated_share([[1, 2, 3]]) == 0
    monkeypatch.setattr(TokenGate, "plain", [loop])
    assert "68% of the runs of 8 tokens that plain decoding wrote repeat" in drained(engine)[0].notices[-1]


@pytest.mark.parametrize(("sampling", "is_gated"), [
    ({}, True), ({"temperature": 0.7}, False), ({"temperature": 0.7, "verifier": "coupled"}, True),
])
def test_tokens_are_compared_wherever_they_must_be_equal(engine, sampling, is_gated):
    blocks = profile(engine, ["1x8"], ["off"], workload=letters.random_text(), sampling=sampling)
    assert blocks._is_gated is is_gated


def test_a_cell_that_does_not_fit_is_skipped_with_the_bytes_and_the_others_go_on(engine):
    blocks, runs = drained(engine, cells=("90000000x1000", "1x20", "1x5000"), configs=("off",), blocks=1)
    assert [str(run.header.cell) for run in runs] == ["1x20"]
    assert list(map(str, blocks.skipped)) == ["90000000x1000", "1x5000"]
    assert f"{90_000_000_000 * kv_bytes_per_token(engine):,} bytes" in blocks.skipped[Cell(90000000, 1000)]
    assert "1024 positions" in blocks.skipped[Cell(1, 5000)]


def test_what_the_engine_cannot_run_is_said_before_anything_is_measured(engine):
    with pytest.raises(UnsupportedConfig, match="SnapKV chooses among the target's own keys"):
        profile(engine, ["1x20"], ["off", "model:snapkv64+8/2,2"], workload=letters.random_text())
    without_draft = sd.Engine(replace(letters.pair(), draft=None))
    with pytest.raises(UnsupportedConfig, match="no draft model is loaded"):
        check_configs(without_draft, [SpecConfig.parse("model:4+28/chain2")])


@pytest.mark.parametrize(("options", "words"), [
    ({"cells": ()}, "at least one cell"), ({"blocks": 0}, "at least 1 block"), ({"block_s": 0.0}, "more than 0 s"),
    ({"cells": ["1x5000"]}, "none of these cells can run. 1x5000 skipped: LlamaForCausalLM has 1024"),
    ({"workload": "novels"}, "workload must be one of prose, code, revision, conversation, needle or random, got 'novels'"),
])
def test_a_profile_of_nothing_is_refused(engine, options, words):
    with pytest.raises(ValueError, match=words):
        profile(engine, **{"cells": ["1x20"], "configs": ["off"], "workload": letters.random_text(), **options})


def test_shipped_text_needs_a_tokenizer(engine):
    with pytest.raises(ValueError, match="tiny was loaded without a tokenizer"):
        profile(sd.Engine(replace(letters.pair(), tokenizer=None)), ["1x20"], ["off"])


def test_a_session_is_kept_and_gives_way_to_one_that_does_not_fit_beside_it(engine, monkeypatch):
    sessions = Sessions(engine, letters.random_text())
    first = sessions.open(Cell(1, 20))
    assert sessions.open(Cell(1, 20)) is first
    honest, refusals = sd.Engine.open, []

    def full(self, workload):
        if sessions._open:
            refusals.append(workload.cell)
            raise CacheTooLarge("no room")
        return honest(self, workload)

    monkeypatch.setattr(sd.Engine, "open", full)
    sessions.open(Cell(2, 20))
    assert refusals == [Cell(2, 20)]
    assert list(sessions._open) == [Cell(2, 20)]


def test_why_a_cell_cannot_run_is_said_without_allocating_and_always_in_the_same_words(engine):
    sessions = Sessions(engine, letters.random_text())
    assert sessions.why_not(Cell(2, 20)) is None
    assert sessions.why_not(Cell(1, 5000)) == "LlamaForCausalLM has 1024 positions, the cell asks for 5000 tokens"
    needed = f"its KV needs {10**12 * kv_bytes_per_token(engine):,} bytes, more than cpu has free"
    assert sessions.why_not(Cell(10**9, 1000)) == sessions.why_not(Cell(10**9, 1000)) == needed
    assert sessions._open == {}


def test_overhead_is_a_ratio_with_an_interval_and_a_header():
    said = []
    configs = [SpecConfig.off(), SpecConfig.parse("self:4+28/chain2")]
    report = overhead(letters.pair(), Cell(2, 20), configs, rounds=4, blocks=3, workload=letters.random_text(), say=said.append)
    data = report.to_dict()
    assert data["schema"] == "specdec_lab.overhead/1"
    assert [row["config"] for row in data["results"]] == ["off", "self:4+28/chain2"]
    assert all(row["ratio"]["low"] <= row["ratio"]["mean"] <= row["ratio"]["high"] for row in data["results"])
    assert all(row["ratio"]["num_blocks"] == 3 for row in data["results"])
    assert {"device", "versions", "commit", "created"} <= data.keys()
    assert said == [str(result) for result in report.results]


def test_overhead_alternates_instrumented_and_bare_runs_and_takes_medians():
    order = []

    class Fixed:
        def __init__(self, name, scale):
            self.name, self.scale = name, scale

        def steps(self, config):
            order.append(self.name)
            return Stream(builders.header(), (builders.off_step(scale=self.scale, index=i) for i in range(9)))

    result = _measure({True: Fixed("with", 1.25), False: Fixed("bare", 1.0)}, Cell(2, 512), SpecConfig.off(), 4, 2)
    assert order[2:] == ["with", "bare", "bare", "with"] * 2
    assert result.median_ratio == pytest.approx(1.25)
    assert result.ratio.mean == pytest.approx(1.25)


def test_overhead_of_rounds_that_differ_is_not_quoted():
    class Fixed:
        def __init__(self, accepted):
            self.accepted = accepted

        def steps(self, config):
            return Stream(builders.header(), (builders.round_step(self.accepted, index=i) for i in range(9)))

    with pytest.raises(OutputsDiffer, match="emitted different tokens"):
        _measure({True: Fixed((1, 1)), False: Fixed((1, 2))}, Cell(2, 512), SpecConfig.parse("self:4+60/chain3"), 4, 2)


def _reading(**present):
    absent = Absent("no NVML here")
    fields = dict.fromkeys(
        ("power_w", "energy_j", "sm_mhz", "mem_mhz", "memory_used_bytes", "temperature_c", "clock_events", "cpu_mhz"), absent
    )
    return Reading(**{"at_s": 0.0, "load_average": 0.0, **fields, **present})


def test_the_doctor_says_what_works_and_why_the_rest_does_not(engine):
    diagnosis = examine(engine, reading=_reading)
    found = {f.topic: f for f in diagnosis.findings}
    assert found["back end"].what == f"attention by {engine.backend.name}"
    assert "no GPU sensors: no NVML here" in found["GPU"].what
    assert found["load"].state == OK
    assert "GB/s" in found["ceilings"].what
    assert "new lines go here" in found["database"].what
    assert diagnosis.to_dict()["facts"]["ceilings"]["read_bytes_per_s"] > 0
    assert f"attention by {engine.backend.name}" in diagnosis.headline
    assert all(f.topic in str(diagnosis) for f in diagnosis.findings)
    assert diagnosis._repr_html_().count("<tr>") == len(diagnosis.findings)
    assert "<style" not in diagnosis._repr_html_()


def test_the_doctor_needs_no_model_and_says_which_is_missing():
    found = {f.topic: f for f in examine(None, "the shipped pair is missing", reading=_reading).findings}
    assert (found["model"].state, found["model"].what) == (MISSING, "the shipped pair is missing")


def test_the_doctor_warns_of_a_busy_machine_and_a_slowed_gpu(engine):
    busy = _reading(load_average=99.0, power_w=300.0, sm_mhz=1200, temperature_c=88, clock_events=("power cap", "gpu idle"))
    found = {f.topic: f for f in examine(engine, reading=lambda: busy).findings}
    assert found["load"].state == NOTE
    assert "disturbs every timing" in found["load"].advice
    assert found["GPU"].what == "300 W, 1200 MHz, 88 C; slowed by power cap"


KERNELS = [("7.0.1", MISSING), ("7.4.0", OK), ("6.31.0", NOTE), ("7.3.0", OK), ("6.20", NOTE)]


@pytest.mark.parametrize(("version", "state"), KERNELS)
def test_the_doctor_knows_the_kernels(version, state):
    assert ipykernel_advice(version)[0] == state


def test_a_profile_is_an_iterable_of_streams(engine):
    blocks = profile(engine, ["1x20"], ["off"], workload=letters.random_text(), blocks=1)
    assert isinstance(blocks, Profile)
    assert all(a is not b for a, b in pairwise([*blocks]))


def test_a_cell_for_which_memory_ran_out_meanwhile_is_skipped_too(engine, monkeypatch):
    blocks = profile(engine, ["2x20", "1x20"], ["off"], workload=letters.random_text(), blocks=1, block_s=1e-9)
    honest = sd.Engine.open

    def full(self, workload):
        if workload.batch == 2:
            raise CacheTooLarge("123 bytes are free")
        return honest(self, workload)

    monkeypatch.setattr(sd.Engine, "open", full)
    assert [str(record(stream).header.cell) for stream in blocks] == ["1x20"]
    assert blocks.skipped == {Cell(2, 20): "123 bytes are free"}


def test_the_demo_claims_nothing_where_the_machine_was_busy():
    def place(cell, speedup, low):
        ratio = PairedRatio(speedup, low, speedup + 0.1, 4)
        header = {"workload": "prose", "cell": cell, "config": "ngram/chain2"}
        summary = sd.summarize(builders.run_of(builders.round_step((1, 2), config="ngram/chain2"), **header))
        return Comparison(Cell.parse(cell), "prose", "ngram/chain2", summary, ratio, 1.0, 2.0, "a verdict")

    found = (place("2x512", 1.5, 1.4), place("2x600", 1.1, 0.9), place("2x700", 9.0, 8.0))
    busy = frozenset({(Cell(2, 700), "prose")})
    result = DemoResult(("a machine",), found, (), (), busy, made_policies.LOOKUP, {}, 1.0)
    assert result.outcome() == (
        "Speculation paid in 1 of 3 places.\n  won in 2x512 prose: ngram/chain2 1.50x (1.40 to 1.60) plain decoding\n"
        "  not in 2x600 prose: the best was ngram/chain2, a verdict\n"
        "  unknown in 2x700 prose: other work kept this machine busy"
    )


def test_the_demo_replaces_only_what_a_demo_wrote(tmp_path):
    fresh_folder(tmp_path / "demo")
    (tmp_path / "demo" / "policy.json").write_text("old")
    paths = fresh_folder(tmp_path / "demo")
    assert not paths["policy"].exists()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    with pytest.raises(NotADemoFolder, match=r"holds mine.txt, which the demo did not write"):
        fresh_folder(tmp_path / "demo")
    (tmp_path / "other" / "tuning_db").mkdir(parents=True)
    with pytest.raises(NotADemoFolder, match="holds tuning_db, which the demo did not write"):
        fresh_folder(tmp_path / "other")
    assert (tmp_path / "other" / "tuning_db").exists()
