"""`tune`, `resume`, `--remeasure`, `--executor`: what goes on, what is refused, and how each ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec_lab import cli
from specdec_lab.policy import Policy
from specdec_lab.tune import Database, verify
from world import IDENTITY, World, run, small_plan

SMALL = "tune --batches 1,2 --lengths 64 --budget 2s"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interrupt_after(monkeypatch, number):
    """A Ctrl-C while the shell is told of the so-manyth step."""
    told = []

    def report(progress):
        told.append(progress)
        if len(told) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_progress", lambda screen: report)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("shard", ["", " --cells-shard 1/2"])
def test_a_tuning_that_was_interrupted_is_resumed_without_its_words(monkeypatch, capsys, shard):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        assert cli.main((SMALL.replace("2s", "300s") + shard).split()) == 130
    told = capsys.readouterr().out
    assert "interrupted" in told
    assert "or: resume runs/tune-prose-" in told
    (folder,) = Path("runs").iterdir()
    before = [path.read_bytes() for path in sorted(Path().rglob("*.jsonl"))]
    assert cli.main(["resume", "--budget", "2s"]) in (0, 3, 4)
    assert [path.name for path in Path("runs").iterdir()] == [folder.name], "it went on in the same folder"
    after = [path.read_bytes() for path in sorted(Path().rglob("*.jsonl"))]
    assert all(any(new.startswith(old) for new in after) for old in before), "nothing recorded was changed"
    policy = Policy.load("policy-1of2.json" if shard else "policy.json")
    assert "interrupted" not in policy.header["labels"]


@pytest.mark.usefixtures("here")
def test_a_shard_whose_budget_ends_is_partial(capsys):
    assert cli.main(["tune", "--batches", "1,2", "--lengths", "64", "--budget", "0.01s", "--cells-shard", "2/2"]) == 3
    assert "Run the same command again to go on" in capsys.readouterr().out
    assert "partial" in json.loads(Path("policy-2of2.json").read_text())["header"]["labels"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("words", "why"), [
    ("tune --executor ray --devices cuda:0", "places its workers itself"), ("tune --executor process", "needs --devices"),
    ("tune --executor inline --devices cpu", "--executor inline has none"), ("tune --workers 2", "belongs to --executor ray"),
    ("resume", "no run of tune below runs/"), ("resume nowhere", "is no run folder of tune"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_line_before_a_model_is_loaded(monkeypatch, capsys, words, why):
    monkeypatch.setattr("specdec_lab.commands.lab._load", None)
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("here")
def test_the_ray_executor_without_ray_names_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert cli.main(["tune", "--executor", "ray", "--workers", "2"]) == 2
    assert 'pip install "specdec_lab[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"schema": "somebody.else/1"}', "[]"])
def test_a_run_folder_of_another_program_is_not_resumed(here, capsys, text):
    folder = here / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(text)
    assert cli.main(["resume"]) == 2
    assert "Run tune again with its own words" in capsys.readouterr().err


def test_remeasuring_uses_and_pools_nothing_that_is_recorded(tmp_path):
    first = World(noise=0.01)
    run(tmp_path, first, small_plan())
    again = World(noise=0.01, seed=1)
    policy = run(tmp_path, again, small_plan(), name="again", remeasure=True)
    assert again.num_calls > 0.5 * first.num_calls
    mine = {m.id for m in Database(tmp_path / "db", IDENTITY, "tiny") if m.run == policy.header["run"]}
    used = {identifier for row in policy.table for estimate in row.estimates.values() for identifier in estimate.ids}
    assert used
    assert used <= mine
    assert verify(tmp_path / "runs" / "again" / "policy.json", tmp_path / "db" / "TEST_CPU_2t") == ()
    finished = World(noise=0.01)
    assert run(tmp_path, finished, small_plan(), name="again", remeasure=True).table == policy.table
    assert finished.num_calls == 0, "a remeasuring that is finished is finished"


@pytest.mark.usefixtures("here")
def test_remeasuring_starts_a_folder_of_its_own_and_resumes_it():
    for words in (SMALL, f"{SMALL} --remeasure", f"{SMALL} --remeasure --budget 0.01s"):
        assert cli.main(words.split()) in (0, 3, 4)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == [names[0], f"{names[0]}-again1", f"{names[0]}-again2"][: len(names)]
    assert len(names) > 1
