from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from builders import header, off_step, round_step, run_of
from specdec_lab.records import Run
from specdec_lab.summary import acceptance, compare, wilson_interval
from specdec_lab.view import write_report
from specdec_lab.view.figures import (
    PLOTLY_CONFIG,
    acceptance_figure,
    acceptance_per_position,
    figure_bundle,
    kv_floor_figure,
    phase_bars,
    phase_bars_figure,
    step_strip,
    step_strip_figure,
)
from specdec_lab.view.heatmap import HeatCell, heatmap_figure, speedup_heatmap
from specdec_lab.view.report import diverging
from specdec_lab.view.svg import acceptance_svg, strip_svg, tick_words, ticks

TABLE = [
    {"cell": "1x1024", "state": "tuned", "config": "off", "speedup": 1.0, "speedup_ci95": [1.0, 1.0]},
    {"cell": "8x1024", "state": "tuned", "config": "self:4+60/chain3", "speedup": 1.04, "speedup_ci95": [0.98, 1.1]},
    {"cell": "8x4096", "state": "composed", "config": "ngram/chain8", "speedup": 2.0, "speedup_ci95": [1.9, 2.1]},
    {"cell": "32x4096", "state": "infeasible", "reason": "KV 256 GiB > 115 GiB free"},
    {"cell": "1x4096", "state": "not_visited"},
]


def block(number: int) -> list[Run]:
    plain = run_of(*(off_step(index=i) for i in range(5)), block=number, labels=("forced",))
    spec = run_of(*(round_step((i % 4, 3), index=i, kv_floor_s=0.0625) for i in range(7)), block=number, labels=("forced",))
    return [plain, spec]


RUNS = [run for number in range(3) for run in block(number)]


# Data.


def test_the_strip_holds_every_round_and_its_parts_sum_to_the_measured_time() -> None:
    data = step_strip(RUNS)
    assert data.step == tuple(range(36))
    assert data.total_ms == tuple(step.wall_s * 1e3 for run in RUNS for step in run.rounds)
    assert [label for _, label in data.starts] == [f"{c} block {b}" for b in range(3) for c in ("off", "self:4+60/chain3")]
    assert [at for at, _ in data.starts] == [0, 5, 12, 17, 24, 29]


def test_the_floor_in_the_strip_never_exceeds_the_measured_attention() -> None:
    data = step_strip(run_of(round_step(kv_floor_s=77.0)))
    assert data.stack["kv"] == data.attention_ms
    assert data.kv_floor_ms == (77e3,)


def test_a_long_run_is_merged_to_the_points_asked_for() -> None:
    data = step_strip(run_of(*(round_step(index=i) for i in range(997))), max_points=100)
    assert len(data.step) <= 100
    assert sum(data.count) == 997


def test_acceptance_data_are_the_summarys_with_wilson_intervals() -> None:
    data = acceptance_per_position(RUNS)
    counts = acceptance(step for run in RUNS for step in run.steps)
    assert data.rate == counts.acceptance_rate_per_pos
    assert data.alpha == counts.alpha_censored
    assert data.num_drafts == (42, 42, 42)
    assert (data.low[0], data.high[0]) == wilson_interval(round(data.rate[0] * 42), 42)
    assert data.curve == pytest.approx([data.alpha, data.alpha**2, data.alpha**3])


def test_plain_decoding_has_an_empty_acceptance() -> None:
    data = acceptance_per_position(run_of(off_step()))
    assert data.rate == ()
    assert data.curve == ()


def test_phase_bars_sum_to_the_mean_round() -> None:
    comparisons = compare(RUNS)
    for bar, c in zip(phase_bars(comparisons), comparisons, strict=True):
        assert sum(bar.parts_ms.values()) == pytest.approx(1e3 * sum(c.summary.parts_s.values()))
    floor = phase_bars(comparisons)[1].parts_ms["kv"]
    assert floor == pytest.approx(62.5)


def test_the_heat_map_is_arranged_by_batch_and_length_with_holes_where_nothing_is_known() -> None:
    data = speedup_heatmap(TABLE)
    assert data.batches == (1, 8, 32)
    assert data.lengths == (1024, 4096)
    assert data.log2 == ((0.0, None), (math.log2(1.04), 1.0), (None, None))
    assert [[c and c.text for c in row] for row in data.cells] == [
        ["1.00x off", ""],
        ["1.04x self:4+60/chain3", "2.00x ngram/chain8 (composed)"],
        [None, "does not fit"],
    ]
    assert HeatCell.from_dict(TABLE[2]).is_sure
    assert not HeatCell.from_dict(TABLE[1]).is_sure


# Drawings.


def test_every_title_says_what_is_measured_and_hatching_marks_what_is_modelled() -> None:
    strip = step_strip_figure(step_strip(RUNS))
    floor = kv_floor_figure(step_strip(RUNS))
    bars = phase_bars_figure(phase_bars(compare(RUNS)))
    for figure in (strip, floor, bars):
        assert "modelled" in figure.layout.title.text
        assert [t.name for t in figure.data if "modelled" in t.name] == ["KV floor (modelled)"]
    assert {t.name: t.fillpattern.shape for t in strip.data}["KV floor (modelled)"] == "/"
    assert {t.name: t.marker.pattern.shape for t in bars.data} == {
        "KV floor (modelled)": "/", "compute": "", "draft": "", "other": "",
    }  # fmt: skip
    for figure in (strip, bars, acceptance_figure(acceptance_per_position(RUNS)), heatmap_figure(speedup_heatmap(TABLE))):
        assert "measured" in figure.layout.title.text


def test_numbers_stand_in_the_cells_and_doubtful_ones_in_italics() -> None:
    words = {a.text for a in heatmap_figure(speedup_heatmap(TABLE)).layout.annotations}
    assert "<i><b>1.04x</b><br>self:4+60/chain3</i>" in words
    assert "<b>2.00x</b> (composed)<br>ngram/chain8" in words
    assert "does not fit" in words


def test_plotly_offers_no_upload_and_a_text_stands_beside_it() -> None:
    bundle = figure_bundle(acceptance_figure(acceptance_per_position(RUNS)), "a table")
    assert bundle["text/plain"] == "a table"
    config = bundle["application/vnd.plotly.v1+json"]["config"]
    assert {key: config[key] for key in PLOTLY_CONFIG} == {"showSendToCloud": False, "displaylogo": False}


@pytest.mark.parametrize("top", [0.03, 0.9, 1.0, 3.7, 48.0, 51.9, 900.0, 12345.0])
def test_ticks_are_few_round_and_within_the_axis(top: float) -> None:
    marks = ticks(top)
    assert marks[0] == 0.0
    assert marks[-1] <= top
    assert 3 <= len(marks) <= 7
    words = tick_words(marks)
    assert len(set(words)) == len(words)
    assert len({len(word.partition(".")[2]) for word in words}) == 1


def test_pictures_without_data_say_so() -> None:
    assert "no round yet" in strip_svg(step_strip([]))
    assert "drafts nothing" in acceptance_svg(acceptance_per_position([]))


def test_a_layer_without_height_is_not_drawn() -> None:
    plain = strip_svg(step_strip(run_of(off_step(draft_s=0.0, kv_floor_s=0.0625))))
    assert "url(#kv)" in plain
    assert "#E69F00" not in plain


def test_the_ends_of_the_scale_are_dark_enough_for_white_words() -> None:
    assert diverging(0.0) == ("#F7F7F7", "#1A1A1A")
    assert diverging(1.0) == ("#2166AC", "#FFFFFF")
    assert diverging(-2.0) == ("#B2182B", "#FFFFFF")


# The report.


class Outline(HTMLParser):
    """Open tags, and every address in the page."""

    VOID = ("meta", "br", "img", "path", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture
def page(tmp_path: Path) -> str:
    policy = {"header": {"device": "TEST_2t", "workload": "prose <b>", "drafters": {"self": "abc"}}, "table": TABLE}
    path = write_report(tmp_path / "deep" / "report.html", RUNS, policy=policy, title="Report & <title>")
    return path.read_text(encoding="utf-8")


def test_the_report_is_one_file_that_fetches_nothing(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.stack == []
    assert outline.addresses == []
    assert not re.search(r"https?:|@import|url\((?!#kv\))", page)
    assert "script" not in outline.tags


def test_the_report_says_what_was_run_on_what_and_how_sure_it_is(page: str) -> None:
    for words in (
        "sdpa",
        "passed over: triton",
        "no CUDA device",
        "TEST_2t",
        "forced",
        "n=3",
        "Wilson 95%",
        "ceiling: read",
        " GB/s, measured at start",
        "seed 0",
    ):
        assert words in page
    assert "KV 256 GiB" in page


def test_words_of_users_stay_words(page: str) -> None:
    assert "Report &amp; &lt;title&gt;" in page
    assert "prose &lt;b&gt;" in page


def test_a_large_report_stays_small(tmp_path: Path) -> None:
    configs = ("off", "self:4+60/chain3", "ngram/chain8", "model:full/chain5")
    runs = []
    for cell in ("2x1024", "2x2048", "2x4096", "2x8192"):
        for number in range(3):
            for config in configs:
                steps = (
                    off_step(index=i) if config == "off" else round_step(config=config, index=i, scale=1 + i % 9)
                    for i in range(90)
                )
                runs.append(Run(header(cell=cell, config=config, block=number), tuple(steps)))
    assert write_report(tmp_path / "r.html", runs).stat().st_size < 300_000


def test_a_report_can_be_made_of_a_policy_alone(tmp_path: Path) -> None:
    text = write_report(tmp_path / "r.html", policy={"header": {}, "table": TABLE}).read_text()
    assert "no finished run yet" in text
    assert "2.00x" in text
