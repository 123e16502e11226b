"""The race: who may be timed, in which order, what a row holds, and what survives a peer that dies or an interrupt."""

from __future__ import annotations

import json

import pytest

import letters
import racers
import specdec_lab as sd
from racers import CELL, RIGHT, Fake, Prompts, raced
from specdec_lab.bench.race import report
from specdec_lab.bench.race.gate import EQUAL, NEAR_TIE, Gate
from specdec_lab.bench.race.report import RaceReport, rows_to_save
from specdec_lab.bench.race.runner import Race
from specdec_lab.records import Cell

WRONG = [[1, 2, 3, 4], [5, 6, 9, 8]]
QUICK_S = 8 / 123456  # a speed that no other number of a report looks like
HEADER = {
    "run": "r", "created": "2026-01-01T00:00:00+00:00", "device": "TEST", "threads": 1, "versions": {"torch": "2"},
    "commit": "c" * 40, "workload": "prose", "new_tokens": 4, "blocks": 3, "seed": 0,
}  # fmt: skip


def far(prompt, tokens):
    """A judge to whom every token that is not the right one is far below the best."""
    right = {1: RIGHT[0], 5: RIGHT[1]}[tokens[0]]
    return [0.0 if got == best else 0.5 for got, best in zip(tokens, right, strict=True)]


def near(prompt, tokens):
    """A judge to whom all tokens are practically the best."""
    return [0.0 if index % 2 else NEAR_TIE / 4 for index in range(len(tokens))]


def row_of(results, name):
    return next(row for row in results[0].rows if row.peer == name)


def texts_of(results):
    """Everything that a reader may see of these results."""
    made = RaceReport(HEADER, tuple(results))
    return str(made), made.markdown(), json.dumps(made.to_dict()), json.dumps(rows_to_save(HEADER, results[0]))


# Order.


def test_prompts_are_read_once_and_checked_before_anything_is_timed():
    results, log = raced(Fake("a/plain"), Fake("b/plain"))
    assert log[:6] == [(name, what) for name in ("ours/off", "a/plain", "b/plain") for what in ("prepare", "decode")]
    assert sum(what == "prepare" for _, what in log) == 3
    assert all(len(row.tokens_per_s) == 3 for row in results[0].rows)  # the decode that was checked is not a block


def test_blocks_are_shuffled_and_every_second_one_runs_backwards():
    _, log = raced(*(Fake(f"{c}/plain") for c in "abcdef"), blocks=8)
    order = [name for name, what in log[14:] if what == "decode"]
    blocks = [order[i : i + 7] for i in range(0, len(order), 7)]
    assert len(blocks) == 8
    assert all(sorted(block) == sorted(blocks[0]) for block in blocks)
    assert all(second == first[::-1] for first, second in zip(blocks[::2], blocks[1::2], strict=True))
    assert len({tuple(block) for block in blocks}) > 2
    again, other = (raced(*(Fake(f"{c}/plain") for c in "abcdef"), blocks=8, seed=seed)[1] for seed in (0, 1))
    assert [name for name, what in again[14:] if what == "decode"] == order
    assert [name for name, what in other[14:] if what == "decode"] != order


def test_a_peer_that_disturbs_others_is_loaded_and_measured_after_them_beside_ours_and_leaves_before_the_next_cell():
    late = Fake("late/plain", goes_last=True)
    cells = (CELL, Cell(2, 4))
    results, log = raced(late, Fake("a/plain"), Fake("ours/x"), blocks=2, cells=cells)
    first = log.index(("late/plain", "prepare"))
    assert ("a/plain", "decode") not in log[first : log.index(("late/plain", "close"))]
    timed = [name for name, what in log[first + 2 : log.index(("late/plain", "close"))] if what == "decode"]
    assert [timed[i : i + 3][-1] for i in range(0, len(timed), 3)] == ["late/plain", "late/plain"]
    assert {*timed} == {"ours/off", "ours/x", "late/plain"}
    assert log.index(("late/plain", "close")) < [i for i, entry in enumerate(log) if entry == ("ours/off", "prepare")][1]
    rows = {row.peer: row for row in results[0].rows}
    assert rows["ours/off"].used_blocks == (0, 1, 2, 3)
    assert (rows["a/plain"].used_blocks, rows["late/plain"].used_blocks) == ((0, 1), (2, 3))
    assert {ratio.num_blocks for ratio in rows["late/plain"].ratios.values()} == {2}


def test_the_first_peer_is_plain_decoding_and_counts_are_positive():
    with pytest.raises(ValueError, match="the first peer of a race is ours/off, got a/plain"):
        Race([Fake("a/plain")], Prompts(), near)
    with pytest.raises(ValueError, match="at least 1 block"):
        Race([Fake("ours/off")], Prompts(), near, blocks=0)


# The gate.


def test_a_peer_with_a_wrong_token_is_red_and_no_speed_of_it_is_shown_anywhere():
    results, log = raced(Fake("a/plain", tokens=[WRONG], seconds=(QUICK_S,)), judge=far)
    row = row_of(results, "a/plain")
    assert (row.state, row.verdict["row"], row.verdict["place"]) == ("red", 1, 2)
    assert "row 1 emits token 9 at new token 2, plain decoding 7" in row.words
    assert "5.0e-01 below the best logit in float64" in row.words
    assert results[0].is_red
    assert log.count(("a/plain", "decode")) == 1  # it is not even timed
    for text in texts_of(results):
        assert "123456" not in text.replace(",", "")
        assert "emits token 9" in text
    assert row.to_dict()["tokens_per_s"] is None
    assert "| a/plain |" not in RaceReport(HEADER, tuple(results)).markdown()
    results, _ = raced(Fake("a/plain", seconds=(QUICK_S,)))
    assert all("123456" in text.replace(",", "") for text in texts_of(results))  # where the tokens are right it is shown


def test_a_near_tie_is_timed_and_labelled_with_its_place_and_gap():
    results, _ = raced(Fake("a/plain", tokens=[WRONG], seconds=(0.5,)), judge=near)
    row = row_of(results, "a/plain")
    assert row.state == "near-tie"
    assert row.words == "near-tie at token 2, gap 0.0e+00"
    assert row.speed.median == 16
    assert not results[0].is_red
    assert "near-tie at token 2" in texts_of(results)[0]


def test_a_token_that_is_wrong_after_a_near_tie_is_red():
    def judge(prompt, tokens):
        return [0.0, 0.0, NEAR_TIE / 2, 0.3] if tokens == WRONG[1] else [0.0] * 4

    verdict = Gate([[1], [2]], RIGHT, judge).judge(WRONG, is_ours=False)
    assert verdict.is_red
    assert "its token 3 is 3.0e-01 below" in verdict.words
    assert verdict.gap == 0.3


def test_the_gap_of_a_near_tie_is_that_between_the_two_tokens():
    def judge(prompt, tokens):
        return [0.0, 0.0, 8e-4 if tokens == WRONG[1] else 1e-4, 0.0]

    verdict = Gate([[1], [2]], RIGHT, judge).judge(WRONG, is_ours=False)
    assert (verdict.state, verdict.row, verdict.place) == ("near-tie", 1, 2)
    assert verdict.gap == pytest.approx(7e-4)


def test_a_gap_that_is_no_number_is_red():
    gate = Gate([[1], [2]], RIGHT, lambda prompt, tokens: [float("nan")] * 4)
    assert gate.judge(WRONG, is_ours=False).is_red


def test_our_own_configurations_get_no_tolerance():
    results, _ = raced(Fake("ours/ngram/chain6", tokens=[WRONG]), judge=racers.must_not_be_asked)
    row = row_of(results, "ours/ngram/chain6")
    assert row.state == "red"
    assert "must give the very tokens of plain decoding" in row.words


def test_when_the_judge_finds_plain_decoding_wrong_it_is_ours_that_has_no_speed():
    def judge(prompt, tokens):
        return [0.0, 0.0, 0.4, 0.0] if tokens == RIGHT[1] else [0.0] * 4

    results, _ = raced(Fake("a/plain", tokens=[WRONG]), Fake("ours/x"), judge=judge)
    assert {row.peer: row.state for row in results[0].rows} == {"ours/off": "red", "ours/x": "red", "a/plain": "near-tie"}
    assert results[0].best is None
    assert row_of(results, "a/plain").ratios == {}
    assert "our plain decoding is 4.0e-01 below the best logit" in row_of(results, "ours/off").words


@pytest.mark.parametrize("tokens", [[[1, 2, 3], [5, 6, 7]], [RIGHT[0]], [RIGHT[0], [*RIGHT[1], 9]]])
def test_rows_of_another_number_or_length_are_red(tokens):
    verdict = Gate([[1], [2]], RIGHT, near).judge(tokens, is_ours=False)
    assert verdict.is_red
    assert "were asked for" in verdict.words


def test_a_peer_that_changes_its_tokens_later_is_red_and_loses_its_speed():
    results, log = raced(Fake("a/plain", tokens=[RIGHT, RIGHT, WRONG], seconds=(QUICK_S,)), judge=far)
    row = row_of(results, "a/plain")
    assert row.state == "red"
    assert not row.is_timed
    assert row.tokens_per_s == {}
    assert log.count(("a/plain", "decode")) == 3
    assert all("123456" not in text.replace(",", "") for text in texts_of(results))


def test_a_near_tie_does_not_hide_a_later_red():
    def judge(prompt, tokens):
        return [0.0] * 4 if tokens in (WRONG[1], RIGHT[1]) else [0.0, 0.9, 0.0, 0.0]

    results, _ = raced(Fake("a/plain", tokens=[WRONG, [RIGHT[0], [5, 1, 1, 1]]]), judge=judge)
    assert row_of(results, "a/plain").state == "red"


def test_equal_tokens_are_judged_once():
    asked = []
    gate = Gate([[1], [2]], RIGHT, lambda prompt, tokens: asked.append(tokens) or [0.0] * 4)
    for _ in range(5):
        gate.judge(WRONG, is_ours=False)
    assert gate.judge(RIGHT, is_ours=False) == EQUAL
    assert len(asked) == 2  # the peer's row and ours


# What a row holds.


def test_speeds_and_ratios_are_of_the_same_blocks():
    plain = Fake("ours/off", seconds=(9, 1.0, 1.1, 0.9))
    best = Fake("ours/x", seconds=(9, 0.5, 0.55, 0.45), extra={"tokens_per_round": 3.0, "floor_s": 0.1})
    results, _ = raced(Fake("a/plain", seconds=(9, 2.0, 2.2, 1.8)), best, plain=plain)
    row = row_of(results, "a/plain")
    assert row.speed.median == 4.0
    assert sorted(row.tokens_per_s.values()) == pytest.approx([8 / 2.2, 4.0, 8 / 1.8])
    assert {name: ratio.mean for name, ratio in row.ratios.items()} == pytest.approx({"ours/off": 2, "ours/x": 4})
    assert row.ratios["ours/off"].low == pytest.approx(2)
    assert results[0].best == "ours/x"
    mine = row_of(results, "ours/x")
    assert mine.eta == pytest.approx(0.1 / 0.5)
    assert mine.tokens_per_round == 3.0
    assert list(mine.ratios) == ["ours/off"]
    assert list(row_of(results, "ours/off").ratios) == ["ours/x"]


def test_a_line_of_the_database_holds_what_its_numbers_depend_on():
    results, _ = raced(Fake("a/plain"), prompts=Prompts(labels=("repeated prompts",)))
    lines = json.loads(json.dumps(rows_to_save(HEADER, results[0])))
    assert [line["peer"] for line in lines] == ["ours/off", "a/plain"]
    for line in lines:
        assert line["schema"] == "specdec_lab.race/1"
        assert {*HEADER, "cell", "state", "gate", "settings", "prefill_s", "eta", "ratios", "load", "busy", "labels"} <= {*line}
        assert line["tokens_per_s"]["blocks"] == {"0": 8.0, "1": 8.0, "2": 8.0}
        assert line["tokens_per_s"]["used_blocks"] == [0, 1, 2]
        assert line["labels"] == ["repeated prompts"]
        assert line["prefill_s"] == 0.5
        assert line["gate"]["state"] == "equal"
        assert {*line["load"]} == {"before", "after"}
    assert lines[1]["ratios"]["ours/off"]["num_blocks"] == 3
    assert all("repeated prompts" in text for text in texts_of(results))


def test_one_block_gives_a_ratio_without_an_interval_that_json_can_hold():
    results, _ = raced(Fake("a/plain"), blocks=1)
    ratio = rows_to_save(HEADER, results[0])[1]["ratios"]["ours/off"]
    assert (ratio["low"], ratio["high"]) == (0.0, None)
    assert "1.00x  " in texts_of(results)[0]


def test_the_header_says_machine_versions_ceilings_and_how_threads_wait(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    made = report.header_of(sd.Engine(letters.pair()), workload="prose", new_tokens=4, blocks=3, seed=0)
    assert {"run", "created", "device", "base", "model", "draft", "threads", "machine", "versions", "commit"} <= {*made}
    assert made["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert made["ceilings"]["read_bytes_per_s"] > 0
    json.dumps(made, allow_nan=False)


def test_peers_that_cannot_run_a_cell_are_listed_with_the_reason():
    results, log = raced(Fake("a/draft", reason="a/draft takes one row"))
    assert row_of(results, "a/draft").state == "skipped"
    assert ("a/draft", "prepare") not in log
    for text in texts_of(results):
        assert "a/draft takes one row" in text


def test_a_cell_that_cannot_run_is_said_and_the_others_go_on():
    results, _ = raced(cells=(Cell(9, 9), CELL), prompts=Prompts({Cell(9, 9): "no room"}))
    assert [(result.cell, result.skipped) for result in results] == [(Cell(9, 9), "no room"), (CELL, None)]
    assert rows_to_save(HEADER, results[0])[0]["reason"] == "no room"
    assert "9x9  skipped: no room" in str(RaceReport(HEADER, tuple(results)))


def test_text_that_loops_is_said():
    loop = [[1, 2] * 10, [3, 4] * 10]
    results, _ = raced(plain=Fake("ours/off", tokens=[loop]))
    assert "repeat earlier ones" in results[0].notices[0]


# A machine with other work.


def test_disturbed_blocks_are_measured_again_and_left_out():
    results, _ = raced(Fake("a/plain", seconds=(1, 1.0, 3.0, 1.0, 1.1)))
    row = row_of(results, "a/plain")
    assert row.conditions.disturbed_blocks == (1,)
    assert row.used_blocks == (0, 2, 3)
    assert len(row.tokens_per_s) == 4
    assert not row.conditions.is_busy
    assert {ratio.num_blocks for ratio in row.ratios.values()} == {3}


def test_a_peer_that_is_always_disturbed_is_flagged_and_not_measured_for_ever():
    results, _ = raced(Fake("a/plain", seconds=[3.0**i for i in range(20)]))
    row = row_of(results, "a/plain")
    assert len(row.tokens_per_s) == 6
    assert row.conditions.is_busy
    assert "the machine was busy during a/plain" in results[0].notices[0]
    assert "machine busy: do not quote" in texts_of(results)[0]


def test_time_that_the_driving_thread_spent_waiting_flags_a_row():
    results, _ = raced(Fake("a/plain", extra={"cpu_s": 0.5}), Fake("b/plain", extra={"cpu_s": 0.99}))
    assert row_of(results, "a/plain").conditions.waiting_blocks == (0, 1, 2)
    assert row_of(results, "a/plain").conditions.is_busy
    assert not row_of(results, "b/plain").conditions.is_busy
    assert not row_of(results, "ours/off").conditions.is_busy  # tells no CPU time


def test_more_than_the_physical_limit_is_labelled():
    results, _ = raced(plain=Fake("ours/off", extra={"floor_s": 1.5}))
    assert any("came from a cache" in label for label in results[0].rows[0].labels)


# Peers that die, interrupts.


def test_a_peer_that_dies_costs_nobody_a_finished_measurement():
    results, _ = raced(Fake("a/plain", dies_at=3, seconds=(0.5,)), Fake("b/plain"))
    row = row_of(results, "a/plain")
    assert (row.state, row.words) == ("failed", "a/plain died")
    assert len(row.tokens_per_s) == 2
    assert row.speed.median == 16
    assert all(len(other.tokens_per_s) == 3 for other in results[0].rows if other.peer != "a/plain")
    assert "a/plain died" in texts_of(results)[0]


def test_a_peer_that_dies_while_it_is_checked_is_said():
    results, _ = raced(Fake("a/plain", dies_at=0))
    assert row_of(results, "a/plain").state == "failed"
    assert not row_of(results, "a/plain").is_timed
    assert "a/plain, failed: a/plain died" in texts_of(results)[0]


def test_without_plain_decoding_a_cell_is_skipped():
    results, _ = raced(Fake("a/plain"), plain=Fake("ours/off", dies_at=0))
    assert results[0].skipped == "ours/off: ours/off died"


def test_peers_are_closed_whatever_ends_the_race():
    def stop(peer):
        raise KeyboardInterrupt

    log = []
    peers = [Fake("ours/off", log=log), Fake("a/plain", log=log, on_decode=stop)]
    with pytest.raises(KeyboardInterrupt), Race(peers, Prompts(), near, settle_s=0) as race:
        list(race.run([CELL]))
    assert log[-2:] == [("ours/off", "close"), ("a/plain", "close")]
