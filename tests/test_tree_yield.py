"""`bench trees`: what trees of equal size really yield, beside what the ranks promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import specdec_lab as sd
from specdec_lab.bench.tree_yield import measure_yields, plain_trees
from specdec_lab.cli import main
from specdec_lab.records import TreeShape
from specdec_lab.stream import record
from specdec_lab.trees import Drafting
from specdec_lab.workload import held_out


@pytest.fixture(scope="module")
def report():
    return measure_yields(
        sd.Engine(sd.load("demo")), tuple(map(Drafting.parse, ("model:4+60", "ngram"))), (128,), (0.0, 0.8), batch=2,
        sizes=(8,), new_tokens=24,
    )  # fmt: skip


def test_plain_trees_have_the_size_that_was_asked_for_and_one_number_of_children():
    for nodes in (5, 8, 16):
        trees = plain_trees(nodes)
        assert all(tree.num_nodes == nodes - 1 for tree in trees)
        for tree in trees:
            counts = [tree.parents.count(node) for node in range(-1, tree.num_nodes)]
            full = max(counts)
            assert sum(count not in (0, full) for count in counts) <= 1, "only the last family may be cut"
    assert plain_trees(2) == ()


def test_measured_tokens_are_those_of_a_run_of_that_tree(report):
    entry = next(e for e in report.entries if str(e.drafting) == "model:4+60" and e.ranks.header["temperature"] == 0)
    contest = entry.contests[0]
    engine, pair = sd.Engine(sd.load("demo")), sd.load("demo")
    workload = held_out("prose", sd.Cell(2, 128), pair.tokenizer, max_new_tokens=24)
    run = record(engine.steps(workload, entry.drafting.config(contest.chain.tree)))
    kept = [a + 1 for s in run.rounds for a, cut, t in zip(s.accepted, s.censored, s.tokens, strict=True) if t and not cut]
    assert contest.chain.measured == pytest.approx(sum(kept) / len(kept))
    assert contest.chain.rounds == len(kept)
    assert contest.chain.tree == TreeShape.chain(7)
    assert contest.best.expected >= contest.chain.expected - 1e-9


def test_every_drafter_length_and_temperature_has_a_line_and_the_row_is_plain_json(report):
    assert len(report.entries) == 4
    assert str(report).count("model:4+60") == 4
    assert report.markdown.count("| ngram |") >= 2
    row = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [e["ranks"]["temperature"] for e in row["entries"]] == [0.0, 0.0, 0.8, 0.8]


def test_bench_trees_is_printed_and_saved_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "trees", "--drafts", "ngram", "--lengths", "128", "--temperatures", "0", "--batch", "1", "--sizes", "4",
             "--new-tokens", "8", "--db", "db"]  # fmt: skip
    assert main(words) == 0
    assert not Path("db").exists()
    assert main([*words, "--save", "--markdown"]) == 0
    assert "| drafter | cell | T |" in capsys.readouterr().out
    assert len(Path("db/bench/trees.jsonl").read_text().splitlines()) == 1
    assert main(["bench", "trees", "--drafts", "self:4+60/chain3"]) == 2
    assert "name drafter and view only" in capsys.readouterr().err
