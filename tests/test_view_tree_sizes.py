"""The picture of tree sizes: plain data from a policy's rows, drawn by plotly and as SVG, and the verb that writes it."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

import made_policies
from specdec_lab import cli
from specdec_lab.policy import Policy
from specdec_lab.view.panels import picture_figure
from specdec_lab.view.panels_svg import picture_svg
from specdec_lab.view.tree_sizes import sizes_picture, sizes_table, tree_sizes

TREE = "model:4+60/tree:-1,-1,0,0,1"
MARGIN = {"kept": {"chance": 0.31, "worth": 0.22}, "left_out": {"chance": 0.11, "worth": 0.25}}
PROMISE = {"how": "composed", "config": TREE, "speedup": 1.6, "nodes": 6, "levels": 3, **MARGIN}


def rows():
    made = made_policies.policy({
        "1x512": {TREE: 1.7}, "1x4096": {"self:4+60/chain4": 1.4}, "8x512": {TREE: 0.8}, "8x4096": "not_visited",
        "8x65536": "infeasible",
    })  # fmt: skip
    data = made.to_dict()
    extras = {"1x512": "composed for model: why a tree", "1x4096": "composed for self. Measured otherwise: it won",
              "8x4096": "composed for model: why a tree"}  # fmt: skip
    for row in data["table"]:
        if row["cell"] in extras:
            row |= {"why": extras[row["cell"]], "composed": PROMISE}
    return data


def test_sizes_are_the_answers_of_a_policy_with_their_kind_and_rule():
    sizes = {str(size.cell): size for size in tree_sizes(rows()["table"])}
    assert {cell: (s.kind, s.nodes, s.levels, s.how) for cell, s in sizes.items()} == {
        "1x512": ("tree", 6, 3, "measured"), "1x4096": ("chain", 5, 5, "measured"), "8x512": ("off", 1, 1, "measured"),
        "8x4096": ("tree", 6, 3, "composed"),
    }  # fmt: skip
    assert "last node kept: accepted with chance 0.3100 > 0.2200 tokens" in sizes["1x512"].words
    assert "first left out: accepted with chance 0.1100 < 0.2500 tokens" in sizes["1x512"].words
    assert "last node" not in sizes["1x4096"].words, "the margins of a tree that lost are not those of the winner"
    assert "Measured otherwise" in sizes["1x4096"].words


def test_the_picture_has_a_line_per_batch_and_hollow_points_where_nothing_was_confirmed():
    nodes, levels = sizes_picture(tree_sizes(rows()["table"])).panels
    assert [(line.label, line.x, line.y) for line in nodes.points] == [
        ("1", (512, 4096), (6, 5)), ("8", (512, 4096), (1, 6))
    ]  # fmt: skip
    assert [line.hollow for line in nodes.points] == [(False, False), (False, True)]
    assert [line.words for line in nodes.points] == [("", "chain"), ("off", "")]
    assert [line.y for line in levels.points] == [(3, 5), (1, 3)]


def test_both_drawings_carry_the_kind_and_the_rule():
    picture = sizes_picture(tree_sizes(rows()["table"]), "a made policy")
    trace = picture_figure(picture).data[0]
    assert trace.mode == "lines+markers+text"
    assert tuple(trace.text) == ("", "chain")
    assert "<br>last node kept: accepted with chance 0.3100" in trace.hovertext[0]
    svg = ElementTree.fromstring(picture_svg(picture))
    said = ["".join(element.itertext()) for element in svg.iter() if element.tag.endswith("text")]
    assert said.count("chain") == said.count("off") == 2, "in both panels; trees that branch carry no word"
    titles = ["".join(element.itertext()) for element in svg.iter() if element.tag.endswith("title")]
    assert sum("first left out: accepted with chance" in title for title in titles) == 4, "both panels, two cells"


def test_rows_read_back_with_their_reason():
    policy = Policy.from_dict(rows())
    assert [row.why for row in policy.table][:2] == ["composed for model: why a tree", rows()["table"][1]["why"]]
    assert policy.to_dict()["table"][0]["composed"] == PROMISE
    assert made_policies.FALLING.table[0].why == ""
    with pytest.raises(ValueError, match=r"table\[0\].why"):
        Policy.from_dict({**rows(), "table": [{**rows()["table"][0], "why": 3}]})


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_verb_prints_a_table_and_writes_the_picture(tmp_path, capsys, ending):
    path = Policy.from_dict(rows()).save(tmp_path / "policy.json")
    out = tmp_path / f"trees.{ending}"
    assert cli.main(["policy", "trees", "--policy", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"written: {out}" in printed
    assert "1x512" in printed
    assert "Tree size against context" in out.read_text()
    assert cli.main(["policy", "trees", "--policy", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [tree["kind"] for tree in data["trees"]] == ["tree", "chain", "off", "tree"]


def test_the_verb_says_what_it_cannot_do(tmp_path, capsys):
    path = Policy.from_dict(rows()).save(tmp_path / "policy.json")
    assert cli.main(["policy", "show", "--policy", str(path), "--out", "x.svg"]) == 2
    assert "--out belongs to policy trees" in capsys.readouterr().err
    assert cli.main(["policy", "trees", "--policy", str(path), "--out", str(tmp_path / "x.png")]) == 2
    empty = made_policies.policy({"1x512": "not_visited"}).save(tmp_path / "empty.json")
    assert cli.main(["policy", "trees", "--policy", str(empty)]) == 0
    assert "nothing to draw" in capsys.readouterr().out
    assert sizes_table(()) == [("cell", "kind", "nodes", "levels", "speed-up", "how", "why")]
