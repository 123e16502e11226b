"""The tree search is exact: it equals the best of all trees, in rational arithmetic, and keeps the laws of the paper."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plane_trees import best_value, exact_rows, num_levels, plane, trees, value
from specdec_lab.records import MAX_DEPTH, TreeShape
from specdec_lab.trees import Acceptance, best_tree, expected_tokens, path_chances, why_not_heap
from specdec_lab.trees.heap import likeliest

EXACT = Fraction(1, 10**12)  # relative rounding of the search's own sums


@st.composite
def chances(draw: st.DrawFn, max_ranks: int = 5, falling: bool = False) -> list[float]:
    """A rank vector with zeros, ties and rises; its first chance is positive so that a tree exists."""
    weights = [draw(st.integers(1, 30)), *draw(st.lists(st.integers(0, 30), max_size=max_ranks - 1))]
    if falling:
        weights.sort(reverse=True)
    total = sum(weights) + draw(st.sampled_from([0, 1, 10, 60]))
    return [weight / total for weight in weights]


@st.composite
def matrices(draw: st.DrawFn, falling: bool = False) -> list[list[float]]:
    rows = draw(st.lists(chances(4, falling=falling), min_size=1, max_size=5))
    width = max(map(len, rows))
    return [row + [0.0] * (width - len(row)) for row in rows]


def any_acceptance(falling: bool = False) -> st.SearchStrategy[list[float] | list[list[float]]]:
    return chances(falling=falling) | matrices(falling=falling)


def test_there_are_catalan_many_trees_to_beat() -> None:
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 5, 14, 42, 132, 429]


# --- against all trees ---


@settings(max_examples=60, deadline=None)
@given(any_acceptance(), st.integers(2, 8), st.integers(2, 8))
def test_the_dynamic_program_finds_the_best_of_all_trees(acceptance, nodes, levels) -> None:
    rows = exact_rows(acceptance)
    tree = plane(best_tree(acceptance, nodes, levels, method="dp"))
    best = best_value(rows, nodes, levels)
    assert num_levels(tree) <= levels
    assert best * (1 - EXACT) <= value(tree, rows) <= best


@settings(max_examples=60, deadline=None)
@given(any_acceptance(falling=True), st.integers(2, 8), st.integers(2, 8))
def test_the_heap_finds_the_best_of_all_trees_where_acceptance_falls(acceptance, nodes, levels) -> None:
    rows = exact_rows(acceptance)
    tree = plane(best_tree(acceptance, nodes, levels, method="heap"))
    assert num_levels(tree) <= levels
    assert value(tree, rows) >= best_value(rows, nodes, levels) * (1 - EXACT)


@settings(max_examples=60, deadline=None)
@given(any_acceptance(falling=True), st.integers(2, 90), st.integers(2, 12))
def test_heap_and_dynamic_program_agree_on_larger_trees(acceptance, nodes, levels) -> None:
    by_heap, by_table = (best_tree(acceptance, nodes, levels, method) for method in ("heap", "dp"))
    assert expected_tokens(by_heap, acceptance) == pytest.approx(expected_tokens(by_table, acceptance), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(chances(8), st.integers(2, 60))
def test_a_cap_on_levels_that_does_not_bind_changes_nothing(acceptance, nodes) -> None:
    free = best_tree(acceptance, nodes, method="dp")
    capped = best_tree(acceptance, nodes, free.depth + 1, method="dp")
    assert expected_tokens(capped, acceptance) == pytest.approx(expected_tokens(free, acceptance), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(chances(), st.integers(2, 40), st.integers(2, 8))
def test_a_matrix_of_equal_rows_is_the_vector(acceptance, nodes, levels) -> None:
    matrix = np.tile(acceptance, (levels - 1, 1))
    found = best_tree(matrix, nodes, levels, "dp"), best_tree(acceptance, nodes, levels, "dp")
    assert expected_tokens(found[0], matrix) == pytest.approx(expected_tokens(found[1], acceptance), rel=1e-12)


# --- what a tree yields ---


@settings(deadline=None)
@given(any_acceptance(), st.integers(2, 30))
def test_expected_tokens_are_the_mean_over_every_way_a_round_can_end(acceptance, nodes) -> None:
    tree = best_tree(acceptance, nodes)
    reach = [Fraction(1), *map(Fraction, path_chances(tree, acceptance))]
    leaves = list(reach)  # minus what goes on to a child: the chance that the round ends there
    for node, parent in enumerate(tree.parents, start=1):
        leaves[parent + 1] -= reach[node]
    lengths = [1, *(depth + 1 for depth in tree.depths)]
    assert sum(leaves) == 1
    assert min(leaves) > -1e-12
    mean = sum(chance * length for chance, length in zip(leaves, lengths, strict=True))
    assert expected_tokens(tree, acceptance) == pytest.approx(float(mean), rel=1e-12)


def test_a_chain_yields_omega_and_plain_decoding_one_token() -> None:
    assert expected_tokens(TreeShape.chain(5), [0.7]) == pytest.approx((1 - 0.7**6) / (1 - 0.7))
    assert expected_tokens(None, [0.7]) == 1


def test_chances_are_products_along_the_path_by_rank_and_depth() -> None:
    matrix = [[0.5, 0.25], [0.75, 0.125]]
    assert path_chances(TreeShape.parse("2,2"), matrix) == (0.5, 0.25, 0.375, 0.0625, 0.1875, 0.03125)
    assert path_chances(TreeShape.parse("tree:-1,0,-1"), matrix) == (0.5, 0.375, 0.25)  # rank is order among siblings


def test_a_tree_beyond_the_known_acceptance_is_refused() -> None:
    with pytest.raises(ValueError, match="node 2 is child 3 of its parent, acceptance is known for 2 ranks; add its chance"):
        expected_tokens(TreeShape.parse("3"), [0.5, 0.2])
    with pytest.raises(ValueError, match="node 2 has depth 3, acceptance is known to depth 2: add a row"):
        expected_tokens(TreeShape.chain(3), [[0.5], [0.5]])


# --- laws ---


@settings(max_examples=40, deadline=None)
@given(any_acceptance(), st.integers(2, 8))
def test_more_nodes_or_levels_never_lower_the_expected_tokens(acceptance, levels) -> None:
    by_size = [expected_tokens(best_tree(acceptance, n, levels), acceptance) for n in (2, 3, 5, 9, 17, 40)]
    by_level = [expected_tokens(best_tree(acceptance, 17, cap), acceptance) for cap in range(2, 10)]
    for values in (by_size, by_level):
        assert all(later >= earlier * (1 - 1e-12) for earlier, later in zip(values, values[1:], strict=False))


@given(st.floats(0.01, 1), st.integers(2, 80))
def test_a_chain_is_found_when_only_the_first_rank_is_ever_accepted(p1, nodes) -> None:
    for method in ("heap", "dp"):
        tree = best_tree([p1, 0.0], nodes, method=method)
        assert tree.is_chain
        assert tree.num_nodes <= min(nodes - 1, MAX_DEPTH)
        # nodes may be missing only where one more is lost in rounding
        assert tree.num_nodes == min(nodes - 1, MAX_DEPTH) or p1**tree.num_nodes < 1e-15


@pytest.mark.parametrize("method", ["heap", "dp"])
def test_nodes_come_breadth_first_with_siblings_in_rank_order(method) -> None:
    tree = best_tree([0.5, 0.3, 0.1], 40, method=method)
    assert list(tree.depths) == sorted(tree.depths)
    assert list(tree.parents) == sorted(tree.parents)
    assert tree.num_nodes == 39


def test_a_tree_holds_no_node_that_is_never_accepted() -> None:
    assert best_tree([0.5, 0.25], 100, levels=3) == TreeShape.parse("2,2")
    assert best_tree([0.5, 0.25, 0.0], 100, levels=3, method="dp") == TreeShape.parse("2,2")
    assert best_tree([[0.5, 0.0], [0.0, 0.0], [0.9, 0.0]], 9) == TreeShape.chain(1)
    assert best_tree([[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]], 9, method="dp") == TreeShape.chain(2)
    assert best_tree([0.9, 0.0, 0.05], 3, levels=2) == TreeShape.chain(1)  # rank 3 is out of reach, rank 2 is worth nothing
    # but rank 2 cannot be drafted without rank 1
    assert best_tree([0.0, 0.5], 3) == TreeShape.parse("2")


def test_among_equal_nodes_the_shallower_is_taken() -> None:
    assert best_tree([0.5, 0.25], 4, method="heap") == TreeShape.parse("tree:-1,-1,0")


def test_depth_dependent_acceptance_is_indexed_from_the_root() -> None:
    assert best_tree([[0.9, 0.0], [0.5, 0.4]], 4) == TreeShape.parse("1,2")
    assert best_tree([[0.5, 0.4], [0.9, 0.0]], 5) == TreeShape.parse("2,1")


# --- heap or dynamic program ---


def test_the_heap_is_refused_where_it_would_be_wrong_and_auto_takes_the_dynamic_program() -> None:
    rising = [0.1, 0.05, 0.8]
    assert best_tree(rising, 4) == best_tree(rising, 4, method="dp") == TreeShape.parse("3")
    with pytest.raises(ValueError, match=r"'heap' is not exact here: acceptance rises from 0.05 at rank 2 to 0.8 at rank 3"):
        best_tree(rising, 4, method="heap")
    with pytest.raises(ValueError, match=r"\(depth 2\)"):
        best_tree([[0.5, 0.2], [0.1, 0.2]], 4, method="heap")


@given(any_acceptance())
def test_why_not_heap_is_none_exactly_where_every_row_falls(acceptance) -> None:
    falls = all((np.diff(row) <= 0).all() for row in np.atleast_2d(acceptance))
    assert (why_not_heap(acceptance) is None) == falls


def test_the_likeliest_nodes_of_a_rising_vector_are_a_worse_tree_so_the_refusal_is_needed() -> None:
    rising = [0.5, 0.1, 0.4]
    greedy = TreeShape(tuple(parent - 1 for parent in likeliest(Acceptance.of(rising), nodes=4, levels=4)))
    assert expected_tokens(greedy, rising) == pytest.approx(1.875)
    assert expected_tokens(best_tree(rising, 4), rising) == pytest.approx(2)


# --- refusals ---


@pytest.mark.parametrize(
    ("acceptance", "words"),
    [
        ([], r"empty .* give at least the chance of rank 1"),
        ([[], []], "empty"),
        ([0.5, -0.1], "acceptance of rank 2 is -0.1; a chance lies between 0 and 1"),
        ([1.5], "acceptance of rank 1 is 1.5; a chance"),
        ([0.5, math.nan], "acceptance of rank 2 is nan; leave out or set to 0"),
        ([math.inf], "acceptance of rank 1 is inf"),
        ([0.7, 0.4], r"sums to 1.1; .* divide accepted ranks by examined nodes"),
        ([[0.5, 0.5], [0.7, 0.4]], "acceptance at depth 2 sums to 1.1"),
        ([[0.5, 0.5], [0.7]], "all rows equally long .*; fill short rows with 0"),
        ([[[0.5]]], "got 3 dimensions"),
        (["high"], "must be numbers"),
    ],
)
def test_acceptance_that_is_none_is_refused_with_its_number(acceptance, words) -> None:
    with pytest.raises(ValueError, match=words):
        best_tree(acceptance, 4)


def test_a_float32_vector_that_sums_to_one_is_accepted() -> None:
    vector = np.full(3, 1 / 3, dtype=np.float32)
    assert vector.astype(float).sum() > 1
    assert best_tree(vector, 4).num_nodes == 3


@pytest.mark.parametrize(
    ("nodes", "levels", "words"),
    [
        (0, None, "nodes must be 1 to 768 .*, got 0"),
        (769, None, "nodes must be 1 to 768 .*, got 769"),
        (4, 0, "levels must be 1 to 65 .*, got 0"),
        (4, 66, "levels must be 1 to 65 .*, got 66"),
        (1, None, "drafts nothing; plain decoding is the configuration 'off'"),
        (4, 1, "drafts nothing"),
    ],
)
def test_sizes_that_no_tree_has_are_refused(nodes, levels, words) -> None:
    with pytest.raises(ValueError, match=words):
        best_tree([0.5], nodes, levels)


def test_what_never_gets_accepted_and_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="no drafted token is ever accepted; use 'off'"):
        best_tree([0.0, 0.0], 4)
    with pytest.raises(ValueError, match="method must be one of auto, dp, heap, got 'greedy'"):
        best_tree([0.5], 4, method="greedy")
    with pytest.raises(TypeError):
        best_tree([0.5], 4.5)  # type: ignore[arg-type]


# --- speed ---


def cpu_seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def test_trees_are_searched_in_seconds_and_by_the_heap_in_milliseconds() -> None:
    generator = np.random.default_rng(7)
    rising = 0.9 * np.sort(generator.dirichlet(np.ones(33)))[::-1]
    rising[[3, 9, 20]] = rising[[2, 8, 19]] + 1e-3
    assert why_not_heap(rising)
    assert cpu_seconds(lambda: best_tree(rising, 128, method="dp")) < 1
    assert cpu_seconds(lambda: best_tree(rising, 768, method="dp")) < 10
    assert cpu_seconds(lambda: best_tree(np.sort(rising)[::-1], 768, method="heap")) < 0.1
