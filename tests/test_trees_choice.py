"""`choose`: the best of all trees at measured times, Sequoia's rule, the marginal rule, and chains at large batch."""

from __future__ import annotations

import math
import re
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plane_trees import exact_rows, num_levels, num_nodes, small_trees, value
from specdec_lab.costs import SHAPES, Limits, forward_floor
from specdec_lab.records import TreeShape
from specdec_lab.trees import Choice, RankFit, choose, expected_tokens, path_chances
from test_trees import any_acceptance, chances

H200 = Limits(read_bytes_per_s=4.3e12, flops_per_s=788e12)
SIZES = (*range(1, 10), 12, 16, 24, 32, 48, 64, 96, 128)  # query tokens that a probe times


def law(p1: float, b: float, ranks: int = 32) -> tuple[float, ...]:
    return RankFit(p1, b, error=0.0, granted=0.01, worst_rank=1, num_nodes=1).vector(ranks)


verify_times = st.lists(st.floats(0.1, 3), min_size=6, max_size=6).map(lambda t: dict(zip((1, 2, 3, 5, 6, 7), t, strict=True)))


@settings(max_examples=50, deadline=None)
@given(any_acceptance(), verify_times, st.floats(0, 1), st.floats(0, 0.5), st.integers(2, 7))
def test_the_choice_is_the_fastest_of_all_trees(acceptance, verify_time, draft_time, overhead, levels) -> None:
    rows = exact_rows(acceptance)
    best = 1.0
    for tree in small_trees(7, levels):
        size = min((n for n in verify_time if n >= num_nodes(tree)), key=verify_time.__getitem__)
        if num_nodes(tree) > 1:
            round_s = draft_time * (num_levels(tree) - 1) + verify_time[size] + overhead
            best = max(best, float(value(tree, rows)) * verify_time[1] / round_s)
    choice = choose(acceptance, draft_time, verify_time, levels, overhead_time=overhead)
    assert choice.speedup == pytest.approx(best, rel=1e-9)
    assert choice.expected_tokens == expected_tokens(choice.tree, acceptance)
    assert choice.levels <= levels


def sequoia_objective(p: list[float], draft_time: float, target_time: dict[int, float], max_depth: int) -> float:
    """The least (d * draft_time + target_time) / G(n, d) of Sequoia's search, from its recurrence T[n][d][k]."""
    most = max(target_time)
    table: dict[tuple[int, int, int], float] = {(1, d, 0): 1.0 for d in range(1, max_depth + 1)}
    best = {(1, d): 1.0 for d in range(1, max_depth + 1)}
    for n, d in product(range(2, most + 1), range(2, max_depth + 1)):
        for k, chance in enumerate(p, start=1):
            ways = [
                table[n - m, d, k - 1] + chance * best[m, d - 1]
                for m in range(1, n)
                if (n - m, d, k - 1) in table and (m, d - 1) in best
            ]
            if ways:
                table[n, d, k] = max(ways)
                best[n, d] = max(best.get((n, d), 0.0), table[n, d, k])
    return min(
        (d * draft_time + t) / best[n, d] for n, t in target_time.items() for d in range(1, max_depth + 1) if (n, d) in best
    )


@settings(max_examples=40, deadline=None)
@given(chances(), st.floats(0.001, 0.8), st.lists(st.floats(0, 0.5), min_size=4, max_size=4), st.integers(2, 7))
def test_sequoias_rule_is_reproduced_wherever_its_tree_is_no_slower_than_plain_decoding(p, draft_time, steps, levels) -> None:
    target_time = dict(zip((1, 2, 4, 8, 13), (1.0, *(1 + sum(steps[: i + 1]) for i in range(4))), strict=True))
    choice = choose(p, draft_time, target_time, levels, draft_forwards="levels")
    theirs = sequoia_objective(p, draft_time, target_time, levels)
    ours = choice.break_even / choice.expected_tokens
    assert ours <= min(1, theirs) * (1 + 1e-9)
    # theirs skips a size that no tree can fill; ours drafts what fits and pays for the size
    if choice.tree is not None and choice.nodes in target_time:
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_tree_of_d_levels_is_charged_d_minus_1_draft_forwards_or_d() -> None:
    times = {1: 10.0, 4: 11.0}
    ours, theirs = (choose([0.9], 0.5, times, 4, rule) for rule in ("levels-1", "levels"))
    assert ours.tree == theirs.tree == TreeShape.chain(3)
    assert (ours.break_even, theirs.break_even) == (pytest.approx((3 * 0.5 + 11) / 10), pytest.approx((4 * 0.5 + 11) / 10))


def test_each_draft_forward_is_charged_for_the_nodes_with_children_at_its_level() -> None:
    asked: list[int] = []

    def draft_time(width: int) -> float:
        asked.append(width)
        return 0.01 * width

    matrix = [[0.5, 0.4], [0.45, 0.45], [0.45, 0.0]]  # every node of 2,2,1 is wanted; the leaves need no forward
    choice = choose(matrix, draft_time, {1: 1.0, 11: 1.0}, 4)
    assert choice.tree == TreeShape.parse("2,2,1")
    assert choice.break_even == pytest.approx(1 + 0.01 * (1 + 2 + 4))
    assert len(asked) == len(set(asked))  # a measured time is asked for once
    with_leaves = choose(matrix, draft_time, {1: 1.0, 11: 1.0}, 4, "levels")
    assert with_leaves.break_even == pytest.approx(1 + 0.01 * (1 + 2 + 4 + 4))


def test_a_chain_is_weighed_even_where_a_tree_of_its_size_yields_more_tokens() -> None:
    matrix = [[0.5, 0.45], [0.9, 0.0], [0.5, 0.0], [0.5, 0.0]]
    assert choose(matrix, 0.0, {1: 1.0, 5: 1.0}, 5).tree == TreeShape.parse("2,1")
    wide_is_dear = choose(matrix, lambda width: 0.0 if width == 1 else 9.0, {1: 1.0, 5: 1.0}, 5)
    assert wide_is_dear.tree == TreeShape.chain(4)


@settings(max_examples=60, deadline=None)
@given(chances(4, falling=True), st.floats(1e-3, 0.3), st.integers(2, 5))
def test_with_linear_cost_the_best_tree_holds_exactly_the_nodes_worth_their_time(p, per_node, levels) -> None:
    """Algorithms 3.4: f(v) > (Omega / T_step) * b * B, at a fixed number of levels."""
    draft_s, fixed = 0.05 * (levels - 1), 0.7
    times = {n: fixed + per_node * n for n in range(1, 160)}
    overhead = draft_s  # charged to every tree alike, so that the number of levels costs nothing
    choice = choose(p, 0.0, times, levels, overhead_time=overhead)
    assume(choice.tree is not None)
    assert choice.tree is not None
    round_s = overhead + times[choice.nodes]
    worth = choice.expected_tokens / round_s * per_node
    everything = [math.prod(path) for depth in range(1, levels) for path in product(p, repeat=depth)]
    assume(all(abs(f / worth - 1) > 1e-9 for f in everything))  # no node is worth exactly its time
    wanted = sorted((f for f in everything if f > worth), reverse=True)
    assert sorted(path_chances(choice.tree, p), reverse=True) == pytest.approx(wanted)


# --- the limit model of one H200 ---


def at_the_limits(batch: int, keys: int, p: tuple[float, ...], drafter: str = "1B", levels: int = 16) -> Choice:
    verify = {n: forward_floor(SHAPES["Llama-3.1-8B"], H200, batch, n, keys + n - 1).total_s for n in SIZES}
    return choose(p, lambda w: forward_floor(SHAPES[drafter], H200, batch, w, 516).total_s, verify, levels)


@pytest.mark.parametrize("keys", [1024, 4096])
@pytest.mark.parametrize(("p1", "b", "chain_from"), [(0.9, 1.2, 32), (0.8, 1.0, 64), (0.7, 0.8, 64), (0.6, 0.6, 64)])
def test_the_best_tree_shrinks_to_a_chain_as_the_batch_grows(keys, p1, b, chain_from) -> None:
    choices = {batch: at_the_limits(batch, keys, law(p1, b)) for batch in (1, 2, 4, 8, 16, 32, 64, 128)}
    nodes = [choices[batch].nodes for batch in (1, 2, 4, 8, 16, 32)]
    assert nodes == sorted(nodes, reverse=True)
    assert nodes[0] >= 64
    assert max(choices[batch].nodes for batch in (32, 64, 128)) <= 8
    for batch, choice in choices.items():
        assert choice.tree is not None
        assert choice.tree.is_chain == (batch >= chain_from)


def test_at_batch_32_what_branches_is_a_chain_and_one_or_two_siblings() -> None:
    for keys, (p1, b) in product((1024, 4096), ((0.8, 1.0), (0.7, 0.8), (0.6, 0.6))):
        choice = at_the_limits(32, keys, law(p1, b))
        assert choice.nodes - choice.levels <= 3
        assert choice.nodes <= 6


def test_long_contexts_keep_trees_at_any_batch_because_reading_kv_hides_their_nodes() -> None:
    choice = at_the_limits(128, 32768, law(0.7, 0.8))
    assert choice.tree is not None
    assert not choice.tree.is_chain


# --- reasons ---


RULE = re.compile(r"would (add|give up) (-?[\d.]+) tokens .*? and (?:must add more than|may give up at most) ([\d.]+)")


def rule(reason: str) -> list[tuple[str, float, float]]:
    """What the sentence compares: (add or give up, tokens, what they must exceed or may reach)."""
    return [(verb, float(tokens), float(worth)) for verb, tokens, worth in RULE.findall(reason)]


def test_off_is_explained_by_the_fastest_draft_and_what_it_would_have_to_add() -> None:
    choice = choose([0.3, 0.1], 0.3, {1: 1.0, 2: 1.2, 4: 1.4}, 16)
    assert choice.tree is None
    assert (choice.speedup, choice.nodes, choice.levels) == (1, 1, 1)
    assert choice.reason == (
        "off: chain1 (0.87x) would add 0.300 tokens to a round and must add more than 0.500 "
        "(1.00 tokens per plain step x 0.500 plain steps)"
    )


def test_a_chain_is_explained_by_the_fastest_tree_that_branches() -> None:
    choice = choose([0.8, 0.05], 0.05, {1: 1.0, 2: 1.0, 3: 1.0, 5: 1.6}, 16)
    assert choice.tree == TreeShape.chain(2)
    assert choice.reason.startswith(
        "chain2 (2.22x): tree 2 (1.76x) would give up 0.590 tokens of a round and may give up at most 0.111"
    )


def test_a_tree_is_explained_by_the_fastest_chain_and_the_fastest_larger_tree() -> None:
    choice = choose([0.5, 0.3], 0.05, {1: 1.0, 2: 1.0, 3: 1.0, 5: 1.02, 7: 1.5}, 16)
    assert choice.tree is not None
    assert not choice.tree.is_chain
    assert "chain" in choice.reason
    assert len(rule(choice.reason)) == 2


@settings(max_examples=60, deadline=None)
@given(chances(4), st.floats(0, 0.6), st.lists(st.floats(0, 0.5), min_size=4, max_size=4), st.integers(2, 7))
def test_the_numbers_of_a_reason_say_that_the_rival_loses(p, draft_time, steps, levels) -> None:
    times = dict(zip((1, 2, 3, 5, 8), (1.0, *(1 + sum(steps[: i + 1]) for i in range(4))), strict=True))
    reason = choose(p, draft_time, times, levels).reason
    assert rule(reason) or "no tree" in reason
    for verb, tokens, worth in rule(reason):
        assert tokens <= worth + 2e-3 if verb == "add" else tokens >= worth - 2e-3


@pytest.mark.parametrize(
    ("acceptance", "times", "levels", "reason"),
    [
        ([0.0], {1: 1.0, 2: 1.0}, 4, "off: acceptance is 0 for every child of the root"),
        ([0.9], {1: 1.0}, 4, "off: no tree fits the sizes that were timed and the levels that were allowed"),
        ([0.9], {1: 1.0, 2: 1.0}, 1, "off: no tree fits"),
        ([0.9], {1: 1.0, 3: 1.1}, 4, "no tree that branches was possible with 1 useful ranks"),
    ],
)
def test_what_could_not_be_weighed_is_said(acceptance, times, levels, reason) -> None:
    assert reason in choose(acceptance, 0.1, times, levels).reason


def test_the_choice_says_how_trees_were_searched() -> None:
    assert choose([0.5, 0.3], 0.1, {1: 1.0, 3: 1.0}, 4).method == "heap"
    assert choose([0.3, 0.5], 0.1, {1: 1.0, 3: 1.0}, 4).method == "dp"


def test_of_equals_the_smaller_wins() -> None:
    assert choose([0.5], 0.5, {1: 1.0, 2: 1.0}, 4).tree is None
    assert choose([0.5, 0.0], 0.0, {1: 1.0, 2: 1.0, 3: 1.0 + 1 / 6}, 4).tree == TreeShape.chain(1)


def test_a_level_may_pay_only_with_the_next_where_acceptance_rises_with_rank() -> None:
    matrix = [[0.4, 0.14, 0.14, 0.14, 0.14], [0.0, 0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
    assert choose(matrix, 0.01, {1: 1.0, 6: 1.0}, 3).tree == TreeShape.parse("5")
    assert choose(matrix, 0.01, {1: 1.0, 6: 1.0}, 4).tree == TreeShape.parse("tree:-1,0,0,0,3")


def test_a_tree_that_cannot_fill_a_size_is_charged_that_size() -> None:
    choice = choose([0.9], 0.0, {1: 1.0, 64: 1.5}, 3)
    assert choice.tree == TreeShape.chain(2)
    assert choice.break_even == 1.5


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verify_time": {2: 1.0}}, r"sizes \[2\] and none of 1 node, the plain step .*; add it"),
        ({"verify_time": {}}, "none of 1 node"),
        ({"verify_time": {1: 1.0, 2: 0.0}}, "verify_time of 2 nodes is 0.0; leave sizes that were not measured out"),
        ({"verify_time": {1: 1.0, 2: math.nan}}, "verify_time of 2 nodes is nan"),
        ({"verify_time": {1: 1.0, 769: 1.0}}, "nodes must be 1 to 768 .*, got 769"),
        ({"draft_time": -1.0}, "draft_time must be a time of 0 or more, got -1.0"),
        ({"draft_time": lambda width: math.inf}, "draft_time of 1 query tokens must be a time of 0 or more, got inf"),
        ({"overhead_time": math.nan}, "overhead_time must be"),
        ({"levels": 0}, "levels must be 1 to 65 .*, got 0"),
        ({"draft_forwards": "depth"}, "draft_forwards must be one of levels-1, levels, got 'depth'"),
        ({"acceptance": [2.0]}, "a chance lies between 0 and 1"),
    ],
)
def test_times_that_are_none_are_refused_with_their_number(changes, words) -> None:
    asked = {"acceptance": [0.5], "draft_time": 0.1, "verify_time": {1: 1.0, 2: 1.0}, "levels": 4, **changes}
    with pytest.raises(ValueError, match=words):
        choose(**asked)
