"""Forced acceptance: it replaces the accept decision and nothing else, and nobody can mistake it for a measurement."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import specdec_lab as sd
from specdec_lab.engine import tree_verify, verify
from specdec_lab.engine.forced import Forced, forced_accept, forced_ranks
from specdec_lab.records import (
    Cell,
    ParseError,
    UnsupportedConfig,
    forced_label,
    not_measured,
)
from specdec_lab.stream import record
from specdec_lab.summary import acceptance, pool, summarize
from specdec_lab.workload import Workload, random_context

CHAIN = "self:4+28/chain4"


@pytest.fixture(scope="module")
def pair():
    return sd.load("random:tiny", "random:tiny-draft", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def engine(pair):
    return sd.Engine(pair, forced=0.7)


def run_of(engine, config, cell="8x40", new=60, **sampling):
    return record(engine.steps(random_context(Cell.parse(cell), 512, max_new_tokens=new, **sampling), config))


@pytest.mark.parametrize("text", ["0.8", "1", "0", "marginals:0.9,0.7,0.7", "ranks:0.6,0.2"])
def test_a_spelling_is_read_back(text):
    assert str(Forced.parse(text)) == text


@pytest.mark.parametrize(("text", "says"), [
    ("1.2", r"lies in \[0, 1\]"), ("eighty", "is none of"), ("marginals:0.5,0.6", "never rise"), ("ranks:0.7,0.7", "at most 1"),
    ("0.5,0.4", "one chance"), ("odds:0.5", "is none of"),
])  # fmt: skip
def test_a_wrong_spelling_says_why(text, says):
    with pytest.raises(ParseError, match=says):
        Forced.parse(text)


def test_forced_accept_counts_the_leading_uniforms_below_alpha_within_what_was_drafted():
    uniforms = torch.tensor([[0.1, 0.2, 0.9, 0.0], [0.1, 0.1, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]])
    assert forced_accept(uniforms, 0.8, torch.tensor([4, 4, 4, 2])).tolist() == [2, 4, 0, 2]
    assert forced_accept(uniforms, torch.tensor([0.8, 0.15, 0.8, 0.8]), torch.tensor([4, 4, 4, 2])).tolist() == [1, 4, 0, 2]


def test_forced_ranks_are_disjoint_shares_of_the_unit_interval():
    within = torch.tensor(Forced.parse("ranks:0.5,0.25").ranks(2), dtype=torch.float64)
    assert forced_ranks(torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99]), within).tolist() == [1, 1, 2, 2, 0, 0]
    assert Forced.parse("0.5").ranks(3) == [0.5, 0.75, 0.875]


def test_marginals_become_hazards():
    assert Forced.parse("marginals:0.8,0.4,0").chances(3) == [0.8, 0.5, 0.0]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "verifier": "coupled"}])
def test_acceptance_is_alpha_whatever_the_model_says(pair, sampling):
    found = acceptance(run_of(sd.Engine(pair, forced=0.2), CHAIN, **sampling).steps)
    assert abs(found.alpha_censored - 0.2) < 4 * (0.16 / sum(found.at_risk)) ** 0.5
    assert acceptance(run_of(sd.Engine(pair), CHAIN, **sampling).steps).alpha_censored > 0.4


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
@pytest.mark.parametrize(("forced", "expected"), [("ranks:0.5,0.3", (0.5, 0.3)), ("0.6", (0.6, 0.24))])
def test_trees_accept_children_by_rank(pair, forced, expected, sampling):
    found = summarize(run_of(sd.Engine(pair, forced=forced), "self:4+28/2,2,2", **sampling)).rank_acceptance
    assert found == pytest.approx(expected, abs=0.09)


def test_marginals_are_those_prescribed(pair):
    run = run_of(sd.Engine(pair, forced="marginals:0.9,0.45,0.45"), "model:4+28/chain3")
    assert summarize(run).acceptance_rate_per_pos == pytest.approx((0.9, 0.45, 0.45), abs=0.1)


def test_marginals_refuse_trees_and_chains_that_they_do_not_cover(pair):
    engine = sd.Engine(pair, forced="marginals:0.9,0.45")
    for config, says in (("self:full/2,1", "a chain"), ("self:full/chain3", "position 3")):
        with pytest.raises(UnsupportedConfig, match=says):
            engine.steps(Workload("x", ((1, 2),), 4), config)


@pytest.mark.parametrize("config", [CHAIN, "self:4+28/2,1", "ngram/chain3", "ngram/2,1", "model:full/chain2"])
def test_accepted_tokens_are_the_drafted_ones(pair, config, monkeypatch):
    engine = sd.Engine(pair, forced=1.0)
    seen = []
    for module, name in ((verify, "decide"), (tree_verify, "decide_tree")):
        real = getattr(module, name)

        def spy(proposal, *rest, real=real):
            seen.append((proposal, real(proposal, *rest)))
            return seen[-1][1]

        monkeypatch.setattr(f"specdec_lab.engine.session.{name}", spy)
    run = record(engine.steps(Workload("x", ((5, 6, 7, 5, 6, 7, 5, 6), (9, 8, 9, 8, 9, 8, 9, 8)), 12), config))
    assert run.tokens() == [row[:12] for row in run.tokens()]
    for proposal, decision in seen:
        for row, count in enumerate(decision.num_accepted.tolist()):
            nodes = range(count) if decision.path is None else [n - 1 for n in decision.path[row, :count].tolist()]
            assert decision.tokens[row, :count].tolist() == [int(proposal.tokens[row, n]) for n in nodes]
    assert any(int(decision.num_accepted.max()) > 0 for _, decision in seen)


def test_nothing_is_accepted_at_alpha_zero_and_the_text_is_plain_decodings(pair):
    plain = run_of(sd.Engine(pair), "off", new=9).tokens()
    assert run_of(sd.Engine(pair, forced=0), CHAIN, new=9).tokens() == plain


def test_everything_else_runs_the_real_test_included(pair, monkeypatch):
    calls = []
    real = tree_verify.accept_children
    monkeypatch.setattr(tree_verify, "accept_children", lambda *a: calls.append(1) or real(*a))
    run = run_of(sd.Engine(pair, forced=0.5), "self:4+28/2,1", cell="2x40", new=8, temperature=1.0)
    assert len(calls) >= len(run.rounds)
    assert all(step.linear_s > 0 and step.draft_s > 0 and step.kv_read_bytes > 0 for step in run.rounds)


def test_forcing_depends_on_the_sequence_and_not_on_the_batch(engine):
    prompts = [tuple(range(i, i + 20)) for i in (3, 50, 90)]
    whole = record(engine.steps(Workload("x", tuple(prompts), 30, seed=4), CHAIN))
    alone = record(engine.steps(Workload("x", (prompts[2],), 30, seed=4, sequence_ids=(2,)), CHAIN))
    assert [s.accepted[2] for s in whole.rounds if s.tokens[2]] == [s.accepted[0] for s in alone.rounds]
    other = record(engine.steps(Workload("x", (prompts[2],), 30, seed=5, sequence_ids=(2,)), CHAIN))
    assert [s.accepted for s in other.rounds] != [s.accepted for s in alone.rounds]


# Nobody can mistake it.


def test_every_header_says_forced_and_how_much(engine):
    for config in ("off", CHAIN):
        assert "acceptance: forced alpha 0.7" in engine.header(Workload("x", ((1,),), 4), config).labels


def test_forced_measurements_have_a_fingerprint_of_their_own(engine, pair):
    prints = {e.identity().base_fingerprint for e in (engine, sd.Engine(pair), sd.Engine(pair, forced=0.8))}
    assert len(prints) == 3


def test_forced_and_measured_runs_are_never_pooled(engine, pair):
    forced, measured = run_of(engine, CHAIN, "1x40", 6), run_of(sd.Engine(pair), CHAIN, "1x40", 6)
    other = run_of(sd.Engine(pair, forced=0.2), CHAIN, "1x40", 6)
    pool([forced, forced])
    for mixture in ([forced, measured], [forced, other]):
        with pytest.raises(ValueError, match="never pooled: .*forced alpha 0.7"):
            pool(mixture)


def test_every_title_says_forced(engine):
    from specdec_lab.summary import compare
    from specdec_lab.view.figures import (
        acceptance_figure,
        acceptance_per_position,
        kv_floor_figure,
        phase_bars,
        phase_bars_figure,
        step_strip,
        step_strip_figure,
    )
    from specdec_lab.view.heatmap import HeatCell, heatmap_figure, speedup_heatmap
    from specdec_lab.view.svg import acceptance_svg, strip_svg

    run = run_of(engine, CHAIN, "2x40", 12)
    measured = replace(run, header=replace(run.header, labels=()))
    for shown, is_forced in ((run, True), (measured, False)):
        strip, bars, accepted = step_strip(shown), phase_bars(compare([shown])), acceptance_per_position(shown)
        heat = speedup_heatmap([HeatCell(Cell(1, 64), "tuned", CHAIN, 1.2, (1.1, 1.3))], shown.header.labels)
        figures = (step_strip_figure(strip), kv_floor_figure(strip), acceptance_figure(accepted), phase_bars_figure(bars),
                   heatmap_figure(heat))  # fmt: skip
        titles = [figure.layout.title.text for figure in figures] + [strip_svg(strip), acceptance_svg(accepted)]
        assert [("forced alpha 0.7" in title) for title in titles] == [is_forced] * 7
    assert "measured" not in acceptance_figure(acceptance_per_position(run)).layout.title.text.replace("not measured", "")


def test_reports_traces_and_live_views_say_forced(engine, tmp_path):
    from specdec_lab.trace import perfetto, write_run
    from specdec_lab.view.report import write_report

    run = run_of(engine, CHAIN, "2x40", 12)
    page = write_report(tmp_path / "r.html", [run]).read_text()
    assert "forced alpha 0.7" in page[page.index("<h1>") : page.index("</h1>")]
    assert "forced alpha 0.7" in json.dumps(perfetto(run)["traceEvents"][0])
    write_run(run, tmp_path / "t.jsonl")
    assert "forced alpha 0.7" in (tmp_path / "t.jsonl").read_text().splitlines()[0]


def test_labels_that_a_server_must_not_run_on():
    labels = ("acceptance: forced alpha 0.7", "random-weights", "KV fits in cache", "random context", "one shard of 8")
    assert not_measured(labels) == tuple(label for label in labels if label != "KV fits in cache")
    assert forced_label(labels) == labels[0]
    assert forced_label(labels[1:]) is None


def test_acceptance_is_not_measured_where_it_is_forced(engine):
    from specdec_lab.bench.acceptance import Drafting, measure_acceptance

    with pytest.raises(UnsupportedConfig, match="nothing to measure"):
        measure_acceptance(engine, Drafting.parse("self:4+28"), Cell(1, 64), workload="random")


def test_a_policy_from_forced_acceptance_is_refused_unless_told(engine, tmp_path):
    from specdec_lab.bench.tuning import prepare
    from specdec_lab.export import ExportError, export
    from specdec_lab.tune import Protocol
    from specdec_lab.tune.assemble import ForcedAcceptance

    def tuning(**told):
        return prepare(engine, (1,), (64,), 3.0, workload="random", database=tmp_path, run_dir=tmp_path / "run",
                       protocol=Protocol(), **told)  # fmt: skip

    with pytest.raises(ForcedAcceptance, match="--allow-forced"):
        tuning().check()
    with pytest.raises(ForcedAcceptance):
        tuning().run()
    assert not list(tmp_path.glob("**/*.jsonl"))
    policy = tuning(allow_forced=True).run()
    assert "acceptance: forced alpha 0.7" in policy.header["labels"]
    with pytest.raises(ExportError, match="forced alpha 0.7"):
        export(policy, "vllm")


