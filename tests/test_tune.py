"""The tuner in a world whose best answer is known: what it finds, records, survives and resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import optuna
import pytest

from builders import off_step, prefill_step, round_step
from specdec_lab.policy import Policy, policy_schema
from specdec_lab.records import Cell, Identity, SpecConfig, UnsupportedConfig
from specdec_lab.tune import Database, DatabaseError, Plan, PlanChanged, Protocol, candidates, make_plan, tune, verify
from specdec_lab.tune.assemble import CellEvidence
from specdec_lab.tune.blocks import first_difference, log_speedup, measure_block, run_once, summarize_runs
from specdec_lab.tune.db import Design, Measurement
from specdec_lab.tune.duel import finalist, verdict
from specdec_lab.tune.grid import starting_points
from specdec_lab.tune.search import CellSearch, SearchSpace, open_journal
from world import IDENTITY, World

OFF = SpecConfig.off()
QUICK = Protocol(race_run_s=0.05, duel_run_s=0.2, race_blocks=2, pilot_blocks=2, max_trials=4)


def spec(text):
    return SpecConfig.parse(text)


def small_plan(budget_s=1e6, batches=(2,), lengths=(512, 2048), drafters=("model", "ngram"), protocol=QUICK, **options):
    return make_plan(batches, lengths, budget_s, drafters, protocol=protocol, **options)


def run(tmp_path, world, plan, name="run", database=None, **options):
    database = Database(tmp_path / "db", IDENTITY, "tiny") if database is None else database
    options = {"workload": "prose", "clock": world.clock, "now": lambda: "2026-01-02T03:04:05Z", **options}
    return tune(plan, world, IDENTITY, database, run_dir=tmp_path / "runs" / name, **options)


def keys(tmp_path):
    return sorted(m.key for m in Database(tmp_path / "db", IDENTITY, "tiny") if m.config != "off")


def identifiers(tmp_path):
    return {m.id for m in Database(tmp_path / "db", IDENTITY, "tiny")}


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


# Budget, progress, stopping


def test_the_budget_ends_the_run_within_a_block_and_the_policy_says_what_is_missing(tmp_path):
    world = World()
    block = 0.0
    marks = []

    def report(progress):
        marks.append(world.seconds)

    policy = run(tmp_path, world, small_plan(budget_s=6.0, batches=(1, 4), lengths=(512, 8192)), report=report)
    block = max(b - a for a, b in zip(marks, marks[1:], strict=False))
    assert world.seconds < 6.0 + 2 * block
    assert "partial" in policy.header["labels"]
    reasons = [row.reason for row in policy.table if row.state == "not_visited"]
    assert reasons
    assert all("budget ended" in reason for reason in reasons)
    jsonschema.validate(json.loads(policy.dumps()), dict(policy_schema()))


def test_no_budget_at_all_still_gives_a_policy(tmp_path):
    policy = run(tmp_path, World(), small_plan(budget_s=1e-9))
    assert {row.state for row in policy.table} == {"not_visited"}
    assert policy.lookup(2, 512).is_off


def test_progress_is_told_before_and_after_each_block(tmp_path):
    told = []
    policy = run(tmp_path, World(), small_plan(budget_s=500.0), report=told.append)
    blocks = [p for p in told if p.stage != "cell"]
    for before, after in zip(blocks[::2], blocks[1::2], strict=True):
        assert (before.config, before.block, before.status) == (after.config, after.block, None)
        assert after.status == "ok"
    assert [p.stage for p in told if p.stage == "cell"] == ["cell", "cell"]
    last = [p for p in told if p.stage == "cell"][-1]
    assert (last.done, last.total, last.status) == (2, 2, "tuned")
    assert {row.config for row in policy.table} == {p.best for p in told if p.stage == "cell"}
    assert all(0 <= p.eta_s <= 500 and p.elapsed_s >= 0 for p in told)
    assert any(p.stage == "duel" for p in told)
    assert max(p.speedup for p in told) > 1


def stop_after(calls):
    def on_call(world):
        if world.num_calls == calls:
            raise KeyboardInterrupt

    return on_call


@pytest.mark.parametrize("calls", [1, 2, 7, 20, 44])
def test_an_interrupt_loses_at_most_the_running_block_and_resume_completes(tmp_path, monkeypatch, calls):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = run(whole, World(), small_plan())
    stopped = World(on_call=stop_after(calls))
    partial = run(cut, stopped, small_plan())
    assert "interrupted" in partial.header["labels"]
    assert any("interrupted" in row.reason for row in partial.table)
    before = identifiers(cut)
    done = [m for m in Database(cut / "db", IDENTITY, "tiny") if m.design.pair_of]
    assert len(done) >= (calls - 4) // 4 - 3, "every finished block is there"
    assert stopped.closed == stopped.num_calls - 1
    world = World()
    resumed = run(cut, world, small_plan())
    assert before <= identifiers(cut) == identifiers(whole)
    assert [row.to_dict() for row in resumed.table] == [row.to_dict() for row in expected.table]
    measured = sum(count for (_, config), count in world.calls.items() if config != "off")
    assert measured < sum(2 + 1 for m in Database(cut / "db", IDENTITY, "tiny") if m.design.pair_of and m not in done) + 6
    assert verify(cut / "runs" / "run" / "policy.json", cut / "db" / "TEST_CPU_2t") == ()


def test_a_stop_is_obeyed_between_blocks(tmp_path):
    world = World()
    policy = run(tmp_path, world, small_plan(), stop=lambda: world.num_calls >= 30)
    assert 30 <= world.num_calls <= 40
    assert "interrupted" in policy.header["labels"]


def test_finished_work_is_not_measured_again(tmp_path):
    first = run(tmp_path, World(), small_plan())
    before = identifiers(tmp_path)
    same_run = World()
    assert run(tmp_path, same_run, small_plan()).table == first.table
    assert same_run.num_calls == 0
    new_run = World()
    run(tmp_path, new_run, small_plan(), name="another")
    assert {config for _, config in new_run.calls} == {"off"}, "recorded blocks serve another run of the same experiment"
    assert identifiers(tmp_path) == before


def kill(*_):
    raise SystemExit("killed")


@pytest.mark.parametrize("place", ["report", "tell", "set_user_attr"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_kill_between_append_and_tell_loses_and_doubles_nothing(tmp_path, monkeypatch, place, count):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, World(), small_plan())
    owner = optuna.Study if place == "tell" else optuna.Trial
    real, left = getattr(owner, place), [count]

    def dying(*args, **kwargs):
        left[0] -= 1
        return kill() if left[0] == 0 else real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, dying)
        with pytest.raises(SystemExit):
            run(cut, World(), small_plan())
    before = identifiers(cut)
    assert before
    run(cut, World(), small_plan())
    assert before <= identifiers(cut) == identifiers(whole)
    assert keys(cut) == sorted(set(keys(cut)))
    study = optuna.load_study(study_name="cell/2x512", storage=open_journal(cut / "runs" / "run" / "journal.log"))
    states = [trial.state.name for trial in study.trials]
    assert "RUNNING" not in states
    assert states.count("FAIL") == 1


def test_a_journal_cut_in_the_middle_of_a_line_is_still_read(tmp_path):
    run(tmp_path, World(on_call=stop_after(20)), small_plan())
    journal = tmp_path / "runs" / "run" / "journal.log"
    with journal.open("a") as stream:
        stream.write('{"op_code": 4, "worker')
    policy = run(tmp_path, World(), small_plan())
    assert {row.state for row in policy.table} == {"tuned"}


TUNER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_tune import World, run, small_plan
run(Path({root!r}), World(noise=0.02, seed={seed}), small_plan(), name="run{seed}", seed={seed})
"""


def test_two_tuners_on_one_database_lose_no_line(tmp_path):
    path = [str(Path(__file__).parent), *sys.path]
    code = [TUNER.format(path=path, root=str(tmp_path), seed=seed) for seed in (1, 2)]
    running = [subprocess.Popen([sys.executable, "-c", text]) for text in code]
    assert [process.wait() for process in running] == [0, 0]
    db = Database(tmp_path / "db", IDENTITY, "tiny")
    assert not db.skipped
    by_run = {name: [m for m in db if m.run.startswith(name)] for name in ("run1", "run2")}
    for name, records in by_run.items():
        raw = {path.name.split(".")[0] for path in (tmp_path / "runs" / name / "raw").iterdir()}
        assert raw == {m.id for m in records if m.design.pair_of}
        assert verify(tmp_path / "runs" / name / "policy.json", db.folder) == ()
    assert sum(map(len, by_run.values())) == len(db)


def test_one_run_folder_belongs_to_one_tuner_and_one_plan(tmp_path):
    world = World()
    inner = []

    def report(progress):
        if not inner:
            inner.append(True)
            with pytest.raises(DatabaseError, match="another tuner is running in this run folder"):
                run(tmp_path, World(), small_plan())

    run(tmp_path, world, small_plan(), report=report)
    assert inner
    with pytest.raises(PlanChanged, match=r"another plan \(cells, configs differ\).*recorded measurements are used again"):
        run(tmp_path, World(), small_plan(lengths=(512,)))
    (tmp_path / "runs" / "run" / "plan.json").write_text("{")
    with pytest.raises(PlanChanged, match="is not the JSON of a tuning run"):
        run(tmp_path, World(), small_plan())


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_finished_block(tmp_path, monkeypatch):
    db = Database(tmp_path / "db", IDENTITY, "tiny")
    world, real, left = World(), os.fsync, [12]

    def fsync(handle):
        target = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else ""
        if "/db/" in target:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DatabaseError, match="No space left on device; [12] finished measurements are kept") as caught:
            run(tmp_path, world, small_plan(), database=db)
    kept = caught.value.measurements
    assert kept
    assert not {m.id for m in kept} & identifiers(tmp_path)
    run(tmp_path, World(), small_plan(), database=db)
    assert {m.id for m in kept} <= identifiers(tmp_path)


def test_a_read_only_database_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    world = World()
    real = os.open

    def refuse(path, *rest, **named):
        if "/db/" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DatabaseError, match="Read-only file system"):
        run(tmp_path, world, small_plan())
    assert world.num_calls == 0


def test_an_unwritable_run_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(DatabaseError, match="cannot be used: (Not a directory|File exists).*writable run folder"):
        run(tmp_path, World(), small_plan())


def test_another_model_does_not_use_these_records(tmp_path):
    run(tmp_path, World(), small_plan())
    other = Identity(IDENTITY.device, {**IDENTITY.base, "target": "e" * 12}, IDENTITY.drafters)
    world = World()
    db = Database(tmp_path / "db", other, "tiny")
    policy = tune(small_plan(), world, other, db, run_dir=tmp_path / "runs" / "other", workload="prose", clock=world.clock)
    assert world.num_calls > 40
    assert policy.mismatch(IDENTITY)
    assert policy.mismatch(other) is None


# Plans


def test_a_plan_drops_what_does_not_fit_before_anything_runs():
    def fits(cell):
        return f"KV {cell.batch * cell.length} bytes > 9,000 free" if cell.batch * cell.length > 9000 else None

    plan = make_plan([4, 1], [4096, 512], 60, ["self", "ngram"], fits=fits)
    assert [str(cell) for cell in plan.cells] == ["1x512", "4x512", "1x4096"]
    assert {str(cell): reason for cell, reason in plan.infeasible.items()} == {"4x4096": "KV 16384 bytes > 9,000 free"}
    words = plan.describe()
    assert "3 cells in at most 60 s" in words
    assert "4x4096: left out, KV 16384 bytes" in words
    assert "1x512: 56 candidates (48 self, 8 ngram)" in words


def test_candidates_are_windows_of_powers_of_two_not_above_the_length():
    found = candidates(Cell(1, 100), ["self"])
    assert {str(c.view) for c in found} == {"4+12", "4+28", "4+60"}
    assert {c.num_nodes for c in found} == set(range(1, 9))
    assert [str(c) for c in candidates(Cell(1, 100), ["ngram"], chains=(2, 4))] == ["ngram/chain2", "ngram/chain4"]


def test_starting_points_are_one_good_guess_per_drafter():
    cell = Cell(4, 4096)
    guesses = starting_points(candidates(cell, ["self", "model", "ngram"]), cell)
    assert [str(g) for g in guesses] == ["self:4+252/chain3", "model:4+252/chain3", "ngram/chain3"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_plan([], [512], 1, ["self"]), "at least one batch"),
        (lambda: make_plan([1], [512], 0, ["self"]), "budget_s must be above 0"),
        (lambda: make_plan([1], [8], 1, ["self"]), "no candidate for 1x8"),
        (lambda: Plan((Cell(1, 1), Cell(1, 1)), {Cell(1, 1): (spec("ngram/chain1"),)}, 1.0), "a cell twice"),
        (lambda: Protocol(duel_blocks=5), "at least 6"),
        (lambda: Protocol(min_rounds=1), "at least 2 rounds"),
        (lambda: Protocol(min_speedup=0.9), "slower is never chosen"),
    ],
)
def test_plans_that_make_no_sense_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# Blocks


def test_a_run_scores_rounds_after_warm_up_while_all_rows_are_live_and_closes_the_stream():
    closed = []

    def measure(cell, config):
        try:
            yield prefill_step()
            yield off_step(scale=100.0)
            yield from (off_step() for _ in range(5))
            yield off_step(frozen=(1,))
            yield off_step()
        finally:
            closed.append(True)

    sample = run_once(measure, Cell(2, 512), OFF, 1e9, Protocol(), lambda: 0.0)
    assert (len(sample.scored), closed) == (5, [True])
    assert {step.wall_s for step in sample.scored} == {off_step().wall_s}
    assert [len(row) for row in sample.tokens] == [7, 6]


def test_a_run_ends_when_its_time_is_over_but_not_before_its_least_rounds():
    world = World()
    cell = Cell(1, 512)
    least = run_once(world, cell, OFF, 0.0, Protocol(), world.clock)
    long = run_once(world, cell, OFF, 1.0, Protocol(), world.clock)
    assert len(least.scored) == Protocol().min_rounds
    assert sum(step.wall_s for step in long.scored) == pytest.approx(1.0, rel=0.02)


def test_the_statistic_is_tokens_over_time_of_the_scored_rounds():
    def measure(cell, config):
        if config.is_off:
            return (off_step() for _ in range(20))
        return (round_step((1, 3), config=str(config), scale=2.0) for _ in range(20))

    block = measure_block(measure, Cell(2, 512), spec("self:4+60/chain3"), 0.0, Protocol(), lambda: 0.0, 0)
    plain, round_s = off_step().wall_s, round_step(scale=2.0).wall_s
    value, error = log_speedup(block)
    assert value == pytest.approx(math.log(6 / round_s / (2 / plain)))
    assert error == 0
    summary = summarize_runs(block.candidate)
    assert summary["acceptance_histogram"] == [0, 8, 0, 8]
    assert summary["mean_acceptance_length"] == summary["tokens_per_round"]["mean"] == 3
    assert summary["tokens_per_round"]["count"] == 8, "of one run: the other repeats its text"


def test_tokens_are_compared_over_the_common_prefix():
    world, cell = World(), Cell(2, 512)
    plain = [run_once(world, cell, OFF, 0.1, Protocol(), world.clock)]
    good = [run_once(world, cell, spec("ngram/chain3"), 0.3, Protocol(), world.clock)]
    assert len(good[0].tokens[0]) != len(plain[0].tokens[0])
    assert first_difference(plain, good) is None
    world.liars.add("ngram/chain3")
    bad = [run_once(world, cell, spec("ngram/chain3"), 0.0, Protocol(), world.clock)]
    assert "row 0 emits token" in first_difference(plain, bad)


def test_a_stream_too_short_to_score_is_unsupported():
    with pytest.raises(UnsupportedConfig, match="more new tokens"):
        run_once(lambda cell, config: iter([off_step()]), Cell(2, 512), OFF, 0.0, Protocol(), lambda: 0.0)


# Intervals and choices


def block(value, config="model:4+60/chain3", sd=0.0, count=100, kind="duel", index=0):
    summary = {"log_speedup": value, "tokens_per_round": {"mean": 2.0, "sd": sd, "count": count}}
    return Measurement(f"m-{value}-{index}", kind, "r", "f.f", "w", 0.0, Cell(1, 512), config, Design(index), summary=summary)


def test_an_interval_adds_spread_over_blocks_and_text():
    values = [0.10, 0.12, 0.11, 0.13, 0.09, 0.11]
    steady = verdict([block(v) for v in values])
    t5 = 2.5706
    assert steady.mean - steady.low == pytest.approx(t5 * 0.0141421 / math.sqrt(6), rel=1e-4)
    text = verdict([block(v, sd=1.0, count=100 + i) for i, v in enumerate(values)])
    assert text.num_row_rounds == 105
    assert (text.mean - text.low) ** 2 - (steady.mean - steady.low) ** 2 == pytest.approx((1.96 * 0.5) ** 2 / 105)
    assert verdict([block(0.1)]) is None


def test_only_a_complete_duel_above_the_gate_wins():
    protocol = Protocol()

    def winner(values, kind="duel"):
        blocks = [block(v, kind=kind, index=i) for i, v in enumerate(values)]
        return CellEvidence.of(Cell(1, 512), blocks).winner(protocol)

    assert winner([0.2] * 6) == "model:4+60/chain3"
    assert winner([0.2] * 5) == "off"
    assert winner([0.2] * 9, kind="race") == "off"
    assert winner([0.029] * 6) == "off", "faster, by less than min_speedup"
    assert winner([0.2, 0.0, 0.2, 0.0, 0.2, 0.0]) == "off", "faster on average, but not significantly"


def races(**means):
    """name__chain -> block values around a mean."""
    names = {"short": "model:4+60/chain2", "long": "model:4+60/chain5", "wide": "model:4+124/chain2", "few": "ngram/chain1"}
    around = {name: (0.0,) if name == "few" else (-0.01, 0.0, 0.01) for name in names}
    return {spec(names[name]): [block(mean + d, names[name]) for d in around[name]] for name, mean in means.items()}


def test_near_equals_go_to_the_plainer_configuration():
    assert str(finalist(races(long=0.305, short=0.30), set(), 0.02)) == "model:4+60/chain2"
    assert str(finalist(races(long=0.35, short=0.30), set(), 0.02)) == "model:4+60/chain5"
    assert str(finalist(races(short=0.30, wide=0.30), set(), 0.02)) == "model:4+124/chain2"
    assert str(finalist(races(short=0.30, few=0.9), set(), 0.02)) == "model:4+60/chain2", "one block is no evidence"


# Search


def search_in(tmp_path, configs, priors=()):
    tmp_path.mkdir(exist_ok=True)
    return CellSearch(open_journal(tmp_path / "journal.log"), Cell(1, 512), configs, priors, 0, Protocol())


def test_a_search_proposes_each_configuration_once_until_none_is_left(tmp_path):
    configs = candidates(Cell(1, 64), ["self", "ngram"], windows=(16, 32), chains=(1, 2, 3))
    search = search_in(tmp_path, configs, priors=(configs[4], spec("ngram/chain8"), configs[0]))
    asked = []
    while (trial := search.ask()) is not None:
        asked.append(trial.config)
        if trial.config == configs[5]:
            trial.fail("oom")
            continue
        for _ in range(2):
            trial.report(-0.1 * trial.config.num_nodes)
        trial.finish()
    assert asked[:2] == [configs[4], configs[0]], "starting points first; what is no candidate here is left out"
    assert sorted(map(str, asked)) == sorted(map(str, configs))
    assert search.best == (OFF, 0.0)
    assert search.known[configs[5]] == []


def test_a_resumed_search_asks_what_the_uninterrupted_one_would(tmp_path):
    configs = candidates(Cell(1, 4096), ["self", "model"])

    def step(search):
        trial = search.ask()
        trial.report(trial.config.num_nodes / 10)
        trial.finish()
        return str(trial.config)

    whole = search_in(tmp_path / "a", configs)
    expected = [step(whole) for _ in range(20)]
    got = []
    for _ in range(10):
        search = search_in(tmp_path / "b", configs)
        got += [step(search), step(search)]
        search.ask()  # killed while it ran
    assert got == expected


def test_a_hopeless_race_ends_after_one_block_and_a_close_one_goes_on(tmp_path):
    configs = candidates(Cell(1, 4096), ["self"])
    search = search_in(tmp_path, configs)
    leader = search.ask()
    assert not any(leader.report(value) for value in (0.40, 0.42, 0.41, 0.39, 0.40, 0.41))
    leader.finish()
    assert search.best[0] == leader.config
    assert search.ask().report(0.1)
    close = search.ask()
    assert not close.report(0.395)
    assert close.report(0.30), "behind by far more than the spread of this cell's blocks"


def test_parameters_mean_configurations_and_holes_snap_to_the_nearest():
    texts = ("self:4+12/chain1", "self:4+28/chain1", "self:4+28/chain4", "model:full/2,1", "ngram/chain3")
    configs = [spec(text) for text in texts]
    space = SearchSpace(configs)
    for config in configs:
        assert space.suggest(optuna.trial.FixedTrial(space.params(config))) == config
    hole = optuna.trial.FixedTrial({"drafter": "self", "self.view": 0, "self.tree": 1})
    assert space.suggest(hole) in configs
