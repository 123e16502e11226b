from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import header, off_step, prefill_step, round_step, run_of
from specdec_lab.records import PHASES, StepRecord
from specdec_lab.summary import compare, summarize
from specdec_lab.view import palette, rows
from specdec_lab.view.fallback import run_html
from specdec_lab.view.feed import OLDER_ROWS, RECENT_ROWS, ROWS_PER_DELTA, Feed, Packet
from specdec_lab.view.forms import DisplayForm, display_form
from specdec_lab.view.tables import html_table, render_table
from specdec_lab.view.tally import Tally
from specdec_lab.view.widget import SCRIPTS, asset, script

NODE = shutil.which("node")


def fed(steps: Iterator[StepRecord] | list[StepRecord], **fields: object) -> Feed:
    feed, head = Feed("test"), header(**fields)
    for step in steps:
        feed.add(head, step)
    return feed


def rounds(count: int, config: str = "self:4+60/chain3") -> Iterator[StepRecord]:
    for i in range(count):
        yield round_step((i % 4, 3), config=config, index=i, scale=1 + i % 7, kv_floor_s=0.0625)


# Rows.


def test_packed_rows_come_back_unchanged() -> None:
    packed = [rows.row_of(step, i, 0) for i, step in enumerate(rounds(63))]
    assert rows.unpack(rows.pack(packed)) == packed  # dyadic times: exact in float32


def test_the_four_families_sum_to_the_measured_round() -> None:
    step = round_step(kv_floor_s=0.0625)
    assert sum(rows.families(rows.row_of(step, 0, 0))) == step.wall_s * 1e3


def test_a_floor_above_the_measured_attention_is_flagged_and_never_makes_a_round_longer() -> None:
    row = rows.row_of(round_step(kv_floor_s=99.0), 0, 0)
    assert row[rows.FLAGS] == rows.FLOOR_ABOVE_MEASURED
    assert sum(rows.families(row)) == sum(row[rows.FIRST_PHASE : rows.KV_FLOOR])
    assert row[rows.KV_FLOOR] == 99e3  # reported as it was


def test_rows_that_emitted_nothing_do_not_dilute_the_tokens_per_row() -> None:
    row = rows.row_of(round_step((3, 0, 1), frozen=[1], context_tokens=(100, 900, 300)), 0, 0)
    assert row[rows.TOKENS] == (4 + 2) / 2
    assert row[rows.CONTEXT] == 200


@given(st.lists(st.integers(0, 2), min_size=1, max_size=200), st.integers(1, 40))
def test_merging_rows_loses_no_round_and_no_time_and_crosses_no_segment(segments: list[int], limit: int) -> None:
    numbers = sorted(segments)
    whole = [rows.row_of(round_step(scale=1 + i % 5), i, number) for i, number in enumerate(numbers)]
    merged = rows.at_most(whole, limit)
    assert len(merged) <= limit
    if limit >= len(set(numbers)):
        assert sum(row[rows.COUNT] for row in merged) == len(whole)
        for number in set(numbers):
            total = sum(sum(rows.families(r)) * r[rows.COUNT] for r in merged if r[rows.SEGMENT] == number)
            assert total == pytest.approx(sum(sum(rows.families(r)) for r in whole if r[rows.SEGMENT] == number))


# Packets.


def test_deltas_carry_every_round_exactly_once_and_in_order() -> None:
    feed, head, seen = Feed("test"), header(), []
    for i, step in enumerate(rounds(157)):
        feed.add(head, step)
        if i % 11 == 0:
            seen += rows.unpack(feed.delta().rows)
    seen += rows.unpack(feed.delta().rows)
    assert [row[rows.STEP] for row in seen] == list(range(157))


def test_sequence_numbers_have_no_gap_across_deltas_and_keyframes() -> None:
    feed = fed(list(rounds(5)))
    packets = [feed.keyframe({}), feed.delta(), feed.delta({}), feed.keyframe({}), feed.delta()]
    assert [p.head["seq"] for p in packets] == [1, 2, 3, 4, 5]


def test_a_keyframe_shows_every_round_and_keeps_the_newest_exactly() -> None:
    feed = fed(rounds(5000))
    shown = rows.unpack(feed.keyframe({}).rows)
    assert len(shown) <= RECENT_ROWS + OLDER_ROWS
    assert sum(row[rows.COUNT] for row in shown) == 5000
    assert [row[rows.STEP] for row in shown[-RECENT_ROWS:]] == list(range(5000 - RECENT_ROWS, 5000))


def test_a_tick_that_fell_behind_is_merged_instead_of_growing() -> None:
    feed = fed(rounds(300))
    packet = feed.delta()
    assert packet.head["n"] <= ROWS_PER_DELTA
    assert sum(row[rows.COUNT] for row in rows.unpack(packet.rows)) == 300


def test_messages_stay_within_their_budget_on_a_large_profile() -> None:
    feed = Feed("test")
    configs = ("off", "self:4+60/chain3", "model:full/4,2,1", "ngram/chain8")
    for block in range(10):
        for cell in ("2x1024", "2x4096", "2x8192"):
            for config in configs:
                head = header(cell=cell, config=config, block=block, labels=("forced", "KV fits in cache"))
                for step in rounds(40, config) if config != "off" else (off_step(index=i) for i in range(40)):
                    feed.add(head, step)
                assert len(feed.delta({"state": "running", "cell": cell, "config": config}).to_bytes()) <= 4096
    assert len(feed.keyframe({}).to_bytes()) <= 50_000


def test_a_packet_survives_its_bytes_with_rows_at_a_multiple_of_four() -> None:
    packet = fed(rounds(3)).keyframe({"title": "é"})
    data = packet.to_bytes()
    assert Packet.from_bytes(data).rows == packet.rows
    assert (len(data) - len(packet.rows)) % 4 == 0


def test_blocks_turns_and_changes_of_a_policy_each_begin_a_segment() -> None:
    feed = Feed("test")
    first, second = header(block=0), header(block=1)
    for head, step in [
        (first, prefill_step(config="self:4+60/chain3")), (first, round_step()), (first, off_step()), (first, prefill_step()),
        (first, round_step()), (second, round_step()),
    ]:  # fmt: skip
        feed.add(head, step)
    segments = feed.keyframe({}).head["segs"]
    assert [s[2] for s in segments] == ["self:4+60/chain3", "off", "self:4+60/chain3", "self:4+60/chain3"]
    assert [s[3] for s in segments] == [0, 0, 0, 1]
    assert [bool(s[4]) for s in segments] == [True, False, True, False]  # which of them began with a prefill


def test_a_segment_that_only_had_its_prefill_is_sent_with_its_first_round() -> None:
    feed, head = Feed("test"), header()
    feed.add(head, prefill_step())
    assert feed.delta().head["segs"] == []
    feed.add(head, round_step())
    assert len(feed.delta().head["segs"]) == 1


# Totals.


@pytest.mark.parametrize("config", ["self:4+60/chain3", "model:full/4,2,1", "ngram/chain8"])
def test_running_totals_agree_with_the_summary_of_the_run(config: str) -> None:
    steps = [round_step((i % 4, 2, 1), config=config, index=i, scale=1 + i % 3) for i in range(29)]
    steps += [
        round_step((1, 0, 2), config=config, censored=(False, False, True)),
        round_step((1, 0, 0), frozen=[1], config=config),
    ]
    tally = Tally("prose", "3x512", config)
    for step in steps:
        tally.add(step)
    summary = summarize(run_of(*steps))
    assert tally.tokens_per_s == pytest.approx(summary.tokens_per_s)
    assert tally.acceptance.mean_length == pytest.approx(summary.mean_acceptance_length)
    rates = [k / n for k, n in zip(tally.acceptance.accepted_at, tally.acceptance.drafted_at, strict=True)]
    assert rates == pytest.approx(summary.acceptance_rate_per_pos)
    per_round = {name: tally.parts_s[name] / tally.timed_rounds for name in PHASES}
    assert per_round == pytest.approx(dict(summary.parts_s))


def test_one_block_has_a_ratio_and_no_interval_in_the_message() -> None:
    runs = [run_of(off_step(), block=0), run_of(round_step(), block=0)]
    feed = Feed("test")
    for run in runs:
        feed.add(run.header, run.steps[0])
    feed.set_speedups(compare(runs))
    row = next(row for row in feed.keyframe({}).head["table"] if row["config"] != "off")
    assert row["speedup"][1:] == [None, None, 1]
    json.dumps(row, allow_nan=False)


# Tables.


def comparisons(**fields: object) -> tuple:
    runs = []
    for block in range(3):
        scale = 1 + block / 8
        runs.append(run_of(off_step(scale=scale), block=block, **fields))
        runs.append(run_of(round_step(scale=1.5), block=block, **fields))
    return compare(runs)


def test_the_text_table_names_cell_config_speed_interval_and_parts() -> None:
    text = render_table(comparisons(labels=("forced",)))
    first, head = text.splitlines()[:2]
    assert first == "All runs: forced."
    for word in (
        "cell",
        "config",
        "tokens/s",
        "vs plain decoding",
        "draft",
        "linear",
        "attention",
        "commit+accept",
        "host",
        "KV floor",
    ):
        assert word in head
    assert re.search(r"self:4\+60/chain3 .* \d\.\d\dx \[\d\.\d\d, \d\.\d\d\] n=3", text)
    assert "baseline" in text


def test_no_finished_run_is_said_in_words() -> None:
    assert render_table(()) == "no finished run yet"


def test_the_notebook_fallback_has_nothing_that_an_untrusted_notebook_drops() -> None:
    runs = [run_of(off_step(), block=0), run_of(round_step(), block=0)]
    html = run_html("title <script>alert(1)</script>", compare(runs), runs, DisplayForm("static", "no <b>"))
    assert not re.search(r"<\s*(script|style|svg|link|iframe)", html)
    assert "https://" not in html
    assert "http://" not in html
    assert 'src="data:image/svg+xml;base64,' in html


def test_labels_that_differ_between_runs_stand_in_the_row_they_belong_to() -> None:
    runs = [run_of(off_step(), labels=("forced",)), run_of(round_step(), labels=("forced", "KV fits in cache"))]
    text = render_table(compare(runs))
    assert "All runs: forced." in text
    assert re.search(r"self:4\+60/chain3.*KV fits in cache", text)
    assert "KV fits in cache" in html_table(compare(runs))


# Forms.


@pytest.mark.parametrize("kind", ["live", "static", "text"])
def test_a_form_can_be_forced(kind: str) -> None:
    assert display_form({"SPECDEC_DISPLAY": kind}).kind == kind


def test_a_form_that_does_not_exist_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'big' is none of auto, live, static, text"):
        display_form({"SPECDEC_DISPLAY": "big"})


def test_outside_of_a_notebook_the_form_is_text() -> None:
    assert display_form({}).kind == "text"


# The front end.


def test_kernel_and_page_agree_on_columns_and_colours() -> None:
    columns = re.search(r"ROW_COLUMNS = \[(.*?)\];", asset("store.js"), re.DOTALL)
    assert columns
    assert tuple(re.findall(r'"(\w+)"', columns[1])) == rows.COLUMNS
    pairs = re.findall(r'\{ key: "(\w+)", label: "([^"]+)", colour: "(#\w+)"', asset("format.js"))
    assert pairs[:4] == [(f.key, f.label, f.colour) for f in palette.FAMILIES]


def test_the_script_fetches_nothing_and_imports_nothing() -> None:
    text = script() + asset("live.css")
    assert not re.search(r"https?:|\bimport\b|\bfetch\(|XMLHttpRequest|WebSocket|url\(", text)
    assert text.count("export default") == 1


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_a_lost_message_is_noticed_and_the_next_keyframe_heals_it() -> None:
    feed, head, packets = Feed("test"), header(), []
    for step in rounds(30):
        feed.add(head, step)
        packets.append(feed.keyframe({"state": "running"}) if step.index in (0, 20) else feed.delta())
    lost = [p for i, p in enumerate(packets) if i not in (7, 8)]
    messages = [{"head": p.head, "bytes": list(p.to_bytes() if p.head["k"] == "k" else p.rows)} for p in lost]
    seen = run_in_node(messages)
    assert [s["gaps"] for s in seen] == [0] * 7 + [1] * 21
    assert [s["stale"] for s in seen] == [False] * 7 + [True] * 11 + [False] * 10
    assert seen[-1]["steps"] == list(range(30))
    assert seen[10]["steps"] == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12]


def run_in_node(messages: list[dict]) -> list[dict]:
    """What the store of the page holds after each message."""
    driver = """
    const store = new Store(), seen = [];
    for (const { head, bytes } of JSON.parse(require("fs").readFileSync(0))) {
        const view = new DataView(Uint8Array.from(bytes).buffer);
        if (head.k === "k") store.takeSnapshot(view); else store.takeDelta(head, view);
        seen.push({ gaps: store.gaps, stale: store.isStale, steps: Array.from(store.rows.step.subarray(0, store.size)) });
    }
    console.log(JSON.stringify(seen));
    """
    source = "\n".join(asset(name) for name in SCRIPTS if name in ("format.js", "store.js")) + driver
    done = subprocess.run([str(NODE), "-e", source], input=json.dumps(messages), capture_output=True, text=True, check=True)
    found: list[dict] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_the_whole_script_parses() -> None:
    subprocess.run([str(NODE), "--input-type=module", "--check"], input=script(), text=True, check=True)


def test_importing_the_view_loads_neither_widgets_nor_plotly_nor_torch() -> None:
    heavy = ("torch", "plotly", "ipywidgets", "anywidget", "optuna", "IPython")
    code = f"import sys, specdec_lab.view; specdec_lab.view.display_form(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_thread_is_left_over() -> None:
    assert [t.name for t in threading.enumerate() if t.name.startswith("specdec-")] == []
