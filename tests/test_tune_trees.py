"""Trees from measured parts: what is probed, what is composed, what is raced, and what the policy says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import jsonschema
import pytest

import builders
from specdec_lab.policy import Policy, policy_schema
from specdec_lab.records import Cell, SpecConfig, TreeShape
from specdec_lab.trees import Counts, Drafting, choose, path_chances
from specdec_lab.tune import Database, ProbePlan, Protocol, compose, make_plan, tune, verify
from specdec_lab.tune.blocks import run_once
from specdec_lab.tune.compose import Parts, weigh
from specdec_lab.tune.db import Design, Measurement
from specdec_lab.tune.grid import with_trees
from specdec_lab.tune.probe import counts_of, parts_of
from tree_world import DRAFT, TARGET, TreeWorld
from world import IDENTITY, identifiers, spec

PROBE = ProbePlan(least_s=0.001, most_s=20.0)


def probed(world, cell, configs, seconds=2.0, plan=PROBE):
    """Records of the probe's runs in one cell."""
    found = []
    for config in (SpecConfig.off(), *plan.runs(configs, cell)):
        if config.view is not None and config.view.kind == "snapkv" and not config.is_chain:
            continue
        weight = 3 if config.tree == plan.wide else 1
        sample = run_once(world, cell, config, weight * seconds, Protocol(), world.clock)
        found += [
            Measurement(f"m-{cell}-{kind}-{config}", kind, "r", "f.f", "w", 0.0, cell, str(config), Design(), summary=data)
            for kind, data in parts_of(config, sample.scored).items()
        ]
    return found


def views(drafter, *spellings):
    return [SpecConfig.parse(f"{drafter}:{view}/chain1") for view in spellings]


# What is probed


def test_a_probe_asks_for_acceptance_first_then_for_times_then_for_further_views():
    cell = Cell(1, 4096)
    plan = make_plan([1], [4096], 60, ["self", "model", "ngram"], snapkv=(256,), probe=PROBE)
    runs = PROBE.runs(plan.configs[cell], cell)
    assert len(set(runs)) == len(runs)
    assert [(c.drafter, c.tree) for c in runs[:3]] == [(kind, PROBE.wide) for kind in ("self", "model", "ngram")]
    assert str(runs[3]) == "self:4+252/chain4"
    tried = list(dict.fromkeys(str(c.view) for c in runs if c.drafter == "self"))
    assert tried == ["4+252", "snapkv256+32", "4+124"], "near a sixteenth of the context; SnapKV is among the first"
    sizes = {c.num_nodes + 1 for c in runs if c.view is not None}
    assert {2, 3, 5, 8, *PROBE.nodes} <= sizes


def test_snapkv_views_are_candidates_of_self_below_the_length():
    plan = make_plan([1], [400], 60, ["self", "model"], snapkv=(128, 256, 512))
    found = {str(c.view) for c in plan.configs[Cell(1, 400)] if c.view.kind == "snapkv"}
    assert found == {"snapkv128+32", "snapkv128+32r64", "snapkv256+32", "snapkv256+32r64"}
    assert {c.drafter for c in plan.configs[Cell(1, 400)] if c.view.kind == "snapkv"} == {"self"}


def test_parts_are_undisturbed_times_and_counts_of_ranks():
    world, cell, config = TreeWorld(noise=0.02), Cell(3, 512), spec("model:4+60/4,1")
    sample = run_once(world, cell, config, 0.5, Protocol(), world.clock)
    parts = parts_of(config, sample.scored)
    draft, verify, rest = world.parts_s(cell, config)
    assert parts["draft"]["draft_s"] == pytest.approx(draft, rel=0.04)
    assert parts["verify"]["verify_s"] == pytest.approx(verify, rel=0.04)
    assert parts["verify"]["overhead_s"] == pytest.approx(rest, rel=0.04)
    assert parts["verify"]["nodes"] == 9
    root, below = counts_of(parts["acceptance"])
    assert root.num_nodes == 3 * len(sample.scored)
    assert set(root.examined) == {4}
    assert set(below.examined) == {1}
    assert "acceptance" not in parts_of(SpecConfig.off(), sample.scored)
    stalled = [replace(step, wall_s=step.wall_s + 1.0, linear_s=step.linear_s + 1.0) for step in sample.scored[::2]]
    assert parts_of(config, [*stalled, *sample.scored[1::2]])["verify"]["verify_s"] == pytest.approx(verify, rel=0.06)


def test_a_text_drafter_that_finds_no_match_was_not_accepted():
    steps = [
        builders.round_step((0, 0), config="ngram/2,1", drafted=(0, 0)),
        builders.round_step((2, 0), config="ngram/2,1", drafted=(2, 0), nodes=((0, 2), ()), ranks=((1, 1), ())),
    ]
    acceptance = parts_of(spec("ngram/2,1"), steps)["acceptance"]
    root, below = counts_of({"by_depth": acceptance["by_depth"]})
    assert root.examined == {2: (3, 1, 0)}, "four examined roots, one accepted child"
    assert below.examined == {1: (0, 1)}
    assert acceptance["matched"] == 0.5
    on_device = [replace(steps[0], query_tokens=4), steps[1]]  # a device verifies padding
    assert parts_of(spec("ngram/2,1"), on_device)["acceptance"]["matched"] == 1.0


# What is composed


def test_acceptance_pools_over_batches_and_windowed_drafting_over_lengths():
    world, configs = TreeWorld(), views("model", "4+60")
    one, four = probed(world, Cell(1, 512), configs, 0.1), probed(world, Cell(4, 512), configs, 0.1)
    drafting = Drafting.parse("model:4+60")
    alone, both = (Parts.of(Cell(4, 512), records).drafts[drafting] for records in (four, [*one, *four]))
    assert sum(both.counts, Counts()).num_nodes > sum(alone.counts, Counts()).num_nodes
    assert both.seconds == alone.seconds, "other batches draft at other speeds"
    longer = [r for r in probed(world, Cell(4, 4096), configs, 0.1) if r.kind != "draft"]
    assert Parts.of(Cell(4, 4096), [*four, *longer]).drafts[drafting].seconds == alone.seconds
    assert Parts.of(Cell(4, 4096), four) is None, "the target's forward is the cell's own"


def test_sizes_that_were_not_run_are_not_guessed():
    records = probed(TreeWorld(), Cell(1, 512), views("model", "4+60"), 0.1)
    sizes = set(Parts.of(Cell(1, 512), records).verify_s)
    assert sizes == {c.num_nodes + 1 for c in PROBE.runs(views("model", "4+60"), Cell(1, 512))}
    best = compose(Cell(1, 512), records).choice.tree
    assert best.num_nodes + 1 in sizes


@pytest.mark.parametrize(("p1", "b"), [(0.75, 1.2), (0.85, 1.5)])
def test_composed_answers_are_nearly_the_best_of_every_cell(p1, b):
    regrets = []
    for cell in (Cell(batch, length) for batch in (1, 4, 16, 64) for length in (512, 4096, 32768)):
        if cell.batch * cell.length > 2**20:
            continue
        world = TreeWorld(p1=p1, b=b, noise=0.02, seed=cell.batch)
        configs = [*views("model", "4+252"), *views("self", "4+252")]
        found = compose(cell, probed(world, cell, configs, 0.4)).best.config
        truth = max(1.0, *(world.best(cell, config)[0] for config in configs))
        regrets.append(1 - world.speedup(cell, found) / truth)
    assert sum(regret <= 0.02 for regret in regrets) >= 0.9 * len(regrets), regrets
    assert max(regrets) < 0.04


def test_the_answer_is_a_tree_a_chain_or_off_where_that_is_right_and_says_why():
    world = TreeWorld(p1=0.85, b=1.5)
    small, large = Cell(1, 512), Cell(64, 512)
    tree = compose(small, probed(world, small, views("model", "4+252"), 0.4))
    assert not tree.best.config.is_chain
    assert tree.choice.nodes > 20, "verify has room at batch 1"
    assert "would give up" in tree.choice.reason
    chain = compose(large, probed(world, large, views("model", "4+252"), 0.4))
    assert chain.best.config.is_chain, "past the ridge every node costs: limits.py says the same"
    assert world.best(large, views("model", "4+252")[0])[1].is_chain
    off = compose(small, probed(world, small, views("self", "4+252"), 0.4))
    assert off.best.config.is_off, "a self-draft reads the weights again"
    assert off.choice.reason.startswith("off: ")
    assert off.proposals, "raced all the same: a prediction decides nothing"


def test_margins_are_the_marginal_rule_at_the_border_of_the_tree():
    world = TreeWorld(p1=0.8, b=1.0)
    cell, drafter = Cell(16, 4096), views("model", "4+252")[0]
    keys = 256
    verify = {n: world.forward_s(TARGET, cell, n, cell.length) for n in range(1, 65)}
    choice = choose(world.chances(cell, drafter), lambda w: world.forward_s(DRAFT, cell, w, keys), verify, 9)
    assert choice.branching is not None
    assert choice.branching.speedup == choice.speedup > choice.chain.speedup
    assert choice.kept.pays
    assert not choice.left_out.pays
    assert choice.kept.chance == min(path_chances(choice.tree, world.chances(cell, drafter)))
    assert choice.left_out.chance > choice.kept.chance, "it opens a level, which takes a draft forward of its own"


def test_snapkv_that_draws_no_trees_is_composed_as_a_chain_and_a_view_borrows_widths():
    world, cell = TreeWorld(), Cell(16, 32768)
    configs = views("self", "4+2044", "snapkv2048+32", "4+4092")
    records = probed(world, cell, configs, 0.3)
    parts = Parts.of(cell, records)
    listed = weigh(parts, Drafting.parse("self:snapkv2048+32"))
    assert listed.chain is not None
    assert listed.branching is None
    assert weigh(parts, Drafting.parse("self:4+4092")).branching is not None


# What is raced, and what the policy says


USUAL = {"protocol": Protocol(race_run_s=0.1, duel_run_s=0.4, race_blocks=4, max_trials=12), "probe": ProbePlan(most_s=8.0)}
BRIEF = {"protocol": Protocol(race_run_s=0.02, duel_run_s=0.05, race_blocks=2, max_trials=4), "probe": ProbePlan(most_s=8.0)}


def tuned(tmp_path, world, batches=(1,), lengths=(512,), budget_s=100.0, name="run", made=None, **options):
    plan = make_plan(batches, lengths, budget_s, ["model", "self"], windows=(64, 256), chains=(1, 2, 3, 4), snapkv=(128,),
                     **(made or USUAL))  # fmt: skip
    database = Database(tmp_path / "db", IDENTITY, "tiny")
    options = {"workload": "prose", "clock": world.clock, "now": lambda: "2026-01-02T03:04:05Z", **options}
    return tune(plan, world, IDENTITY, database, run_dir=tmp_path / "runs" / name, **options)


def test_a_composed_tree_that_wins_its_race_is_in_the_policy_with_its_reason(tmp_path):
    world = TreeWorld(p1=0.8, b=1.0, noise=0.01)
    policy = tuned(tmp_path, world, lengths=(512, 4096))
    assert [row.state for row in policy.table] == ["tuned", "tuned"]
    for row in policy.table:
        assert not spec(row.config).is_chain
        assert row.estimates[row.config].how == "measured"
        assert row.details["composed"]["how"] == "composed"
        assert row.why.startswith("composed for model:")
        assert row.speedup == pytest.approx(row.details["composed"]["speedup"], rel=0.08)
        truth = world.best(row.cell, views("model", "4+252")[0])[0]
        assert world.speedup(row.cell, spec(row.config)) > 0.97 * truth
    path = tmp_path / "runs" / "run" / "policy.json"
    jsonschema.validate(json.loads(path.read_text()), dict(policy_schema()))
    assert Policy.load(path).dumps() == path.read_text()
    assert verify(path, tmp_path / "db" / "TEST_CPU_2t") == ()
    records = [*Database(tmp_path / "db", IDENTITY, "tiny")]
    assert {r.kind for r in records} >= {"verify", "draft", "acceptance", "race", "duel"}
    assert all(len(record.line()) < 1500 for record in records)
    refused = {r.config for r in records if r.status == "infeasible"}
    assert refused == {f"self:snapkv128+32/{PROBE.wide}"}, "a failure is a record, and the rest goes on"


class Disappointing(TreeWorld):
    """Trees take three times as long once the probe is over."""

    is_over = False

    def told(self, progress):
        self.is_over = progress.stage != "probe"

    def parts_s(self, cell, config):
        draft, verify, rest = super().parts_s(cell, config)
        late = self.is_over and config.tree is not None and not config.is_chain
        return (draft, 3 * verify, rest) if late else (draft, verify, rest)


def test_measured_wins_over_composed(tmp_path):
    world = Disappointing(p1=0.8, b=1.0)
    policy = tuned(tmp_path, world, report=world.told)
    row = policy.table[0]
    assert spec(row.config).is_chain
    assert not SpecConfig.parse(row.details["composed"]["config"]).is_chain
    assert row.why.endswith(f"Measured otherwise: {row.config} won")
    assert row.details["composed"]["config"] not in policy.portfolio


def stop_after(world, calls):
    real = world.__class__.__call__

    class Stopping(world.__class__):
        def __call__(self, cell, config):
            if self.num_calls == calls:
                raise KeyboardInterrupt
            return real(self, cell, config)

    world.__class__ = Stopping
    return world


@pytest.mark.parametrize("calls", [5, 40, 90])
def test_an_interrupted_probe_or_race_resumes_to_the_same_policy(tmp_path, monkeypatch, calls):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    whole = tuned(tmp_path / "whole", TreeWorld(), budget_s=1e6, made=BRIEF)
    partial = tuned(tmp_path / "cut", stop_after(TreeWorld(), calls), budget_s=1e6, made=BRIEF)
    assert "interrupted" in partial.header["labels"]
    again = tuned(tmp_path / "cut", TreeWorld(), budget_s=1e6, made=BRIEF)
    assert [row.to_dict() for row in again.table] == [row.to_dict() for row in whole.table]
    ids = [identifiers(tmp_path / side) for side in ("whole", "cut")]
    assert ids[0] == ids[1]


def test_a_cell_whose_search_did_not_begin_still_says_what_its_parts_promise(tmp_path):
    world = TreeWorld()
    asked = []

    def stop():
        asked.append(world.num_calls)
        return (tmp_path / "runs" / "run" / "proposed.json").exists()

    row = tuned(tmp_path, world, made=BRIEF, stop=stop).table[0]
    assert (row.state, row.config) == ("not_visited", None)
    assert row.details["composed"]["speedup"] > 1
    assert "composed for model" in row.why


def test_a_small_budget_leaves_the_probe_out_and_says_so(tmp_path):
    plan = make_plan([1], [512], 5.0, ["model"], probe=ProbePlan())
    assert "parts are not probed, so no trees are composed: 15% of 5.0 s is less than the 1.5 s" in plan.describe()
    large = make_plan([1], [512], 60.0, ["model"], probe=ProbePlan())
    assert "short runs in about 9.0 s show a cell's parts" in large.describe()
    assert "parts" not in make_plan([1], [512], 60.0, ["model"]).describe()
    tune(plan, world := TreeWorld(), IDENTITY, Database(tmp_path / "db", IDENTITY, "tiny"), run_dir=tmp_path / "run",
         workload="prose", clock=world.clock)  # fmt: skip
    assert not {m.kind for m in Database(tmp_path / "db", IDENTITY, "tiny")} & {"verify", "draft", "acceptance"}


def test_trees_come_through_every_window_of_their_drafter_and_only_where_they_fit():
    cell, wide = Cell(1, 512), spec("model:4+60/4,1")
    configs = make_plan([1], [512], 9, ["self", "model"], windows=(64, 256), snapkv=(128,)).configs[cell]
    found = set(with_trees(configs, [wide, spec("model:4+1020/2"), spec("self:4+60/chain3")], cell)) - set(configs)
    assert found == {wide, spec("model:4+252/4,1")}
    assert with_trees(configs, [], cell) == configs
    assert TreeShape.branching([4, 1]) == wide.tree
