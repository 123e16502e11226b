"""`acceptance`: the probe, what it counts, and the trees that it compares."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import letters
import specdec_lab as sd
from specdec_lab import cli
from specdec_lab.bench import sessions
from specdec_lab.bench.acceptance import Drafting, evaluate, measure_acceptance, probe_tree
from specdec_lab.records import Cell
from specdec_lab.trees import Counts, expected_tokens

HEADER = {
    "drafting": "self:4+60", "workload": "prose", "cell": "1x10", "temperature": 0.5, "rounds": 2, "width": 2, "depth": 2,
    "probe_nodes": 4, "device": "TEST", "versions": {}, "commit": "c", "created": "now", "interrupted": False,
}  # fmt: skip


@given(width=st.integers(1, 16), depth=st.integers(1, 8))
def test_a_probe_examines_full_width_wherever_it_examines(width, depth):
    if width * depth > 63:
        with pytest.raises(ValueError, match=f"has at least {width * depth} nodes; 63 are possible"):
            probe_tree(width, depth)
        return
    tree = probe_tree(width, depth)
    assert tree.num_nodes <= 63
    assert tree.depth == depth
    families = [tree.parents.count(node) for node in range(-1, tree.num_nodes)]
    assert set(families) <= {0, width}
    assert tree.num_nodes + width > 63 or tree.num_nodes == sum(width**level for level in range(1, depth + 1)), "no room left"


def test_a_probe_goes_deeper_below_children_of_low_rank():
    tree = probe_tree(8, 3)
    inner = [node for node in range(tree.num_nodes) if node in tree.parents]
    assert inner[:3] == [0, 1, 2]
    assert 0 in inner


@pytest.mark.parametrize(("text", "words"), [
    ("self:4+60/chain3", "the probe drafts a tree of its own"), ("off", "the probe drafts a tree of its own"),
    ("slef:4+60", "drafter 'slef' is none of"), ("self", "needs a view"), ("ngram:4+60", "takes no view"),
])  # fmt: skip
def test_a_drafter_that_is_none_is_named(text, words):
    with pytest.raises(ValueError, match=words):
        Drafting.parse(text)


@pytest.mark.parametrize("text", ["self:4+60", "model:full", "ngram"])
def test_a_drafter_is_spelled_as_it_is_read(text):
    assert str(Drafting.parse(text)) == text


@pytest.mark.parametrize("drafter", ["self:1+2", "model:4+4", "ngram"])
def test_counts_are_those_of_the_rounds_and_trees_are_compared_by_them(drafter):
    engine = sd.Engine(letters.pair())
    report = measure_acceptance(
        engine, Drafting.parse(drafter), Cell(2, 30), width=5, depth=3, workload=letters.random_text(40),
        sampling={"temperature": 0.7},
    )
    assert report.pooled == sum(report.by_depth, Counts())
    assert report.by_depth[0].num_nodes > 0
    assert set(report.pooled.examined) <= ({1, 2, 3, 4, 5} if drafter == "ngram" else {5})
    for rivals in report.rivals:
        assert rivals.best_tokens >= max(rivals.chain_tokens, rivals.top_k_tokens) - 1e-12
        assert rivals.best_tokens == expected_tokens(rivals.best, report.vector)
        assert rivals.best.num_nodes < rivals.nodes
        assert rivals.top_k is None or rivals.top_k.num_nodes < rivals.nodes
    row = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [Counts.from_dict(data) for data in row["by_depth"]] == list(report.by_depth)
    assert str(report.by_depth[0].num_nodes) in str(report)


def test_the_draft_that_is_the_target_has_only_first_children_accepted():
    report = measure_acceptance(
        sd.Engine(letters.pair()), Drafting.parse("model:full"), Cell(2, 20), width=4, depth=2,
        workload=letters.random_text(30),
    )
    assert report.pooled.vector()[0] == 1.0
    assert report.fit is None
    assert "rank 1 was accepted wherever it had a sibling" in report.why_not
    assert all(rivals.best.is_chain for rivals in report.rivals)


def test_where_nothing_was_accepted_no_tree_is_named():
    report = evaluate(HEADER, ())
    assert report.rivals == ()
    assert "no fit: fit_acceptance got counts of 0 examined nodes" in str(report)


def call(*words):
    """(exit code, stdout, stderr) of a command on the tiny pair."""
    out, err = io.StringIO(), io.StringIO()
    code = cli.main(list(map(str, words)), load=letters.loader(), out=out, err=err)
    return code, out.getvalue(), err.getvalue()


def test_the_command_prints_and_saves_only_when_asked(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sessions, "_held_out", lambda pair, kind, new, sampling: letters.random_text(new))
    words = ("acceptance", "--config", "self:2+6", "--cell", "1x20", "--width", 3, "--depth", 2, "--max-new-tokens", 20)
    code, out, _ = call(*words)
    assert code == 0
    assert "chance that child k" in out
    assert list(Path().iterdir()) == []
    code, out, _ = call(*words, "--json", "--save", "--db", "db")
    assert code == 0
    assert json.loads(Path("db/bench/acceptance.jsonl").read_text()) == json.loads(out)
    code, out, err = call(*words, "--width", 40)
    assert (code, out) == (2, "")
    assert "a probe of width 40 and depth 2 has at least 80 nodes; 63 are possible" in err
