"""Files of Sequoia, TriForce and UMbreLLa come in whole or are refused by the name of the check that they fail."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_lab import trees
from specdec_lab.records import TreeShape
from specdec_lab.trees import TreeFileError, best_tree, load_acceptance, load_growmap, load_optimizer_config

TREE = TreeShape.parse("tree:-1,-1,-1,0,0,3")
SEQUOIA = [0.0, 0.6, 0.15, 0.05, 0.2]  # dummy, three ranks, reject mass
TRIFORCE = [0.0, 0.6, 0.15, 0.05]


def growmap(tree: TreeShape) -> dict:
    """The tree as plain lists, every part by its own definition."""
    parents = [-1, *(parent + 1 for parent in tree.parents)]
    size = len(parents)
    successors = [[child for child in range(size) if parents[child] == node] for node in range(size)]
    depth = [0, *tree.depths]
    roots = [[node for node in range(size) if depth[node] == level] for level in range(max(depth) + 1)]
    mask = [[0] * size for _ in range(size)]
    for node in range(size):
        seen = node
        while seen >= 0:
            mask[node][seen] = 1
            seen = parents[seen]
    branches = [[len(successors[node]) for node in level] for level in roots]
    return {"roots": roots, "branches": branches, "Successors": successors, "mask": mask, "depth": depth, "size": size}


def save(path: Path, data: dict) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    else:
        tensors = {key: torch.tensor(data[key]) for key in ("mask", "depth") if key in data}
        torch.save({**data, **tensors}, path)
    return path


# --- growmaps ---


@pytest.mark.parametrize("suffix", [".pt", ".json"])
@pytest.mark.parametrize("spelling", ["tree:-1,-1,-1,0,0,3", "chain1", "chain16", "8", "4,2,1"])
def test_a_growmap_comes_in_as_its_tree(tmp_path, suffix, spelling) -> None:
    tree = TreeShape.parse(spelling)
    assert load_growmap(save(tmp_path / f"map{suffix}", growmap(tree))) == tree


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 60), st.integers(2, 9))
def test_every_tree_that_is_found_can_be_a_growmap(tmp_path_factory, nodes, levels) -> None:
    tree = best_tree([0.5, 0.2, 0.1], nodes, levels)
    assert load_growmap(save(tmp_path_factory.mktemp("map") / "map.json", growmap(tree))) == tree


def test_the_files_size_counts_the_root_and_w_times_l_nodes_hang_below_it(tmp_path) -> None:
    width, length = 3, 4
    parents = [-1] * width + [node for level in range(length - 1) for node in [level * width] * width]
    data = growmap(TreeShape(tuple(parents)))
    assert data["size"] == width * length + 1
    tree = load_growmap(save(tmp_path / "3x4.json", data))
    assert (tree.num_nodes, tree.depth) == (width * length, length)


def put(*where):
    """A change: the last of `where` goes to the place that the others lead to."""

    def change(data) -> None:
        *path, place, value = where
        for step in path:
            data = data[step]
        data[place] = value

    return change


BROKEN = [
    ("keys", "mask, depth missing", lambda data: (data.pop("mask"), data.pop("depth"))),
    ("size", "got 1; a root alone is plain decoding", put("size", 1)),
    ("size", "2 to 768 nodes, root counted, got 769", put("size", 769)),
    ("size", "got '7'", put("size", "7")),
    ("successors", "must be 8 lists", put("size", 8)),
    ("successors", "must be 7 lists", put("Successors", 5)),
    ("successors", "must be 7 lists", put("Successors", 6, [0.5])),
    ("successors", "child 7 is no node; ids are 0 to 6", put("Successors", 6, [7])),
    ("successors", "child -1 is no node", put("Successors", 6, [-1])),
    ("one parent", "node 4 is a child of 2 nodes, must be of 1", put("Successors", 3, [4])),
    ("one parent", "node 6 is a child of 0 nodes, must be of 1", put("Successors", 4, [])),
    ("one parent", r"node 0 is a child of 1 nodes, must be of 0 \(it is the root\)", put("Successors", 6, [0])),
    ("breadth-first", "gives node 3 where 1 is due", put("Successors", 0, [3, 2, 1])),
    ("breadth-first", "node 6 has the child 6", put("Successors", [[1, 2, 3], [4, 5], [], [], [], [], [6]])),
    ("depth", "must be 7 numbers", put("depth", [0, 1, 1, 1, 2, 2])),
    ("depth", "depth of node 4 is given as 3, its path has 2 steps", put("depth", 4, 3)),
    ("roots", "must be 4 lists of nodes, one per level", put("roots", [[0], [1, 2, 3], [4, 5]])),
    ("roots", r"level 1 has the nodes \[1, 3, 2\], by Successors they are \[1, 2, 3\]", put("roots", 1, [1, 3, 2])),
    ("branches", r"level 1 has the child counts \[2, 1, 0\], by Successors", put("branches", 1, [2, 1, 0])),
    ("branches", "must be 4 lists of child counts", put("branches", [[3], [2, 0, 0], [1, 0], [0], []])),
    ("mask", r"mask\[6\]\[1\] is 0, must be 1: a node sees itself and its ancestors", put("mask", 6, 1, 0)),
    ("mask", r"mask\[6\]\[2\] is 1, must be 0: a node sees no other nodes", put("mask", 6, 2, 1)),
    ("mask", r"mask\[5\]\[5\] is 0, must be 1", put("mask", 5, 5, 0)),
    ("mask", r"mask\[4\]\[0\] is 2, must be 1", put("mask", 4, 0, 2)),
    ("mask", "must be 7 x 7 whole numbers", put("mask", [[1]])),
]


@pytest.mark.parametrize(("check", "words", "spoil"), BROKEN)
def test_a_broken_growmap_names_the_check_that_it_fails(tmp_path, check, words, spoil) -> None:
    data = deepcopy(growmap(TREE))
    spoil(data)
    for path in (tmp_path / "map.json", tmp_path / "map.pt"):
        with pytest.raises(TreeFileError, match=words) as raised:
            load_growmap(save(path, data))
        assert raised.value.check == check
        assert raised.value.path == path
        assert str(raised.value).startswith(f"{path}: check '{check}' failed: ")


def test_a_growmap_deeper_than_a_round_can_draft_is_refused(tmp_path) -> None:
    size = 67
    data = {
        "size": size,
        "depth": list(range(size)),
        "roots": [[node] for node in range(size)],
        "branches": [[1]] * (size - 1) + [[0]],
        "Successors": [[node + 1] for node in range(size - 1)] + [[]],
        "mask": [[int(seen <= node) for seen in range(size)] for node in range(size)],
    }
    with pytest.raises(TreeFileError, match="check 'depth' failed: 66 levels below the root; at most 64"):
        load_growmap(save(tmp_path / "map.json", data))


# --- files that hold something else ---


class Evil:
    def __reduce__(self):
        return print, ("code of a file ran",)


def test_a_file_that_would_run_code_is_refused_without_running_it(tmp_path, capsys) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"size": Evil()}, path)
    with pytest.raises(TreeFileError, match="check 'readable' failed: not a file of tensors, lists and numbers"):
        load_growmap(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("map.pt", b"", "not a file of tensors"),
        ("map.pt", b"PK\x03\x04 cut", "not a file of tensors"),
        ("map.pt", b"plain text", "not a file of tensors"),
        ("map.json", b"{", "not JSON"),
        ("map.json", b"\xff\xfe\x00", "not JSON"),
        ("map.yaml", b"size: 4", "the name ends in '.yaml'; .pt and .json files can be read"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TreeFileError, match=f"check 'readable' failed: {words}"):
        load_growmap(tmp_path / name)


def test_a_growmap_cut_short_by_a_download_is_refused(tmp_path) -> None:
    whole = save(tmp_path / "map.pt", growmap(TREE)).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TreeFileError, match="check 'readable' failed"):
        load_growmap(tmp_path / "cut.pt")


def test_a_file_of_another_kind_is_refused_and_a_missing_one_is_missing(tmp_path) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(TreeFileError, match="check 'keys' failed: a growmap is a dictionary, this is of type list"):
        load_growmap(tmp_path / "list.json")
    for load in (load_growmap, load_optimizer_config, lambda path: load_acceptance(path, "sequoia")):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "absent.pt")


# --- acceptance vectors ---


def vector_file(tmp_path, values) -> Path:
    path = tmp_path / "vector.pt"
    torch.save(torch.tensor(values) if isinstance(values, list) else values, path)
    return path


def test_each_layout_keeps_its_ranks(tmp_path) -> None:
    expected = tuple(map(pytest.approx, (0.6, 0.15, 0.05)))
    assert load_acceptance(vector_file(tmp_path, SEQUOIA), "sequoia") == expected
    assert load_acceptance(vector_file(tmp_path, TRIFORCE), layout="triforce") == expected


def test_the_layout_must_be_said(tmp_path) -> None:
    path = vector_file(tmp_path, SEQUOIA)
    with pytest.raises(TypeError, match="layout"):
        load_acceptance(path)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="layout must be 'sequoia' .* or 'triforce' .*, got 'auto'"):
        load_acceptance(path, "auto")


def test_a_last_chance_above_its_neighbour_is_warned_about_and_a_falling_one_is_not(tmp_path) -> None:
    with pytest.warns(UserWarning, match="the last chance, 0.2, exceeds its neighbour, 0.05; .* the layout is not 'triforce'"):
        load_acceptance(vector_file(tmp_path, SEQUOIA), "triforce")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_acceptance(vector_file(tmp_path, SEQUOIA), "sequoia")


@pytest.mark.parametrize(
    ("values", "layout", "check", "words"),
    [
        ([[0.0, 0.5]], "triforce", "vector", "1-D tensor of floats"),
        ([0, 1], "triforce", "vector", "1-D tensor of floats"),
        ({"p": 0.5}, "triforce", "vector", "1-D tensor of floats"),
        ([0.0], "triforce", "vector", "1 entries; layout 'triforce' has at least 2"),
        ([0.0, 0.5], "sequoia", "vector", "2 entries; layout 'sequoia' has at least 3"),
        ([0.6, 0.2, 0.1], "triforce", "dummy", "entry 0 is 0.6; both layouts start with a dummy 0"),
        ([0.0, 1.5, 0.1], "triforce", "chances", "acceptance of rank 1 is 1.5"),
        ([0.0, 0.5, float("nan"), 0.1], "sequoia", "chances", "acceptance of rank 2 is nan"),
        ([0.0, 0.8, 0.7], "triforce", "chances", "sums to 1.5"),
    ],
)
def test_a_broken_vector_names_the_check_that_it_fails(tmp_path, values, layout, check, words) -> None:
    with pytest.raises(TreeFileError, match=words) as raised:
        load_acceptance(vector_file(tmp_path, values), layout)
    assert raised.value.check == check


# --- optimiser configurations ---

CONFIG = {
    "acceptance_rate_vector": "vector.pt", "max_depth": 6, "max_budget": 16, "draft_time": 0.4, "valid_budget": [1, 2, 4, 16],
    "target_time": [9, 9.1, 9.5, 12], "dst": "tree.pt",
}  # fmt: skip


def config_file(tmp_path, **changes) -> Path:
    data = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(data))
    return tmp_path / "config.json"


def test_an_optimiser_configuration_comes_in_and_chooses_by_sequoias_rule(tmp_path) -> None:
    config = load_optimizer_config(config_file(tmp_path))
    assert config.verify_time == {1: 9, 2: 9.1, 4: 9.5, 16: 12}
    assert (config.levels, config.draft_time) == (6, 0.4)
    assert (config.acceptance_path, config.destination) == ("vector.pt", "tree.pt")
    choice = config.choose([0.6, 0.15, 0.05])
    assert choice.break_even * 9 == pytest.approx(choice.levels * 0.4 + config.verify_time[choice.nodes])
    assert choice.tree is not None


@pytest.mark.parametrize(
    ("check", "changes", "words"),
    [
        ("keys", {"dst": None, "draft_time": None}, "draft_time, dst missing"),
        ("valid_budget", {"valid_budget": [1, 4, 2, 16]}, "sizes must rise"),
        ("valid_budget", {"valid_budget": []}, "must be numbers of nodes"),
        ("valid_budget", {"valid_budget": [1, 2, 4, 1024]}, "1 to 768"),
        ("valid_budget", {"valid_budget": [1, 2, 4, 16.5]}, "must be numbers of nodes"),
        ("target_time", {"target_time": [9, 9]}, "must be 4 positive times, one per valid_budget"),
        ("target_time", {"target_time": [9, 9, 0, 12]}, "positive"),
        ("baseline", {"valid_budget": [2, 3, 4, 16]}, "starts with 2; it must start with 1, the plain step"),
        ("draft_time", {"draft_time": -0.4}, "must be a time of 0 or more, got -0.4"),
        ("draft_time", {"draft_time": "fast"}, "got 'fast'"),
        ("max_depth", {"max_depth": 0}, "must be 1 to 65 levels, .*, got 0"),
        ("max_budget", {"max_budget": 8}, "must reach the largest valid_budget, 16, got 8"),
    ],
)
def test_a_broken_configuration_names_the_check_that_it_fails(tmp_path, check, changes, words) -> None:
    with pytest.raises(TreeFileError, match=words) as raised:
        load_optimizer_config(config_file(tmp_path, **changes))
    assert raised.value.check == check


def test_a_configuration_that_is_no_object_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("3")
    with pytest.raises(TreeFileError, match="check 'keys' failed: a configuration is an object, this is of type int"):
        load_optimizer_config(tmp_path / "config.json")


# --- who knows torch ---


def test_importing_the_room_loads_numpy_and_nothing_heavier() -> None:
    heavy = {"torch", "transformers", "optuna", "plotly", "scipy"}
    code = f"import sys, specdec_lab.trees; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_reader_of_files_imports_torch_and_only_inside_a_function() -> None:
    assert trees.__file__ is not None
    for path in Path(trees.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        everywhere = [n for n in ast.walk(tree) if isinstance(n, ast.Import) and any(a.name == "torch" for a in n.names)]
        assert bool(everywhere) == (path.name == "files.py")
        assert not set(everywhere) & set(tree.body)
