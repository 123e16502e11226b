"""The tuner in a world whose best answer is known: what it finds, what it records, what it does with failures."""

from __future__ import annotations

import hashlib
import json
import math

import jsonschema
import optuna
import pytest

from specdec_lab.policy import Policy, policy_schema
from specdec_lab.records import Cell
from specdec_lab.tune import Database, Protocol, make_plan, verify
from world import IDENTITY, OFF, QUICK, World, keys, run, small_plan, spec

# What it finds


def test_the_tuner_finds_nearly_the_best_of_every_cell(tmp_path):
    world = World(noise=0.02, is_even=True)
    plan = make_plan([1, 4], [512, 2048], 160, ["self", "model", "ngram"])
    policy = run(tmp_path, world, plan)
    regrets = []
    for row in policy.table:
        truth = max(1.0, *(world.speedup(row.cell, config) for config in plan.configs[row.cell]))
        regrets.append(1 - world.speedup(row.cell, spec(row.config)) / truth)
    assert sorted(regrets)[-2] <= 0.02, regrets
    assert max(regrets) < 0.05
    tried = {(m.cell, m.config) for m in Database(tmp_path / "db", IDENTITY, "tiny")}
    assert len(tried) < 0.3 * sum(len(configs) for configs in plan.configs.values())


def test_plain_decoding_wins_where_it_wins(tmp_path):
    world = World(noise=0.02, per_token=2e-3, is_even=True, rates={"self": 0.7, "model": 0.7, "ngram": 0.35})
    plan = make_plan([1, 16], [512, 8192], 160, ["self", "model", "ngram"])
    policy = run(tmp_path, world, plan)
    rows = {str(row.cell): row for row in policy.table}
    for cell in plan.cells:
        best = max(world.speedup(cell, config) for config in plan.configs[cell])
        row = rows[str(cell)]
        assert (row.config == "off") == (best < 1), (cell, best, row)
        assert policy.lookup(cell.batch, cell.length) == spec(row.config)
    assert {row.config for row in policy.table} > {"off"}
    off = next(row for row in policy.table if row.config == "off")
    assert (off.speedup, off.speedup_ci95, off.tokens_per_s) == (1.0, (1.0, 1.0), off.baseline_tokens_per_s)
    assert off.details["best_candidate"]["speedup"] < 1.03
    assert off.baseline_tokens_per_s == pytest.approx(off.cell.batch / world.step_s(off.cell, OFF)[1], rel=0.02)


def test_intervals_hold_the_truth_although_little_text_was_seen(tmp_path):
    held = total = 0
    protocol = Protocol(race_run_s=0.1, duel_run_s=0.4, max_trials=3, race_blocks=2)
    for seed in range(3):
        world = World(noise=0.01, seed=seed)
        policy = run(tmp_path / str(seed), world, small_plan(batches=(1, 4), protocol=protocol))
        for row in policy.table:
            for name, estimate in row.estimates.items():
                held += estimate.ci95[0] <= world.speedup(row.cell, spec(name)) <= estimate.ci95[1]
                total += 1
    assert total >= 12
    assert held >= 0.8 * total


def test_the_policy_is_valid_verified_and_stable(tmp_path):
    world = World(noise=0.01)
    policy = run(tmp_path, world, small_plan(fits=lambda cell: "9 GiB > 8 GiB free" if cell.length > 512 else None))
    path = tmp_path / "runs" / "run" / "policy.json"
    assert Policy.load(path).dumps() == path.read_text() == policy.dumps()
    jsonschema.validate(json.loads(path.read_text()), dict(policy_schema()))
    folder = tmp_path / "db" / "TEST_CPU_2t"
    assert verify(path, folder) == ()
    assert [row.state for row in policy.table] == ["tuned", "infeasible"]


def test_verify_says_what_changed(tmp_path):
    run(tmp_path, World(), small_plan())
    path, folder = tmp_path / "runs" / "run" / "policy.json", tmp_path / "db" / "TEST_CPU_2t"
    records = folder / "tiny--model.jsonl"
    with records.open("a") as stream:
        stream.write("more lines by another tuner\n")
    assert verify(path, folder) == (), "evidence is the file as it was"
    records.write_text(records.read_text().replace('"log_speedup":0.', '"log_speedup":0.9'))
    problems = verify(path, folder)
    assert "tiny--model.jsonl: the first" in problems[0]
    assert "rebuilding gives other bytes: cells 2x512" in problems[1]


def test_every_portfolio_configuration_is_estimated_in_every_tuned_cell(tmp_path):
    policy = run(tmp_path, World(noise=0.01), small_plan(batches=(1, 4), drafters=("self", "model")))
    assert len(policy.portfolio) > 1
    for row in policy.table:
        assert set(row.estimates) == set(policy.portfolio) - {"off"}
        assert all(estimate.how == "measured" and estimate.ids for estimate in row.estimates.values())


def test_rows_explain_themselves(tmp_path):
    world = World()
    policy = run(tmp_path, world, small_plan())
    row = next(row for row in policy.table if row.config != "off")
    config, details = spec(row.config), row.details
    plain, ours = world.step_s(row.cell, OFF)[1], sum(world.step_s(row.cell, config))
    assert details["break_even_acceptance_length"] == pytest.approx(ours / plain, rel=1e-6)
    assert details["mean_acceptance_length"] / details["break_even_acceptance_length"] == pytest.approx(row.speedup, rel=1e-6)
    assert row.tokens_per_s / row.baseline_tokens_per_s == pytest.approx(row.speedup, rel=1e-6)
    assert details["draft_s"] + details["verify_s"] == pytest.approx(ours, rel=1e-6)
    assert len(details["acceptance_rate_per_pos"]) == config.depth
    assert (details["num_blocks"], details["confirmed_by"]) == (6, ["duel"])
    assert policy.header["drafters"].keys() == IDENTITY.drafters.keys()
    assert policy.mismatch(IDENTITY) is None


def test_temperature_and_workload_keep_their_records_apart(tmp_path):
    run(tmp_path, World(), small_plan())
    before = keys(tmp_path)
    run(tmp_path, World(), small_plan(), name="warm", temperature=0.8)
    run(tmp_path, World(), small_plan(), name="code", workload="code")
    after = Database(tmp_path / "db", IDENTITY, "tiny")
    assert len([m for m in after if m.config != "off"]) == 3 * len(before)
    assert after.policy_path("prose").name == "tiny--prose.policy.json"
    assert after.policy_path("prose", 0.8).name == "tiny--prose-t0.8.policy.json"


# Records before decisions


def test_every_block_is_on_disk_before_optuna_hears_of_it(tmp_path, monkeypatch):
    db = Database(tmp_path / "db", IDENTITY, "tiny")
    seen = []

    def report(trial, value, step):
        written = [m.summary.get("log_speedup") for m in Database(tmp_path / "db", IDENTITY, "tiny")]
        seen.append(any(v is not None and math.isclose(v, value, rel_tol=1e-8) for v in written))

    monkeypatch.setattr(optuna.Trial, "report", report)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: False)
    run(tmp_path, World(noise=0.02), small_plan(lengths=(512,)), database=db)
    assert len(seen) >= 4
    assert all(seen)


def test_a_block_is_four_runs_and_two_lines_that_point_at_each_other(tmp_path):
    world = World()
    run(tmp_path, world, small_plan(lengths=(512,)))
    records = {m.id: m for m in Database(tmp_path / "db", IDENTITY, "tiny")}
    pairs = [m for m in records.values() if m.design.pair_of]
    assert pairs
    for ours in pairs:
        plain = records[ours.design.pair_of]
        assert (plain.config, plain.kind, plain.design.block) == ("off", ours.kind, ours.design.block)
        ratio = ours.summary["tokens_per_s"] / plain.summary["tokens_per_s"]
        assert ours.summary["log_speedup"] == pytest.approx(math.log(ratio))
        assert ours.design.order == ("BAAB" if ours.design.block % 2 else "ABBA")
        raw = tmp_path / "runs" / "run" / "raw" / f"{ours.id}.jsonl.gz"
        assert hashlib.sha256(raw.read_bytes()).hexdigest() == ours.raw_sha256
        assert len(ours.line()) < 1500


def test_failures_are_records_and_the_others_go_on(tmp_path):
    plan = small_plan(lengths=(512,), protocol=Protocol(race_run_s=0.05, race_blocks=2, max_trials=99))
    configs = [str(c) for c in plan.configs[Cell(2, 512)]]
    unsupported, oom, lie = configs[0], configs[9], configs[-1]
    world = World(unsupported={unsupported}, too_large={oom}, liars={lie})
    policy = run(tmp_path, world, plan)
    failed = {m.config: m for m in Database(tmp_path / "db", IDENTITY, "tiny") if m.status != "ok"}
    assert {config: m.status for config, m in failed.items()} == {unsupported: "infeasible", oom: "oom", lie: "mismatch"}
    assert "not here" in failed[unsupported].reason
    assert "123 bytes" in failed[oom].reason
    assert "row 0 emits token" in failed[lie].reason
    assert not failed.keys() & set(policy.portfolio)
    assert world.calls["2x512", unsupported] == 1
    assert world.calls["2x512", lie] <= 3, "its warm-up and one block"


def test_a_leader_that_is_caught_in_its_duel_makes_room_for_the_next(tmp_path):
    plan = small_plan(lengths=(2048,))
    leader = run(tmp_path / "honest", World(), plan).table[0].config
    assert leader != "off"
    policy = run(tmp_path / "lying", World(late_liars={leader}), plan)
    records = [m for m in Database(tmp_path / "lying" / "db", IDENTITY, "tiny") if m.config == leader]
    assert {m.kind for m in records if m.status == "ok"} == {"race"}
    assert [m.kind for m in records if m.status == "mismatch"] == ["duel"]
    assert policy.table[0].config not in (leader, "off")
    assert leader not in policy.table[0].estimates


def test_wrong_tokens_matter_only_where_there_is_one_right_answer(tmp_path):
    plan = small_plan(lengths=(512,), drafters=("ngram",))
    liars = {str(c) for c in plan.configs[Cell(2, 512)]}
    world = World(liars=liars, rates={"ngram": 0.9})
    greedy = run(tmp_path, world, plan)
    assert greedy.table[0].config == "off"
    warm = run(tmp_path, world, plan, name="warm", temperature=1.0)
    assert warm.table[0].config in liars


def test_a_cell_that_cannot_even_decode_plainly_is_infeasible(tmp_path):
    policy = run(tmp_path, World(too_large={"off"}), small_plan(lengths=(512,)))
    assert policy.table[0].state == "infeasible"
    assert "123 bytes" in policy.table[0].reason
    statuses = [m.status for m in Database(tmp_path / "db", IDENTITY, "tiny")]
    assert statuses == ["oom"]


def test_a_workload_too_short_to_measure_says_so(tmp_path):
    policy = run(tmp_path, World(max_new_tokens=2), small_plan(lengths=(512,)))
    assert "ended after 1 rounds in which all rows were live" in policy.table[0].reason


def test_busy_blocks_are_measured_again_up_to_a_cap_and_labelled(tmp_path):
    calm = run(tmp_path / "calm", World(), small_plan(lengths=(512,)))
    assert calm.header["labels"] == []
    once = World(busy_calls=set(range(4, 8)))
    run(tmp_path / "once", once, small_plan(lengths=(512,)))
    statuses = [m.status for m in Database(tmp_path / "once" / "db", IDENTITY, "tiny") if m.design.pair_of]
    assert statuses.count("throttled") == 1
    always = run(tmp_path / "always", World(busy_calls=set(range(10**4))), small_plan(lengths=(512,)))
    assert always.header["labels"] == ["busy"]
    statuses = [m.status for m in Database(tmp_path / "always" / "db", IDENTITY, "tiny") if m.design.pair_of]
    assert statuses.count("throttled") == QUICK.busy_retries
    assert keys(tmp_path / "calm") == sorted({*keys(tmp_path / "always")})
