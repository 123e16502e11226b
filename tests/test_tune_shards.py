"""Shards of cells: processes that never meet, joined by their records, make the policy of one process, byte for byte."""

from __future__ import annotations

import itertools
import json

import jsonschema
import pytest

from specdec_lab import cli
from specdec_lab.policy import Policy, policy_schema
from specdec_lab.records import Cell
from specdec_lab.tune import CellShard, Database, PlanChanged, ShardsDiffer, find_database, join, merge, read_file, tune, verify
from specdec_lab.tune.workers import Inline
from worker_world import SteadyWorld
from world import IDENTITY, QUICK, World, small_plan

NOW = "2026-01-02T03:04:05Z"


def whole(text="all/2", **options):
    options = {"batches": (1, 2, 4), "lengths": (512, 2048), "drafters": ("self", "ngram"), "protocol": QUICK, **options}
    return small_plan(**options).of_shard(CellShard.parse(text))


def tuned(folder, plan, db=None, world=None, **options):
    world = world or SteadyWorld()
    database = Database(db or folder / "db", IDENTITY, "tiny")
    run_dir = folder / f"run{plan.shard.suffix}"
    return tune(plan, Inline(world, world.clock), IDENTITY, database, run_dir=run_dir, workload="prose", clock=world.clock,
                now=lambda: NOW, **options)  # fmt: skip


def shards(tmp_path, count=2, **options):
    return [tuned(tmp_path / f"s{i}", whole(f"{i}/{count}", **options)) for i in range(1, count + 1)]


def joined(policies, sources, into):
    merge(*sources, into=into)
    return join(policies, into / "TEST_CPU_2t", NOW)


# Which cells


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_every_cell_falls_to_one_shard_in_turn_by_size(count):
    plan = whole(f"all/{count}")
    parts = [plan.of_shard(CellShard(i, count)) for i in range(1, count + 1)]
    assert sorted(cell for part in parts for cell in part.cells) == sorted(plan.cells)
    assert [part.cells for part in parts] == [plan.cells[i::count] for i in range(count)]
    for part in parts:
        assert {*part.cells, *part.siblings} == set(plan.cells)
        assert all(plan.before(cell) == part.before(cell) for cell in part.cells)


def test_a_cell_that_one_machine_cannot_hold_moves_no_other_cell_to_another_shard():
    small = whole(fits=lambda cell: "too large here" if cell == Cell(1, 512) else None)
    assert small.of_shard(CellShard(2, 2)).cells == whole().of_shard(CellShard(2, 2)).cells
    first = small.of_shard(CellShard(1, 2))
    assert (first.cells, set(first.infeasible)) == (whole().of_shard(CellShard(1, 2)).cells[1:], {Cell(1, 512)})


def test_a_shard_without_cells_says_so():
    with pytest.raises(ValueError, match=r"shard 7/8 has no cell that can run: there are 6 cells\. Use fewer shards"):
        whole().of_shard(CellShard.parse("7/8"))
    with pytest.raises(ValueError, match=r"shard 1/6 has no cell that can run: 1x512: 9 GiB > 8 GiB"):
        whole(fits=lambda cell: "9 GiB > 8 GiB" if cell == Cell(1, 512) else None).of_shard(CellShard.parse("1/6"))


@pytest.mark.parametrize(("text", "why"), [
    ("2", "is written i/n"), ("1/2/3", "is written i/n"), ("a/2", "is written i/n"), ("-1/2", "is written i/n"),
    ("1/", "is written"), ("3/2", "shard 3/2 does not exist: i goes from 1 to 2"),
    ("0/2", "shard 0/2 does not exist: .*where jobs count from 0, add 1"), ("1/0", "n at least 1"), ("all/0", "n at least 1"),
])  # fmt: skip
def test_a_bad_shard_is_refused_with_the_reason(text, why, capsys):
    with pytest.raises(ValueError, match=why):
        CellShard.parse(text)
    assert cli.main(["tune", f"--cells-shard={text}", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_shard_survives_its_spelling():
    for text in ("1/1", "2/8", "all/3"):
        assert str(CellShard.parse(text)) == text


# The policy


def test_two_shards_and_a_merge_make_the_policy_of_one_process_byte_for_byte(tmp_path):
    uninterrupted = tuned(tmp_path / "one", whole())
    parts = shards(tmp_path)
    found = joined(parts, [tmp_path / "s1" / "db", tmp_path / "s2" / "db"], tmp_path / "m2")
    assert found.dumps() == uninterrupted.dumps()
    assert len(found.portfolio) > 1, "otherwise equal policies say little"
    assert {row.state for row in found.table} == {"tuned"}
    jsonschema.validate(json.loads(found.dumps()), dict(policy_schema()))
    found.save(tmp_path / "policy.json")
    assert verify(tmp_path / "policy.json", tmp_path / "m2" / "TEST_CPU_2t") == ()
    assert verify(tmp_path / "policy.json", tmp_path / "one" / "db" / "TEST_CPU_2t") == ()
    problems = verify(tmp_path / "policy.json", tmp_path / "s1" / "db" / "TEST_CPU_2t")
    assert any("results of this tuning, not the" in problem for problem in problems)


def test_the_order_of_merging_and_an_interruption_change_nothing(tmp_path):
    parts = shards(tmp_path)
    sources = [tmp_path / "s1" / "db", tmp_path / "s2" / "db"]
    expected = joined(parts, sources, tmp_path / "m1")
    asked = iter(range(10**6))
    cut = tuned(tmp_path / "cut", whole("1/2"), stop=lambda: next(asked) > 30)
    assert {"interrupted", "partial"} <= set(cut.header["labels"])
    resumed = tuned(tmp_path / "cut", whole("1/2"))
    found = joined([parts[1], resumed], [tmp_path / "s2" / "db", tmp_path / "cut" / "db"], tmp_path / "m2")
    rows = [row.to_dict() for row in found.table]
    assert rows == [row.to_dict() for row in expected.table]
    assert found.portfolio == expected.portfolio


def test_shards_share_a_database_that_is_merged_before_they_fill_the_gaps(tmp_path):
    uninterrupted = tuned(tmp_path / "one", whole())
    parts = shards(tmp_path)
    merged = tmp_path / "m"
    before = joined(parts, [tmp_path / "s1" / "db", tmp_path / "s2" / "db"], merged)
    assert any(set(before.portfolio) - {"off"} - set(row.estimates) for row in before.table), "winners of the other shard"
    worlds = SteadyWorld(), SteadyWorld(), SteadyWorld()
    again = [tuned(tmp_path / f"s{i}", whole(f"{i}/2"), merged, worlds[i]) for i in (1, 2)]
    after = join(again, merged / "TEST_CPU_2t", NOW)
    assert all(set(row.estimates) == set(after.portfolio) - {"off"} for row in after.table)
    assert [row.config for row in after.table] == [row.config for row in before.table]
    whole_again = tuned(tmp_path / "one", whole(), None, worlds[0])
    assert [row.to_dict() for row in whole_again.table] == [row.to_dict() for row in after.table]
    assert uninterrupted.portfolio == whole_again.portfolio


def test_equal_measurements_merge_into_equal_files_whatever_their_order(tmp_path):
    shards(tmp_path, 3)
    sources = [tmp_path / f"s{i}" / "db" for i in (1, 2, 3)]
    files = []
    for name, order in enumerate(itertools.permutations(sources)):
        done = merge(*order, into=tmp_path / str(name))
        assert not done.conflicts
        files.append({path.name: path.read_bytes() for path in (tmp_path / str(name)).rglob("*.jsonl")})
    assert all(found == files[0] for found in files)
    assert done.added == sum(len(read_file(path).measurements) for source in sources for path in source.rglob("*.jsonl"))


def test_policies_that_do_not_belong_together_are_not_joined(tmp_path):
    one, two = shards(tmp_path)
    place = tmp_path / "m" / "TEST_CPU_2t"
    merge(tmp_path / "s1" / "db", tmp_path / "s2" / "db", into=tmp_path / "m")
    other = tuned(tmp_path / "s3", whole("2/2"), seed=1)
    plain = tuned(tmp_path / "s4", small_plan())
    third = tuned(tmp_path / "s5", whole("3/3"))
    for policies, why in [
        ([one], "shard 2/2 is missing"), ([one, one, two], "shard 1/2 was given more than once"),
        ([one, other], "differ in .*seed"), ([plain], "complete already"), ([], "no policy of a shard"),
        ([one, third], "differ in run"),
    ]:  # fmt: skip
        with pytest.raises(ShardsDiffer, match=why):
            join(policies, place, NOW)
    with pytest.raises(ShardsDiffer, match=r"lacks tiny--.*merge their records first"):
        join([one, two], tmp_path / "nothing", NOW)


def test_a_run_folder_belongs_to_one_shard(tmp_path):
    plan = whole("1/2")
    tuned(tmp_path, plan)
    (tmp_path / "run-1of2").rename(tmp_path / "run-2of2")
    with pytest.raises(PlanChanged, match=r"another plan \(.*shard.*differ\)"):
        tuned(tmp_path, whole("2/2"))


# The command


def run_cli(words, capsys):
    code = cli.main(words.split())
    return code, capsys.readouterr()


def test_the_command_tunes_shards_apart_and_merges_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "tune --batches 1,2 --lengths 64 --budget 2s --run runs/demo --cells-shard"
    for i in (1, 2):
        code, told = run_cli(f"{words} {i}/2", capsys)
        assert code in (0, 3, 4)
        assert f"policy: policy-{i}of2.json" in told.out
        assert len(Policy.load(f"policy-{i}of2.json").table) == 1
    assert not (tmp_path / "tuning_db").exists(), "the records of a shard lie in its run folder"
    code, told = run_cli("db merge runs/demo-1of2 runs/demo-2of2 --into all --out policy.json", capsys)
    assert code == 0
    assert "measurements added to all" in told.out
    policy = Policy.load("policy.json")
    assert [str(row.cell) for row in policy.table] == ["1x64", "2x64"]
    assert policy.header["cells_shard"] == "all/2"
    assert run_cli("db verify policy.json --db all", capsys)[0] == 0
    assert "file" in run_cli("db ls --db all", capsys)[1].out
    code, told = run_cli("db merge runs/demo-1of2 --into all --out policy.json", capsys)
    assert (code, "shard 2/2 is missing" in told.err) == (2, True)


@pytest.mark.parametrize(("words", "why"), [
    ("merge", "needs databases"), ("merge nowhere", "nowhere is no folder"), ("merge empty", "holds neither measurements nor"),
    ("which here", "takes no paths"), ("verify", "needs one policy"), ("ls --out x.json", "belong to db merge"),
    ("verify missing.json", "missing.json"),
])  # fmt: skip
def test_db_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, words, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, told = run_cli(f"db {words}", capsys)
    assert code == 2
    assert why in told.err
    assert told.err.count("\n") == 1


def test_a_merge_of_two_tunings_of_one_name_is_red_and_keeps_what_was_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, world in (("a", World(noise=0.02, seed=1)), ("b", World(noise=0.02, seed=2))):
        tuned(tmp_path / name, whole("1/2", batches=(1, 2)), world=world)
    assert run_cli("db merge a/db --into m", capsys)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "m").rglob("*.jsonl")}
    code, told = run_cli("db merge b/db --into m", capsys)
    assert code == 1
    assert "held twice, with other content" in told.out
    assert all(path.read_bytes().startswith(data) for path, data in before.items())


def test_db_which_names_the_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, told = run_cli("db which", capsys)
    assert code == 0
    assert str(find_database().path) in told.out
