"""Every noun checks itself, and its spelling is the noun."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import header, round_step
from specdec_lab.records import (
    DRAFTERS,
    MAX_DEPTH,
    MAX_NODES,
    PHASES,
    Cell,
    Identity,
    KvView,
    ParseError,
    RunHeader,
    SpecConfig,
    StepRecord,
    TreeShape,
    fingerprint,
    parse_count,
)

counts = st.integers(1, 10**6)
cells = st.builds(Cell, counts, counts)
views = st.one_of(
    st.just(KvView.full()),
    st.builds(KvView.window, st.integers(0, 10**6), counts),
    st.builds(KvView.snapkv, counts, counts, st.integers(0, 10**6)),
)


@st.composite
def any_trees(draw: st.DrawFn) -> TreeShape:
    size = draw(st.integers(1, 40))
    return TreeShape(tuple(draw(st.integers(-1, node - 1)) for node in range(size)))


trees = st.one_of(
    any_trees(),
    st.builds(TreeShape.chain, st.integers(1, MAX_DEPTH)),
    st.builds(TreeShape.branching, st.lists(st.integers(1, 4), min_size=1, max_size=4)),
)
configs = st.one_of(
    st.just(SpecConfig.off()),
    st.builds(SpecConfig, st.sampled_from(["self", "model"]), views, trees),
    st.builds(SpecConfig, st.just("ngram"), st.none(), trees),
)


@given(st.one_of(cells, views, trees, configs))
def test_every_noun_is_its_spelling(noun: Cell | KvView | TreeShape | SpecConfig) -> None:
    assert type(noun).parse(str(noun)) == noun


@given(st.one_of(cells, views, trees, configs))
def test_spellings_are_one_word_without_blanks(noun: Cell | KvView | TreeShape | SpecConfig) -> None:
    assert re.fullmatch(r"\S+", str(noun))


@pytest.mark.parametrize("text", ["off", "self:4+508/chain5", "model:full/4,2,1", "ngram/chain8", "model:4+252/chain1"])
def test_the_spellings_of_the_manual_are_kept(text: str) -> None:
    assert str(SpecConfig.parse(text)) == text


def test_a_user_may_count_in_k() -> None:
    assert Cell.parse("8x4k") == Cell(8, 4096)
    assert parse_count(" 2K ") == 2048


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x0", "8x4m", "-1x4", "8x4x4", "8.0x4", ""])
def test_a_misspelt_cell_is_quoted_in_the_error(text: str) -> None:
    with pytest.raises(ParseError, match=re.escape(repr(text))):
        Cell.parse(text)


@pytest.mark.parametrize(
    ("text", "column", "why"),
    [
        ("slef:4+60/chain3", 1, "drafter 'slef'"),
        ("self:4-60/chain3", 6, "view '4-60'"),
        ("self:4+0/chain3", 6, "at least 1 token"),
        ("self:4+60/chian3", 11, "tree 'chian3'"),
        ("self:4+60/chain0", 11, "1 to 64"),
        ("self:4+60/chain1000", 11, "got 1000"),
        ("self:4+60/4,0", 11, "at least 1 child"),
        ("self:4+60/tree:-1,1", 11, "node 1 has parent 1"),
        ("self/chain3", 1, "needs a view"),
        ("ngram:4+60/chain3", 1, "takes no view"),
    ],
)
def test_a_misspelt_config_says_at_which_column(text: str, column: int, why: str) -> None:
    with pytest.raises(ParseError, match=rf"column {column}: .*{re.escape(why)}"):
        SpecConfig.parse(text)


def test_a_config_without_a_tree_says_what_to_write() -> None:
    with pytest.raises(ParseError, match="write for example self:4\\+60/chain3"):
        SpecConfig.parse("self:4+60")


@given(st.text(max_size=20))
def test_any_text_is_a_config_or_a_parse_error(text: str) -> None:
    try:
        config = SpecConfig.parse(text)
    except ParseError:
        return
    assert SpecConfig.parse(str(config)) == config


@pytest.mark.parametrize("stray", [{"kind": "full", "sink": 4}, {"kind": "window", "recent": 4, "budget": 1}])
def test_a_view_holds_no_number_that_its_spelling_would_lose(stray: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match="has no (sink|budget)"):
        KvView(**stray)  # type: ignore[arg-type]


@given(views)
def test_a_bounded_view_reads_what_it_names(view: KvView) -> None:
    assert view.max_tokens is None if view.kind == "full" else view.max_tokens == view.sink + view.recent + view.budget


@given(trees)
def test_depths_count_the_steps_to_the_root(tree: TreeShape) -> None:
    for node, depth in enumerate(tree.depths):
        steps, at = 0, node
        while at >= 0:
            steps, at = steps + 1, tree.parents[at]
        assert steps == depth
    assert tree.depth == max(tree.depths) <= tree.num_nodes
    assert tree.is_chain == (tree.depth == tree.num_nodes)


@pytest.mark.parametrize("parents", [(), (0,), (-2,), (-1, 1), tuple(range(-1, MAX_DEPTH)), (-1,) * (MAX_NODES + 1)])
def test_an_impossible_tree_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="TreeShape"):
        TreeShape(parents)


def test_off_drafts_nothing_and_takes_nothing() -> None:
    assert (SpecConfig.off().depth, SpecConfig.off().num_nodes, SpecConfig.off().is_off) == (0, 0, True)
    with pytest.raises(ValueError, match="takes neither"):
        SpecConfig("off", KvView.full())


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_drafter_needs_a_tree(drafter: str) -> None:
    with pytest.raises(ValueError, match="needs a tree, for example chain3"):
        SpecConfig(drafter)


seconds = st.floats(0, 1e3)


@given(
    parts=st.fixed_dictionaries(dict.fromkeys(PHASES, seconds)),
    accepted=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    sampled=st.none() | seconds,
    flags=st.lists(st.sampled_from(["busy", "floor-above-measured"]), unique=True),
)
def test_a_step_survives_json(parts: dict[str, float], accepted: list[int], sampled: float, flags: list[str]) -> None:
    step = round_step(accepted, context_cost_s=sampled, flags=tuple(flags), **parts)
    assert StepRecord.from_dict(json.loads(json.dumps(step.to_dict()))) == step
    assert step.wall_s == sum(getattr(step, name) for name in PHASES)
    assert step.verify_s == step.linear_s + step.attention_s


def test_a_step_leaves_defaults_out_and_ignores_fields_of_newer_writers() -> None:
    step = round_step()
    assert "kv_floor_s" not in step.to_dict()
    assert StepRecord.from_dict({**step.to_dict(), "energy_j": 3.0}) == step


def test_rows_are_live_while_they_emit() -> None:
    step = round_step((3, 0, 2), frozen=[1])
    assert step.live == (True, False, True)
    assert step.num_emitted == 7
    assert step.batch == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"accepted": (1, 4)}, "row 1 accepted 4 of 3"),
        ({"accepted": (-1, 0)}, "row 0 accepted -1"),
        ({"drafted": (3,)}, "drafted has 1 entries for a batch of 2"),
        ({"kind": "decode"}, "prefill or round"),
        ({"host_s": -0.5}, "host_s is negative"),
    ],
)
def test_an_impossible_step_is_refused(change: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        StepRecord.from_dict({**round_step().to_dict(), **change})


@pytest.mark.parametrize("data", [{}, {"index": 1}, {**round_step().to_dict(), "drafted": 5}])
def test_what_is_no_step_is_a_value_error(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a step record"):
        StepRecord.from_dict(data)


def test_a_header_survives_json() -> None:
    for made in (header(), header(labels=("forced", "modelled"), block=3, draft={"name": "small"})):
        assert RunHeader.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_header_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"knows specdec_lab.run/1; the header says 'specdec_lab.run/2'"):
        RunHeader.from_dict({**header().to_dict(), "schema": "specdec_lab.run/2"})


def test_a_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1, "b": 2}) != fingerprint({"a": 1, "b": 3})
    assert re.fullmatch(r"[0-9a-f]{12}", fingerprint({}))


def test_measurements_pool_under_base_and_drafter() -> None:
    base = {"target": "t", "dtype": "bf16"}
    one = Identity("CPU", base, {"self": {}, "ngram": {"m": 3}})
    other = Identity("CPU", base, {"self": {}, "ngram": {"m": 4}}, warn={"driver": "2"})
    off, own, ngram = SpecConfig.off(), SpecConfig.parse("self:full/chain1"), SpecConfig.parse("ngram/chain2")
    assert one.of(off) == other.of(off) == f"{fingerprint(base)}.{'0' * 12}"
    assert one.of(own) == other.of(own)
    assert one.of(ngram) != other.of(ngram)
    with pytest.raises(KeyError):
        one.of(SpecConfig.parse("model:full/chain1"))
