"""Scaling: a world whose cost line is known, and what must be found in it, said of it and drawn of it."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

import letters
import scaling_world
from scaling_world import DRAFT, TARGET, Line, World
from specdec_lab.bench import judges, sessions
from specdec_lab.bench.scaling import BATCHES, CONFIGS, LENGTHS, WIDTHS, Protocol, Scaling, ScalingReport, measure, read_last
from specdec_lab.bench.scaling.analysis import analyse, omega_at
from specdec_lab.bench.scaling.measure import spread_cells
from specdec_lab.bench.scaling.pictures import magicdec_picture, time_picture
from specdec_lab.bench.scaling.samples import SCHEMA
from specdec_lab.bench.scaling.words import markdown, sentences, tables, text
from specdec_lab.cli import main
from specdec_lab.commands.parser import build_parser
from specdec_lab.commands.scaling import OF_A_MEASUREMENT
from specdec_lab.costs import Limits, forward_floor
from specdec_lab.engine.cache import CacheTooLarge
from specdec_lab.records import Cell, SpecConfig, UnsupportedConfig
from specdec_lab.stream import Stream
from specdec_lab.view.panels import COLOURS, DASHES, MARKERS, log_ticks, picture_figure, wrap
from specdec_lab.view.panels_svg import picture_svg

SELF, WIDE, MODEL = "self:4+60/chain3", "self:4+252/chain4", "model:4+124/chain3"
KV = TARGET.kv_bytes_per_token(4)
QUICK = Protocol(blocks=3, block_s=0.02)


def measured(world, batches=(1, 4, 16), lengths=(512, 2048), configs=CONFIGS, **options):
    options = {"workload": scaling_world.text, "protocol": QUICK, **options}
    return measure(world, batches, lengths, configs, **options)


@pytest.fixture(scope="module")
def found():
    """The standing example: no noise, KV of small cells in cache."""
    return measured(World(cache_bytes=1 << 23))


@pytest.fixture(scope="module")
def analysis(found):
    return analyse(found)


# Measuring.


def test_every_cell_holds_plain_decoding_and_every_configuration(found):
    cells = [Cell(b, n) for n in (512, 2048) for b in (1, 4, 16)]
    for cell in cells:
        here = [p.config for p in found.points if p.cell == cell and not p.is_probe]
        assert here == ["off", SELF, WIDE, MODEL]
    assert found.configs == (SELF, WIDE, MODEL)
    assert {p.cell for p in found.points} == set(cells)
    assert found.skipped == {}
    assert found.mismatches == ()


def test_further_widths_are_measured_in_three_spread_cells_by_the_draft_model(found):
    probed = {p.cell for p in found.points if p.is_probe}
    assert probed == {Cell(1, 512), Cell(16, 512), Cell(16, 2048)}
    assert {p.config for p in found.points if p.is_probe} == {f"model:4+60/chain{w - 1}" for w in (2, 8, 9, 16)}
    for cell in probed:
        assert {t.query_tokens for p in found.points if p.cell == cell for t in p.verify} == set(WIDTHS)


def test_without_a_draft_model_the_target_drafts_for_the_widths():
    found = measured(World(has_draft=False), configs=CONFIGS[:1], widths=(1, 2, 4, 8))
    assert {p.config for p in found.points if p.is_probe} == {"self:4+60/chain1", "self:4+60/chain7"}
    assert found.draft is None


def test_spread_cells_are_the_smallest_the_widest_and_the_largest():
    cells = [Cell(b, n) for b in BATCHES for n in LENGTHS]
    assert spread_cells(cells) == (Cell(1, 1024), Cell(16, 1024), Cell(16, 8192))
    assert spread_cells([Cell(2, 100)]) == (Cell(2, 100),)


def test_a_point_holds_medians_exact_bytes_and_real_acceptance(found):
    world, config = World(), SpecConfig.parse(SELF)
    point = found.point(Cell(4, 2048), SELF)
    assert point.tokens_per_round == pytest.approx(world.omega(config), rel=0.06)  # few rounds
    accepted = sum(j * n for j, n in enumerate(point.acceptance_histogram)) / sum(point.acceptance_histogram)
    assert 1 + accepted == pytest.approx(point.tokens_per_round)
    (time,) = point.verify
    assert time.query_tokens == 4
    assert time.kv_bytes == pytest.approx(4 * (point.context_tokens + 4) * KV)
    assert time.seconds.median == pytest.approx(world.target(16, time.kv_bytes), rel=1e-3)
    assert point.draft_s.median == pytest.approx(world.drafts["self"](4, 4 * 64 * KV))
    assert point.draft_kv_bytes == 4 * 64 * KV
    assert point.overhead_s.median == pytest.approx(3e-4 + 4 * 2e-5)
    assert len(point.block_tokens_per_s) == point.speedup.num_blocks == 3


def test_a_lookup_that_sometimes_finds_nothing_has_two_widths():
    point = measured(World(), configs=[SpecConfig.parse("ngram/chain4")]).point(Cell(4, 512), "ngram/chain4")
    assert [t.query_tokens for t in point.verify] == [1, 5]
    medians = [t.seconds.median for t in point.verify]
    assert medians[0] < point.verify_s < medians[1]


def test_wrong_tokens_are_named_and_their_numbers_left_out():
    found = measured(World(liars=frozenset({SELF})))
    assert SELF not in found.configs
    assert len(found.mismatches) == 6
    assert "its speed means nothing" in found.mismatches[0]
    assert "wrong tokens: 1x512 self:4+60/chain3" in text(analyse(found))


# What ends a measurement early.


def test_a_cell_that_does_not_fit_is_skipped_with_its_reason_and_the_others_are_measured():
    found = measured(World(max_length=4096), lengths=(512, 2048, 8192))
    assert set(found.skipped) == {"1x8192", "4x8192", "16x8192"}
    assert "large has 4096 positions" in found.skipped["1x8192"]
    assert {p.cell.length for p in found.points} == {512, 2048}
    assert "4x8192 was not measured: large has 4096 positions" in text(analyse(found))


def test_a_cell_whose_memory_runs_out_in_a_round_is_skipped_too():
    world = World(hooks={("16x2048", MODEL): CacheTooLarge("123 bytes are free")})
    found = measured(world)
    assert found.skipped == {"16x2048": "123 bytes are free"}
    assert len({p.cell for p in found.points}) == 5
    assert not found.is_interrupted


def test_an_interrupt_keeps_what_was_measured():
    found = measured(World(hooks={("4x2048", SELF): KeyboardInterrupt()}))
    assert found.is_interrupted
    assert {str(p.cell) for p in found.points} == {"1x512", "4x512", "16x512", "1x2048"}
    report = ScalingReport(Scaling.from_dict(json.loads(json.dumps(found.to_dict()))))
    assert "4x2048: interrupted" in str(report)
    assert report.analysis.fits.target is not None


class InterruptedLater(World):
    """An interrupt at the start of the third block of a cell."""

    def _stream(self, workload, config, block):
        stream = super()._stream(workload, config, block)
        return Stream(stream.header, _interrupt()) if block == 2 and str(workload.cell) == "4x2048" else stream


def _interrupt():
    raise KeyboardInterrupt
    yield


def test_an_interrupt_within_a_cell_keeps_its_blocks():
    found = measured(InterruptedLater())
    assert found.is_interrupted
    assert found.point(Cell(4, 2048), SELF).speedup.num_blocks == 2
    assert found.point(Cell(16, 2048), SELF) is None


def test_an_interrupt_before_anything_was_measured_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        measured(World(hooks={("1x512", "off"): KeyboardInterrupt()}))


@pytest.mark.parametrize(("options", "words"), [
    ({"batches": (4,)}, "at least 2 batch sizes to see how time grows with them, got 4"),
    ({"batches": (4, 4)}, "at least 2 batch sizes"),
    ({"lengths": (512,)}, "at least 2 lengths to see how time grows with them, got 512"),
    ({"configs": [SpecConfig.off()]}, "name a configuration besides off"),
    ({"widths": (2, 65)}, "verifies 1 to 64 tokens here, got widths 2, 65"),
    ({"lengths": (9000, 10000)}, "none of these cells can run. 1x9000: large has 8192 positions"),
    ({"lengths": (512, 10000)}, "only 1x512, 4x512, 16x512 can run here"),
])  # fmt: skip
def test_what_shows_no_growth_is_refused_before_anything_is_measured(options, words):
    world = World()
    with pytest.raises(ValueError, match=words):
        measured(world, **options)
    assert not world.calls


def test_what_the_engine_cannot_run_is_refused_before_anything_is_measured():
    with pytest.raises(UnsupportedConfig, match="drafts chains"):
        measured(World(), configs=[SpecConfig.parse("self:4+60/2,2")])
    with pytest.raises(ValueError, match="at least 1 block"):
        Protocol(blocks=0)


# The fit.


def test_the_cost_line_of_the_world_is_recovered(analysis):
    target = analysis.fits.target
    assert (target.fixed_s, target.per_token_s) == pytest.approx((8e-4, 3e-5), rel=0.01)
    assert target.per_kv_byte_s == pytest.approx(1 / 12e9, rel=0.01)
    assert target.left_out < 0.01
    assert max(map(abs, target.residuals)) < 0.01
    assert "1/c over all cells: 12.0 GB/s, 75% of the calibrated read stream (16.0 GB/s)" in text(analysis)


def test_kv_that_comes_from_memory_has_a_line_of_its_own_where_other_cells_read_it_from_the_cache():
    class Cached(World):
        def _round(self, cell, config, places, index, start, slow):
            fits = cell.batch * cell.length * KV < self.cache_bytes
            self.target = Line(8e-4, 3e-5, 1 / (48e9 if fits else 12e9))
            return super()._round(cell, config, places, index, start, slow)

    analysis = analyse(measured(Cached(cache_bytes=1 << 25), lengths=(512, 2048, 4096)))
    assert 1 / analysis.fits.beyond_cache.per_kv_byte_s == pytest.approx(12e9, rel=0.01)
    assert 1 / analysis.fits.target.per_kv_byte_s > 12.2e9
    assert "1/c over the cells whose KV exceeds the cache: 12.0 GB/s" in text(analysis)
    assert analyse(measured(World())).fits.beyond_cache is None


def test_the_lines_of_drafts_and_overhead_are_recovered(analysis):
    drafted = analysis.fits.drafts["self"]
    assert (drafted.fixed_s, drafted.per_token_s, drafted.per_kv_byte_s) == pytest.approx((8e-4, 3e-5, 1 / 12e9), rel=0.01)
    assert analysis.disagreement < 0.01
    over, plain = analysis.fits.overhead, analysis.fits.plain_overhead
    assert (over.fixed_s, over.per_token_s) == pytest.approx((3e-4, 2e-5))
    assert (plain.fixed_s, plain.per_token_s) == pytest.approx((1e-4, 1e-5))


def test_with_one_window_the_kv_of_a_draft_is_within_its_time_per_sequence_and_that_is_said(analysis):
    drafted = analysis.fits.drafts["model"]
    assert analysis.fits.one_window == {"model"}
    assert drafted.fixed_s == pytest.approx(2e-4, rel=0.01)
    assert drafted.per_token_s == pytest.approx(1e-5 + 1e-10 * 128 * DRAFT.kv_bytes_per_token(4), rel=0.01)
    assert drafted.per_kv_byte_s == 0
    assert "one window: its KV is in d1" in text(analysis)
    assert "its draft's window included" in text(analysis)


def test_a_slow_self_draft_is_reported():
    line = World().target
    slow = measured(World(drafts={"self": Line(1.5 * line.fixed, 1.5 * line.per_token, 1.5 * line.per_byte), "model": line}))
    analysis = analyse(slow)
    assert analysis.disagreement == pytest.approx(1 / 3, abs=0.01)
    assert "differ by up to 33%" in text(analysis)


def test_a_lookup_has_no_draft_line_and_its_reason_is_said():
    analysis = analyse(measured(World(), configs=[SpecConfig.parse("ngram/chain4")]))
    assert analysis.fits.drafts == {}
    assert analysis.inflection == {}
    assert "No fitted line for draft ngram: it drafts without a chain of forwards." in text(analysis)
    assert all(row.fitted_speedup is None for row in analysis.rows)
    assert all(row.identity == pytest.approx(row.speedup.mean, rel=0.02) for row in analysis.rows)


def test_the_measured_speed_up_is_the_identity_and_what_the_lines_predict(analysis):
    for row in analysis.rows:
        assert row.identity == pytest.approx(row.speedup.mean, rel=0.02)
        assert row.fitted_speedup == pytest.approx(row.speedup.mean, rel=0.02)
        parts = row.depth * row.draft_ratio + row.verify_ratio + row.overhead_ratio
        assert row.point.step_s.median == pytest.approx(parts * row.plain_s, rel=0.01)


def test_plain_steps_are_held_against_the_line_with_their_overhead(analysis):
    for row in analysis.plain:
        cell = Cell(row.point.cell.batch, round(row.point.context_tokens))
        assert row.step_s == pytest.approx(World().plain_s(cell), rel=0.01)
        assert abs(row.residual) < 0.01


def test_a_batch_at_which_the_machine_is_slow_shows_as_a_residual():
    class Uneven(World):
        def _round(self, cell, config, places, index, start, slow):
            return super()._round(cell, config, places, index, start, 1.4 if cell.batch == 4 else 1.0)

    residuals = {row.point.cell: row.residual for row in analyse(measured(Uneven())).plain}
    assert all(residuals[Cell(4, n)] > 0.1 for n in (512, 2048))
    assert all(residuals[Cell(b, n)] < 0.02 for b in (1, 16) for n in (512, 2048))


def test_the_ceiling_keeps_the_measured_omega_and_takes_floors_for_times(analysis):
    row = next(r for r in analysis.rows if r.point.cell == Cell(4, 2048) and r.point.config == MODEL)
    limits, keys = Limits(16e9, 1.5e11), round(row.point.context_tokens)

    def floor(shape, q, seen):
        return forward_floor(shape, limits, 4, q, seen, element_bytes=4).total_s

    round_s = 3 * floor(DRAFT, 1, 128) + floor(TARGET, 4, keys)
    assert row.ideal_speedup == pytest.approx(row.omega * floor(TARGET, 1, keys) / round_s)
    assert row.share_of_ideal == pytest.approx(row.speedup.mean / row.ideal_speedup)
    plain = next(r for r in analysis.plain if r.point.cell == Cell(4, 2048))
    assert plain.efficiency == pytest.approx(floor(TARGET, 1, round(plain.point.context_tokens)) / plain.step_s)
    assert 0 < plain.efficiency < 1


def test_half_lengths_follow_from_the_line(analysis):
    for (batch, q), length in analysis.kv_half.items():
        assert length == pytest.approx((8e-4 + 3e-5 * batch * q) / (batch * KV / 12e9), rel=0.02)
    assert {q for _, q in analysis.kv_half} == {1, 4, 5}


def test_the_inflection_is_where_speculation_pays_at_every_batch_and_gains_with_it(analysis):
    assert analysis.inflection[SELF] is not None
    never = analyse(measured(World(rates={"self": 0.1, "model": 0.1})))
    assert never.inflection == {SELF: None, WIDE: None, MODEL: None}
    assert f"{SELF} has no S_inflection between 512 and 2,048 tokens" in text(never)
    first = analysis.inflection[SELF]
    for length in (512, 2048):
        by_batch = [r.speedup.mean for r in analysis.rows if r.point.config == SELF and r.point.cell.length == length]
        assert (length >= first) == (min(by_batch) >= 1 and by_batch == sorted(by_batch))


def test_acceptance_between_measured_lengths_is_interpolated(found):
    ends = [omega_at(found, SELF, n) for n in (512, 2048)]
    assert omega_at(found, SELF, 1024) == pytest.approx(sum(ends) / 2)
    assert [omega_at(found, SELF, n) for n in (100, 90_000)] == ends


def test_where_the_curve_flattens_is_computed_from_the_line(analysis):
    (f,) = [f for f in analysis.flattening if f.config == SELF]
    c, omega = 1 / 12e9, omega_at(analysis.scaling, SELF, 2048)
    assert f.fixed_s == pytest.approx(4 * 8e-4 + 3e-4, rel=0.01)
    assert f.kv_s == pytest.approx(c * KV * (2048 + 3 * 64), rel=0.01)
    assert f.compute_s == pytest.approx(3e-5 * (3 + 4), rel=0.01)
    assert f.draft_s == pytest.approx(3e-5 + c * KV * 64, rel=0.01)
    assert f.batch == pytest.approx(f.fixed_s / (f.kv_s + f.compute_s + f.overhead_s))
    assert f.first == pytest.approx(omega * 9e-4 / f.fixed_s, rel=0.01)
    assert f.limit == pytest.approx(omega * (3e-5 + c * KV * 2048 + 1e-5) / (f.kv_s + f.compute_s + 2e-5), rel=0.01)
    assert f.compute_length == pytest.approx((7 * 3e-5 - 3 * c * KV * 64) / (c * KV), rel=0.02)
    assert [batch for batch, _ in f.measured] == [1, 4, 16]
    assert f"From batch {f.batch:.1f} on" in text(analysis)
    assert f"flattens towards {f.limit:.2f}x" in text(analysis)


def test_where_kv_costs_nothing_computing_sets_the_limit_and_nothing_is_divided_by_zero():
    free = Line(8e-4, 3e-5, 0.0)
    analysis = analyse(measured(World(target=free, drafts={"self": free, "model": free})))
    assert analysis.fits.target.per_kv_byte_s == pytest.approx(0, abs=1e-14)
    assert all("computing more than by reading KV" in line for line in sentences(analysis) if "flattens" in line)
    assert len(analysis.flattening) == 3


def test_points_that_cannot_be_told_apart_give_reasons_instead_of_lines(found):
    one = replace(found, points=(found.point(Cell(1, 512), "off"),))
    analysis = analyse(one)
    assert analysis.fits.target is None
    assert "do not tell fixed time, tokens and KV bytes apart" in text(analysis)
    assert analysis.kv_half == {}
    assert [row.residual for row in analysis.plain] == [None]


# Saving.


def test_a_saved_row_reads_back_equal_and_says_and_draws_the_same(found, tmp_path):
    path = tmp_path / "scaling.jsonl"
    path.write_text('{"schema": "other/1"}\n' + json.dumps(found.to_dict(), allow_nan=False) + "\n")
    again = read_last(path)
    assert again == found
    before, after = ScalingReport(found), ScalingReport(again)
    assert str(before) == str(after)
    assert before.pictures == after.pictures


def test_one_block_has_no_interval_in_a_row_either():
    found = measured(World(), protocol=Protocol(1, 0.02))
    again = Scaling.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert again.point(Cell(1, 512), SELF).speedup.high == math.inf
    assert again == found


@pytest.mark.parametrize(("content", "words"), [
    ("", "holds no row"), ("{\n", "line 1 is not JSON"), ("[1]\n", "is no scaling row but a list"),
    ('{"schema": "specdec_lab.scaling/9"}\n', "the row says 'specdec_lab.scaling/9'"),
    (json.dumps({"schema": SCHEMA}), "not a scaling row: KeyError 'points'"),
    (b"\x1f\x8b\xff\xfe", "is not a text file"),
])  # fmt: skip
def test_a_file_without_a_row_is_refused_with_what_is_wrong(content, words, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words):
        read_last(path)


# Pictures.


def test_the_time_picture_holds_the_measured_medians_and_the_fitted_line(analysis):
    context, batch, verify = time_picture(analysis).panels
    assert [s.label for s in context.points] == ["1", "4", "16"]
    assert [s.label for s in batch.points] == ["512", "2,048"]
    assert [s.label for s in verify.points] == ["1x512", "16x512", "16x2048"]
    plain = {row.point.cell: row.step_s * 1e3 for row in analysis.plain}
    assert context.points[1].x == (512, 2048)
    assert context.points[1].y == (plain[Cell(4, 512)], plain[Cell(4, 2048)])
    assert batch.points[0].y == tuple(plain[Cell(b, 512)] for b in (1, 4, 16))
    assert context.points[0].hollow == (True, False)  # the cache of this world holds the KV of 1x512, not that of 1x2048
    assert verify.points[0].x == tuple(map(float, WIDTHS))
    for panel in (context, batch, verify):
        for series, curve in zip(panel.points, panel.curves, strict=True):
            assert (series.label, series.style) == (curve.label, curve.style)
            line = dict(zip(curve.x, curve.y, strict=True))
            for x, y in zip(series.x, series.y, strict=True):
                assert line[x] == pytest.approx(y, rel=0.1)  # the context grew by up to a hundred tokens meanwhile


def test_magicdecs_picture_holds_ratios_and_speed_ups_with_their_intervals(analysis):
    picture = magicdec_picture(analysis)
    assert [panel.title for panel in picture.rows[0]] == [f"{SELF}: {what}" for what in ("T_D / T_T", "T_V / T_T", "speed-up")]
    assert len(picture.rows) == 3
    rows = {r.point.cell.batch: r for r in analysis.rows if r.point.config == SELF and r.point.cell.length == 2048}
    draft, verify, gain = (panel.points[1] for panel in picture.rows[0])
    assert draft.x == verify.x == gain.x == (1, 4, 16)
    assert draft.y == tuple(rows[b].draft_ratio for b in (1, 4, 16))
    assert verify.y == tuple(rows[b].verify_ratio for b in (1, 4, 16))
    assert gain.y == tuple(rows[b].speedup.mean for b in (1, 4, 16))
    assert gain.high == tuple(rows[b].speedup.high for b in (1, 4, 16))
    assert picture.rows[0][2].reference == (1.0, "1x")
    assert [curve.label for curve in picture.rows[0][2].curves] == ["512", "2,048"]


def test_titles_say_what_is_measured_what_modelled_and_where(analysis):
    for picture in (time_picture(analysis), magicdec_picture(analysis)):
        assert "measured (markers)" in picture.title
        assert "(dashed)" in picture.title
        assert picture.title.endswith("Test CPU, 2 threads")
        assert "torch 2.13.0" in picture.notes[-1]
        assert "Hollow: the KV of the cell fits in the processor's cache." in picture.notes[0]


def test_a_picture_is_well_formed_svg_with_a_title_no_script_and_readable_text(analysis):
    for picture in (time_picture(analysis), magicdec_picture(analysis)):
        svg = picture_svg(picture)
        root = ET.fromstring(svg)
        name = "{http://www.w3.org/2000/svg}"
        assert root.find(f"{name}title").text == picture.title
        assert root.attrib["role"] == "img"
        assert "script" not in svg
        assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
        assert all(int(e.attrib.get("font-size", 12)) >= 12 for e in root.iter(f"{name}text"))
        width, height = int(root.attrib["width"]), int(root.attrib["height"])
        words = "".join(e.text for e in root.iter(f"{name}text"))
        for panel in picture.panels:
            assert panel.title.split()[0] in words
            assert panel.x_label in words
        for e in root.iter(f"{name}text"):
            assert 0 <= float(e.attrib["x"]) <= width
            assert 0 <= float(e.attrib["y"]) <= height


def test_every_measured_point_is_a_marker_and_every_fitted_line_is_dashed(analysis):
    picture = time_picture(analysis)
    root = ET.fromstring(picture_svg(picture))
    shapes = [e for e in root.iter() if e.tag.endswith(("circle", "polygon"))]
    series = [s for panel in picture.panels for s in panel.points]
    assert len(shapes) == sum(len(s.x) for s in series) + len(series)  # and one each in the legends
    assert sum(e.attrib["fill"] == "none" for e in shapes) == sum(sum(s.hollow) for s in series)
    dashed = [e for e in root.iter() if "stroke-dasharray" in e.attrib and e.attrib["stroke"] in COLOURS]
    assert len(dashed) == sum(len(panel.curves) for panel in picture.panels)
    assert {e.attrib["stroke-dasharray"] for e in dashed} == set(DASHES[:3])


def test_an_interval_that_blew_up_does_not_flatten_its_panel(analysis):
    panel = magicdec_picture(analysis).rows[0][2]
    wild = replace(panel, points=(replace(panel.points[0], high=(90.0, 1.0, 1.0)), *panel.points[1:]))
    assert wild.y_range[1] < 1.5 * max(max(s.y) for s in panel.points) + 1e-9
    assert panel.y_range[1] >= max(s.high[0] for s in panel.points)


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#FFFFFF", "#0D1117"])
def test_series_have_contrast_on_light_and_dark_pages_and_differ_in_more_than_hue(page):
    for colour in COLOURS:
        low, high = sorted((_luminance(colour), _luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour
    assert len(set(MARKERS)) == len(set(DASHES)) == len(set(COLOURS))


def test_figures_hold_the_same_numbers(analysis):
    for picture in (time_picture(analysis), magicdec_picture(analysis)):
        figure = picture_figure(picture, dark=True)
        drawn = {tuple(trace.y) for trace in figure.data}
        expected = {s.y for panel in picture.panels for s in panel.points} | {c.y for p in picture.panels for c in p.curves}
        assert drawn == expected
        assert picture.title in figure.layout.title.text
        assert [trace.name for trace in figure.data].count("fitted (dashed)") == sum(len(p.curves) for p in picture.panels)


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (1.0, 100.0, [1, 3, 10, 30, 100]), (1.5, 60.0, [2, 5, 10, 20, 50]), (0.9, 1.1, [1]),
    (1e-3, 1e5, [1e-3, 1e-1, 1e1, 1e3, 1e5]),
])  # fmt: skip
def test_logarithmic_ticks_are_round_and_few(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_lines_are_broken_at_blanks_only():
    assert wrap("one two three", 7) == ["one two", "three"]
    assert wrap("unbreakable word", 3) == ["unbreakable", "word"]
    assert wrap("", 3) == []


# Words.


def test_tables_have_a_row_per_cell_and_configuration_in_both_forms(analysis):
    plain, speculation, widths, lines, half = tables(analysis)
    assert (len(plain.rows), len(speculation.rows), len(half.rows)) == (6, 18, 3)
    assert [row[0] for row in lines.rows][:1] == ["decode and verify: a, b, c"]
    assert [(row[0], row[1]) for row in widths.rows[:2]] == [("16x2048", "1"), ("16x2048", "2")]
    assert "| 4x2048 | self:4+60/chain3 |" in markdown(analysis)
    assert all(line.count("|") == 8 for line in plain.markdown().splitlines() if line.startswith("|"))
    assert "KV fits in cache" in plain.text()
    assert "~" in half.text()


def test_cells_on_a_busy_machine_are_marked_as_not_to_be_quoted(found):
    busy = analyse(replace(found, busy=("4x512",)))
    rows = [row for row in tables(busy)[1].rows if row[0] == "4x512"]
    assert len(rows) == 3
    assert all("machine busy: do not quote" in row[-1] for row in rows)


def test_a_notebook_shows_pictures_above_the_tables(found):
    html = ScalingReport(found)._repr_html_()
    assert html.count('<img src="data:image/svg+xml;base64,') == 2
    assert "Effective bandwidth of KV reads" in html


# The command.


@pytest.fixture
def random_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sessions, "_held_out", lambda pair, kind, max_new_tokens, sampling: letters.random_text())
    monkeypatch.setattr(judges, "DISTURBED", float("inf"))


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    code = main(["bench", "scaling", *map(str, words)], load=letters.loader(), out=out, err=err)
    return code, out.getvalue(), err.getvalue()


SMALL = ("--batches", "1,2", "--lengths", "16,32", "--configs", "self:2+6/chain2", "--widths", "2,3", "--blocks", 4,
         "--block-seconds", "0.005")  # fmt: skip


def test_the_command_measures_saves_draws_and_draws_again_without_measuring(random_text):
    code, out, err = call(*SMALL, "--save", "--db", "db", "--svg", "pictures")
    assert code == 0
    assert "2x32: plain step" in err
    assert "written: pictures/scaling_magicdec.svg" in out
    saved = Path("db/bench/scaling.jsonl")
    assert json.loads(saved.read_text())["schema"] == SCHEMA
    code, again, err = call("--from", saved, "--svg", "again", "--markdown")
    assert (code, err) == (0, "")
    assert "| 2x32 | self:2+6/chain2 |" in again
    for name in ("scaling_magicdec.svg", "scaling_time_per_token.svg"):
        assert (Path("pictures") / name).read_text() == (Path("again") / name).read_text()
        ET.parse(Path("again") / name)
    row = json.loads(call("--from", saved, "--json")[1])
    assert row["points"] == json.loads(saved.read_text())["points"]


def test_the_parser_leaves_what_describes_a_measurement_open():
    args = vars(build_parser().parse_args(["bench", "scaling"]))
    assert {name: args[name] for name in OF_A_MEASUREMENT} == dict.fromkeys(OF_A_MEASUREMENT)
    others = {"verb", "action", "handler", "source", "svg", "markdown", "save", "db", "json"}
    assert set(args) - others == set(OF_A_MEASUREMENT)


def test_nothing_is_written_unless_asked(random_text):
    assert call(*SMALL)[0] == 0
    assert list(Path().iterdir()) == []


def test_sampling_is_measured_too(random_text):
    row = json.loads(call(*SMALL, "--temperature", "0.8", "--verifier", "coupled", "--seed", 3, "--json")[1])
    assert {p["config"] for p in row["points"]} >= {"off", "self:2+6/chain2"}


@pytest.mark.parametrize(("words", "message"), [
    (("--batches", "4"), "scaling needs at least 2 batch sizes"),
    (("--lengths", "1k"), "scaling needs at least 2 lengths"),
    (("--configs", "nonsense/chain3"), "drafter 'nonsense' is none of"),
    (("--configs", "model:snapkv64+8/2,2"), "SnapKV chooses among the target's own keys"),
    (("--lengths", "16,5k"), "only 1x16, 2x16, 4x16, 8x16, 16x16 can run here"),
    (("--from", "nowhere.jsonl"), "nowhere.jsonl: No such file or directory"),
    (("--from", "x", "--batches", "1,2", "--save"), "leave out --batches, --save, or leave out --from"),
    (("--temperature", "0"), "a number above 0 is needed"),
])  # fmt: skip
def test_a_mistake_is_one_line(random_text, words, message):
    code, out, err = call(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
