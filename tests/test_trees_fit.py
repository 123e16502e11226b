"""Counts of accepted ranks pool, survive JSON and give back the law that made them, or say that no such law did."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specdec_lab.records import TreeShape
from specdec_lab.trees import Counts, RankFit, Walk, best_tree, expected_tokens, fit_acceptance, rank_counts, why_not_heap


def law(p1: float, b: float) -> RankFit:
    return RankFit(p1, b, error=0.0, granted=0.01, worst_rank=1, num_nodes=1)


def sampled(vector, widths: dict[int, int], seed: int = 0) -> Counts:
    """Outcomes at `widths[m]` nodes with m children whose k-th is accepted with chance vector[k-1]."""
    generator = np.random.default_rng(seed)
    rows = {}
    for children, nodes in widths.items():
        chances = [max(0.0, 1 - sum(vector[:children])), *vector[:children]]
        rows[children] = tuple(map(int, generator.multinomial(nodes, np.array(chances) / sum(chances))))
    return Counts(rows)


@st.composite
def counts(draw: st.DrawFn) -> Counts:
    widths = draw(st.sets(st.integers(1, 6), max_size=4))
    return Counts({m: tuple(draw(st.lists(st.integers(0, 50), min_size=m + 1, max_size=m + 1))) for m in widths})


# --- the fit ---


@pytest.mark.parametrize(("p1", "b"), [(0.63, 0.8), (0.85, 1.5), (0.3, 0.3), (0.55, 3.0)])
def test_the_fit_finds_the_law_that_made_the_counts_from_narrow_and_wide_trees_alike(p1, b) -> None:
    made = sampled(law(p1, b).vector(16), {1: 20_000, 2: 20_000, 4: 20_000, 16: 20_000})
    fit = fit_acceptance(made)
    assert fit.p1 == pytest.approx(p1, abs=4 * math.sqrt(p1 * (1 - p1) / 80_000))
    assert fit.b == pytest.approx(b, rel=0.05)
    assert fit.is_good
    assert fit.error < 0.01
    assert fit.num_nodes == 80_000
    assert "good fit" in str(fit)


def test_a_fit_unpacks_as_p1_and_b() -> None:
    fit = fit_acceptance({2: (30, 60, 10)})
    p1, b = fit
    assert (p1, b) == (fit.p1, fit.b)
    # one kind of node: both parameters are met exactly. r_2 = 0.3 = (1 - 0.6) * 2^-b
    assert (p1, b) == (0.6, pytest.approx(math.log2(0.4 / 0.3)))
    assert fit.error == pytest.approx(0, abs=1e-12)


def log_likelihood(counts: Counts, p1: float, b: float) -> float:
    fit = law(p1, b)
    chances = fit.vector(counts.ranks)
    return sum(
        outcomes[0] * math.log(fit.survival(m)) + sum(n * math.log(p) for n, p in zip(outcomes[1:], chances, strict=False))
        for m, outcomes in counts.examined.items()
    )


@settings(max_examples=60, deadline=None)
@given(counts(), st.floats(-0.02, 0.02), st.floats(-0.05, 0.05))
def test_no_other_parameters_are_likelier(made, step_p1, step_b) -> None:
    made += Counts({3: (2, 3, 2, 1)})  # all outcomes occur, so the likelihood has an inner maximum
    fit = fit_acceptance(made)
    p1, b = min(max(fit.p1 + step_p1, 1e-6), 1 - 1e-6), max(fit.b + step_b, 1e-6)
    assert log_likelihood(made, p1, b) <= log_likelihood(made, *fit) + 1e-9 * made.num_nodes


def test_a_bad_fit_is_visible_and_names_the_rank() -> None:
    nothing_then_much = (0.2, 0.02, 0.02, 0.5, 0.02, 0.02)
    fit = fit_acceptance(sampled(nothing_then_much, {6: 5000}))
    assert not fit.is_good
    assert fit.error > 0.1 > fit.granted
    assert fit.worst_rank in (3, 4, 6)
    assert f"rejection of the first {fit.worst_rank} is off by" in str(fit)
    assert "BAD FIT, use the empirical Counts.vector()" in str(fit)


def test_few_counts_are_granted_the_error_that_sampling_explains() -> None:
    bent = (0.5, 0.05, 0.15, 0.05)
    few, many = (fit_acceptance(sampled(bent, {4: nodes})) for nodes in (40, 400_000))
    assert few.is_good
    assert not many.is_good
    assert few.granted > 10 * many.granted


def test_a_tree_from_a_good_fit_is_nearly_as_good_as_the_tree_from_the_truth() -> None:
    truth = law(0.7, 0.9).vector(12)
    fit = fit_acceptance(sampled(truth, {3: 3000, 12: 3000}))
    found, best = (expected_tokens(best_tree(p, 64), truth) for p in (fit.vector(12), truth))
    assert found == pytest.approx(best, rel=1e-3)


@given(st.floats(0.01, 0.99), st.floats(0.01, 6))
def test_the_vector_of_a_fit_is_made_of_chances_and_falls_where_the_rule_says(p1, b) -> None:
    fit = law(p1, b)
    vector = fit.vector(24)
    assert vector[0] == pytest.approx(p1)
    assert sum(vector) == pytest.approx(1 - fit.survival(24))
    assert min(vector) >= 0
    assume(abs(p1 - (1 - 2**-b) / (2 - 2**-b)) > 1e-9)
    assert fit.is_monotone == (why_not_heap(vector) is None)


def test_later_ranks_that_never_or_always_help_are_the_ends_of_the_range() -> None:
    assert tuple(fit_acceptance({3: (50, 50, 0, 0)})) == (0.5, 0.0)
    assert fit_acceptance({3: (50, 50, 0, 0)}).vector(3) == (0.5, 0.0, 0.0)
    always = fit_acceptance({2: (0, 50, 50)})
    assert always.vector(2) == (0.5, pytest.approx(0.5, abs=1e-5))


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({}, "counts of 0 examined nodes; run at least one round"),
        ({2: (0, 0, 0)}, "counts of 0 examined nodes"),
        ({1: (30, 70)}, "all 100 examined nodes had 1 child: chains tell p1, .*; draft a tree"),
        ({1: (30, 70), 4: (0, 50, 0, 0, 0)}, "rank 1 was accepted wherever it had a sibling"),
    ],
)
def test_counts_that_cannot_tell_the_second_parameter_are_refused(made, words) -> None:
    with pytest.raises(ValueError, match=words):
        fit_acceptance(made)


# --- counts ---


@given(counts())
def test_counts_survive_json(made) -> None:
    assert Counts.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@given(counts(), counts(), counts())
def test_pooling_is_addition(a, b, c) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c) == sum((a, b, c), Counts())
    assert (a + b).num_nodes == a.num_nodes + b.num_nodes
    assert a + Counts() == a


def test_the_empirical_vector_pools_narrow_and_wide_nodes() -> None:
    made = Counts({1: (40, 60), 2: (20, 60, 20)})  # rank 1: 120 of 200; rank 2: 20 of the 40 that could take it
    assert made.vector() == pytest.approx((0.6, 0.4 * 0.5))
    assert made.survival().errors[0] == pytest.approx(math.sqrt(0.6 * 0.4 / 200))
    assert Counts().vector() == ()
    assert Counts({2: (0, 5, 0)}).vector() == (1.0,)  # rank 2 was never put to the test


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_empirical_vector_is_the_truth_within_its_error(seed) -> None:
    truth = (0.3, 0.05, 0.25, 0.1)
    survival = sampled(truth, {1: 500, 2: 700, 4: 900}, seed).survival()
    for rank, (chance, error) in enumerate(zip(survival.chances, survival.errors, strict=True), start=1):
        assert chance == pytest.approx(1 - sum(truth[:rank]), abs=6 * error)


def test_the_empirical_vector_can_be_searched() -> None:
    made = sampled((0.5, 0.2, 0.1), {3: 1000})
    assert best_tree(made.vector(), 16).num_nodes == 15


@pytest.mark.parametrize(
    ("examined", "words"),
    [
        ({0: (1,)}, "at least 1 child, got 0 children"),
        ({2: (1, 2)}, r"2 children has 3 outcomes \(none, rank 1..2\), got 2"),
        ({1: (1, -2)}, r"nodes with 1 children must be whole and not negative, got \(1, -2\)"),
        ({1: (1, 2.5)}, "must be whole"),
    ],
)
def test_counts_that_are_none_are_refused(examined, words) -> None:
    with pytest.raises(ValueError, match=words):
        Counts(examined)


@pytest.mark.parametrize("data", [{}, {"schema": "specdec_lab.rank_counts/2"}, {"schema": "specdec_lab.rank_counts/1"}])
def test_other_data_is_not_read_as_counts(data) -> None:
    with pytest.raises(ValueError, match=r"rank counts (have schema|need 'examined')"):
        Counts.from_dict(data)


def test_counts_cannot_change_once_made() -> None:
    rows = {1: (1, 2)}
    made = Counts(rows)
    rows[1] = (9, 9)
    assert made.examined == {1: (1, 2)}
    with pytest.raises(TypeError):
        made.examined[1] = (9, 9)  # type: ignore[index]


# --- walks ---

TREE = TreeShape.parse("tree:-1,-1,-1,0,0,3")  # three children, two below the first, one below its first


def test_a_walk_examines_every_node_it_leaves_and_the_one_where_all_were_rejected() -> None:
    found = rank_counts([Walk((1, 1)), Walk((1,)), Walk((3,)), Walk(())], TREE)
    assert found == (Counts({3: (1, 2, 0, 1)}), Counts({2: (1, 1, 0)}), Counts({1: (1, 0)}))
    assert sum(found, Counts()) == Counts({1: (1, 0), 2: (1, 1, 0), 3: (1, 2, 0, 1)})


def test_a_walk_that_was_cut_says_nothing_of_its_last_node() -> None:
    assert rank_counts([Walk((1,), cut=True)], TREE) == (Counts({3: (0, 1, 0, 0)}), Counts(), Counts())
    assert rank_counts([Walk((), cut=True)], TREE) == (Counts(),) * 3


def test_a_walk_down_to_a_leaf_examines_no_further() -> None:
    assert rank_counts([Walk((1, 1, 1))], TREE)[2] == Counts({1: (0, 1)})
    assert rank_counts([Walk((2,))], TREE) == (Counts({3: (0, 0, 1, 0)}), Counts(), Counts())


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ((4,), "takes child 4 at depth 1, the tree has 3 there"),
        ((2, 1), "takes child 1 at depth 2, the tree has 0 there"),
        ((1, 0), "holds a rank below 1"),
        ((1, 1, 1, 1), "takes child 1 at depth 4, the tree has 0 there"),
    ],
)
def test_a_walk_that_leaves_the_tree_is_refused(ranks, words) -> None:
    with pytest.raises(ValueError, match=words):
        rank_counts([Walk(ranks)], TREE)


def test_walks_by_the_law_give_the_law_back() -> None:
    generator = np.random.default_rng(3)
    vector, tree = law(0.6, 1.0).vector(4), TreeShape.parse("4,3,2,1")
    outcomes = [0, 1, 2, 3, 4]

    def walk() -> Walk:
        ranks: list[int] = []
        for children in (4, 3, 2, 1):
            chances = [1 - sum(vector[:children]), *vector[:children]]
            rank = int(generator.choice(outcomes[: children + 1], p=chances))
            if rank == 0:
                break
            ranks.append(rank)
        return Walk(tuple(ranks))

    by_depth = rank_counts([walk() for _ in range(4000)], tree)
    assert [found.ranks for found in by_depth] == [4, 3, 2, 1]
    fit = fit_acceptance(sum(by_depth, Counts()))
    assert tuple(fit) == (pytest.approx(0.6, abs=0.03), pytest.approx(1.0, abs=0.15))
