"""Every quoted number equals a count by hand, and every verdict follows from its numbers."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builders import off_step, prefill_step, round_step, run_of
from specdec_lab.records import PHASES, Run, StepRecord, TreeShape
from specdec_lab.summary import (
    Comparison,
    PairedRatio,
    acceptance,
    compare,
    paired_ratio,
    pool,
    request_acceptance_lengths,
    steady_rounds,
    student_quantile,
    summarize,
    verdict,
    wilson_interval,
)

K = 4
CONFIG = f"self:4+60/chain{K}"


@st.composite
def rounds(draw: st.DrawFn, *, ragged: bool, cut: bool = True) -> list[StepRecord]:
    """Rounds of 3 rows; ragged rows draft 0..K tokens; some rows are frozen, some are cut."""
    steps = []
    for index in range(draw(st.integers(1, 12))):
        drafted = [draw(st.integers(0, K)) if ragged else K for _ in range(3)]
        accepted = [draw(st.integers(0, n)) for n in drafted]
        frozen = draw(st.sets(st.integers(0, 2), max_size=2)) if cut else set()
        censored = draw(st.lists(st.booleans(), min_size=3, max_size=3)) if cut else None
        scale = draw(st.sampled_from([0.5, 1.0, 2.0]))
        steps.append(
            round_step(accepted, drafted, config=CONFIG, index=index, frozen=frozen, censored=censored, scale=scale)
        )
    return steps


def outcomes(steps: list[StepRecord]) -> list[tuple[int, int]]:
    """(drafted, accepted) of every row-round that counts, in the plainest way."""
    found = []
    for step in steps:
        for row in range(step.batch):
            if step.kind == "round" and step.drafted[row] > 0 and step.tokens[row] and not step.censored[row]:
                found.append((step.drafted[row], step.accepted[row]))
    return found


# --- acceptance: every definition against a count by hand ---


@given(rounds(ragged=True))
def test_counts_and_rates_are_what_a_hand_counts(steps: list[StepRecord]) -> None:
    counts, rows = acceptance(steps), outcomes(steps)
    assume(rows)
    assert counts.num_spec_steps == len(rows)
    assert counts.num_draft_tokens == sum(drafted for drafted, _ in rows)
    assert counts.num_accepted_draft_tokens == sum(accepted for _, accepted in rows)
    assert counts.histogram == tuple(sum(accepted == j for _, accepted in rows) for j in range(K + 1))
    assert counts.mean_acceptance_length == pytest.approx(statistics.mean(accepted + 1 for _, accepted in rows))
    assert counts.draft_acceptance_rate == sum(a for _, a in rows) / sum(d for d, _ in rows)


@given(rounds(ragged=True))
def test_marginals_divide_by_rows_that_drafted_the_position(steps: list[StepRecord]) -> None:
    rows = outcomes(steps)
    by_hand = []
    for position in range(K):
        drafting = [accepted for drafted, accepted in rows if drafted > position]
        if drafting:
            by_hand.append(sum(accepted > position for accepted in drafting) / len(drafting))
    assert acceptance(steps).acceptance_rate_per_pos == pytest.approx(tuple(by_hand))


@given(rounds(ragged=True))
def test_hazards_divide_by_rows_that_reached_the_position(steps: list[StepRecord]) -> None:
    rows = outcomes(steps)
    by_hand = []
    for position in range(K):
        reaching = [accepted for drafted, accepted in rows if drafted > position and accepted >= position]
        if reaching:
            by_hand.append(sum(accepted > position for accepted in reaching) / len(reaching))
    assert acceptance(steps).conditional_acceptance == pytest.approx(tuple(by_hand))


@given(rounds(ragged=False))
def test_marginals_never_rise_along_a_chain_and_their_sum_is_the_acceptance_length(steps: list[StepRecord]) -> None:
    counts = acceptance(steps)
    marginals = counts.acceptance_rate_per_pos
    assert list(marginals) == sorted(marginals, reverse=True)
    assert counts.mean_acceptance_length == pytest.approx(1 + sum(marginals))


@given(rounds(ragged=False))
def test_hazards_are_the_ratios_of_neighbouring_marginals(steps: list[StepRecord]) -> None:
    counts = acceptance(steps)
    marginals = (1.0, *counts.acceptance_rate_per_pos)
    ratios = [after / before for before, after in zip(marginals, marginals[1:], strict=False) if before]
    assert counts.conditional_acceptance == pytest.approx(tuple(ratios))


def test_hazards_of_ragged_drafts_stay_probabilities_where_ratios_of_marginals_do_not() -> None:
    counts = acceptance([round_step((0, 2), (1, 2), config=CONFIG)])
    assert counts.acceptance_rate_per_pos == (0.5, 1.0)
    assert counts.conditional_acceptance == (0.5, 1.0)  # a ratio of marginals would say 2


@given(rounds(ragged=True))
def test_alpha_censored_is_the_maximum_of_the_likelihood(steps: list[StepRecord]) -> None:
    rows = outcomes(steps)
    accepted = sum(a for _, a in rows)
    rejections = sum(a < d for d, a in rows)
    assert acceptance(steps).alpha_censored == (accepted / (accepted + rejections) if rows else None)


@given(rounds(ragged=False))
def test_system_efficiency_is_emitted_over_the_longest_possible_yield(steps: list[StepRecord]) -> None:
    rows = outcomes(steps)
    emitted = sum(a + 1 for _, a in rows)
    assert acceptance(steps).system_efficiency == (emitted / (len(rows) * (K + 1)) if rows else None)


def test_the_rate_is_not_alpha() -> None:
    # alpha 0.8, gamma 4: expected shares of 0..4 accepted are .2, .16, .128, .1024, .4096
    shares = {0: 2000, 1: 1600, 2: 1280, 3: 1024, 4: 4096}
    steps = [round_step((j,) * n, config=CONFIG) for j, n in shares.items()]
    counts = acceptance(steps)
    assert counts.draft_acceptance_rate == pytest.approx(0.59, abs=0.001)
    assert counts.alpha_censored == pytest.approx(0.8)
    assert counts.conditional_acceptance == pytest.approx((0.8,) * 4)


def test_cut_rows_are_neither_accepted_nor_rejected() -> None:
    plain = acceptance([round_step((3, 0))])
    cut = acceptance([round_step((3, 0)), round_step((1, 2), censored=(True, True))])
    assert cut == plain


def test_frozen_rows_are_ignored_whatever_they_say() -> None:
    step = round_step((3, 2), frozen=[1])
    loud = StepRecord.from_dict({**step.to_dict(), "drafted": (3, 3), "accepted": (3, 2)})
    assert acceptance([loud]) == acceptance([round_step((3,))])


def test_a_tree_counts_its_accepted_path_by_depth_and_its_nodes_as_proposed() -> None:
    tree = TreeShape.parse("4,2,1")
    counts = acceptance([round_step((3, 1, 0), config="model:full/4,2,1")])
    assert counts.histogram == (1, 1, 0, 1)
    assert counts.drafted_at == (3, 3, 3)
    assert counts.num_draft_tokens == 3 * tree.num_nodes


def test_half_a_tree_reaches_the_depth_of_its_first_nodes() -> None:
    counts = acceptance([round_step((1, 1), (4, 5), config="model:full/4,2,1")])
    assert counts.drafted_at == (2, 1, 0)
    assert counts.acceptance_rate_per_pos == (1.0, 0.0)
    assert counts.histogram == (0, 2, 0, 0)


def test_a_tree_that_is_not_listed_level_by_level_reaches_its_deepest_node() -> None:
    assert acceptance([round_step((2,), config="model:full/tree:-1,0,-1")]).drafted_at == (1, 1)


@pytest.mark.parametrize(("accepted", "drafted"), [((1,), 5), ((3,), 5)])
def test_a_record_that_its_configuration_cannot_make_is_refused(accepted: tuple[int, ...], drafted: int) -> None:
    config = CONFIG if accepted == (1,) else "model:full/4,2,1"  # 5 > chain4; 5 nodes of the tree reach depth 2
    with pytest.raises(ValueError, match=r"row 0: .* cannot draft 5 nodes and accept"):
        acceptance([round_step(accepted, drafted, config=config)])


def test_a_run_that_changes_its_configuration_is_counted_by_the_configuration_of_each_round() -> None:
    steps = [off_step(1), round_step((1,), config="ngram/chain2"), round_step((3,), config="self:4+60/chain3")]
    counts = acceptance(steps)
    assert counts.histogram == (0, 1, 0, 1)
    assert counts.drafted_at == (2, 2, 1)


@given(rounds(ragged=True))
def test_requests_have_their_own_means(steps: list[StepRecord]) -> None:
    run = run_of(*steps)
    for row, mean in enumerate(request_acceptance_lengths(run)):
        own = [s.accepted[row] for s in steps if s.drafted[row] and s.tokens[row] and not s.censored[row]]
        assert mean == (pytest.approx(1 + statistics.mean(own)) if own else None)


# --- summaries ---


def test_plain_decoding_has_no_draft_statistics() -> None:
    summary = summarize(run_of(prefill_step(), off_step(), off_step()))
    assert summary.draft_acceptance_rate is None
    assert summary.mean_acceptance_length == 1.0
    assert (summary.num_spec_steps, summary.num_draft_tokens, summary.acceptance_histogram) == (0, 0, ())
    assert (summary.acceptance_rate_per_pos, summary.conditional_acceptance) == ((), ())
    assert summary.tokens_per_s == 2 / off_step().wall_s


@given(rounds(ragged=True))
def test_the_parts_of_the_mean_round_sum_to_its_wall_time(steps: list[StepRecord]) -> None:
    steady = steady_rounds([run_of(*steps)])
    summary = summarize(run_of(*steps))
    assert tuple(summary.parts_s) == PHASES
    assert sum(summary.parts_s.values()) == pytest.approx(statistics.mean(s.wall_s for s in steady))


@given(rounds(ragged=True))
def test_speed_comes_from_rounds_in_which_all_rows_live_uncut(steps: list[StepRecord]) -> None:
    steady = [s for s in steps if all(s.tokens) and not any(s.censored)] or steps
    summary = summarize(run_of(prefill_step(3), *steps))
    assert summary.tokens_per_s == pytest.approx(sum(s.num_emitted for s in steady) / sum(s.wall_s for s in steady))
    assert summary.step_s.median == pytest.approx(statistics.median(s.wall_s for s in steady))
    assert summary.step_s.count == summary.tokens_per_s_spread.count == len(steady)
    assert summary.step_s.p05 <= summary.step_s.median <= summary.step_s.p95
    assert summary.num_emitted_tokens == sum(s.num_emitted for s in steps)


def test_a_tail_with_few_live_rows_does_not_dilute_the_speed() -> None:
    full = [round_step((3, 3), index=i) for i in range(4)]
    tail = [round_step((0, 0), frozen=[1], index=i, scale=8) for i in range(4, 20)]
    assert summarize(run_of(*full, *tail)).tokens_per_s == summarize(run_of(*full)).tokens_per_s


def test_prefill_is_timed_apart_and_every_turn_counts() -> None:
    run = run_of(prefill_step(), round_step(), prefill_step(linear_s=1.5), round_step(scale=2))
    summary = summarize(run)
    assert summary.prefill_s == prefill_step().wall_s + prefill_step(linear_s=1.5).wall_s
    assert summary.step_s.count == 2
    assert pool([run, run_of(round_step())]).prefill_s == summary.prefill_s / 2


def test_kv_numbers_divide_bytes_and_floor_by_measured_attention() -> None:
    steps = [
        round_step(kv_read_bytes=1000, draft_kv_read_bytes=100, kv_floor_s=0.0625),
        round_step(kv_read_bytes=3000, draft_kv_read_bytes=100, kv_floor_s=0.0625, scale=2),
    ]
    summary = summarize(run_of(*steps))
    assert summary.kv_read_bytes == 2100
    assert summary.kv_floor_share == 0.125 / 0.375
    assert summary.kv_read_bytes_per_s == 4000 / 0.375


def test_what_was_not_measured_is_none() -> None:
    summary = summarize(run_of(round_step(attention_s=0.0, kv_read_bytes=5)))
    assert summary.kv_floor_share is None
    assert summary.kv_read_bytes_per_s is None
    assert summarize(run_of(round_step())).kv_floor_share is None  # no ceiling, no floor


def test_a_run_without_rounds_has_a_summary() -> None:
    summary = summarize(run_of(prefill_step()))
    assert (summary.tokens_per_s, summary.step_s.count, summary.kv_read_bytes) == (0.0, 0, 0.0)
    assert summary.prefill_s == prefill_step().wall_s


def test_busy_rounds_are_counted_and_labels_travel() -> None:
    run = run_of(round_step(flags=("busy",)), round_step(), labels=("forced", "KV fits in cache"))
    summary = pool([run, run_of(round_step(flags=("busy", "x")), labels=("forced", "modelled"))])
    assert summary.busy_steps == 2
    assert summary.labels == ("forced", "KV fits in cache", "modelled")


@given(rounds(ragged=True), rounds(ragged=True))
def test_pooled_runs_read_as_one(one: list[StepRecord], two: list[StepRecord]) -> None:
    assert pool([run_of(*one), run_of(*two)]) == summarize(run_of(*one, *two))


def test_runs_of_two_configurations_are_not_pooled() -> None:
    with pytest.raises(ValueError, match=r"one configuration, got off, self:4\+60/chain3; use compare"):
        pool([run_of(off_step()), run_of(round_step())])
    with pytest.raises(ValueError, match="got no run"):
        pool([])


# --- intervals ---


@given(st.integers(0, 500), st.integers(1, 500))
def test_the_wilson_interval_holds_exactly_the_proportions_that_the_score_test_keeps(hits: int, trials: int) -> None:
    assume(hits <= trials)
    low, high = wilson_interval(hits, trials)
    share = hits / trials
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        if 1e-12 < bound < 1 - 1e-12:
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / trials) == pytest.approx(1.959964, rel=1e-4)


def test_wilson_without_trials_knows_nothing_and_refuses_impossible_counts() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 20)[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="got 5 of 4"):
        wilson_interval(5, 4)


@pytest.mark.parametrize(
    ("confidence", "dof", "t"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 5, 2.5706), (0.95, 10, 2.2281),
        (0.95, 30, 2.0423), (0.95, 120, 1.9799), (0.99, 1, 63.6567), (0.99, 4, 4.6041), (0.90, 7, 1.8946),
    ],
)  # fmt: skip
def test_student_quantiles_are_those_of_the_printed_tables(confidence: float, dof: int, t: float) -> None:
    assert student_quantile(confidence, dof) == pytest.approx(t, abs=6e-5)


@pytest.mark.parametrize(("confidence", "dof"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_impossible_quantiles_are_refused(confidence: float, dof: int) -> None:
    with pytest.raises(ValueError, match="student_quantile needs"):
        student_quantile(confidence, dof)


speeds = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=9)


@given(speeds)
def test_swapping_baseline_and_candidate_inverts_the_ratio(pairs: list[tuple[float, float]]) -> None:
    one, two = [p[0] for p in pairs], [p[1] for p in pairs]
    forward, backward = paired_ratio(one, two), paired_ratio(two, one)
    assert forward.mean == pytest.approx(1 / backward.mean)
    assert forward.low == pytest.approx(1 / backward.high)
    assert forward.low <= forward.mean <= forward.high
    assert forward.num_blocks == len(pairs)


@given(speeds, st.lists(st.floats(0.01, 100), min_size=9, max_size=9))
def test_what_slows_a_whole_block_cancels(pairs: list[tuple[float, float]], slow: list[float]) -> None:
    calm = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    loaded = [(a * s, b * s) for (a, b), s in zip(pairs, slow, strict=False)]
    noisy = paired_ratio([a for a, _ in loaded], [b for _, b in loaded])
    assert noisy.mean == pytest.approx(calm.mean)
    assert noisy.low == pytest.approx(calm.low)


def test_the_interval_of_a_hand_computed_case() -> None:
    # logs 0, ln 2, 2 ln 2: mean ln 2, deviation ln 2, half width 4.3027 ln 2 / sqrt 3
    ratio = paired_ratio([1, 1, 1], [1, 2, 4])
    assert ratio.mean == pytest.approx(2)
    assert math.log2(ratio.high) == pytest.approx(1 + 4.30265 / math.sqrt(3), rel=1e-5)
    assert not ratio.is_significant


def test_one_block_gives_no_interval() -> None:
    ratio = paired_ratio([2.0], [5.0])
    assert (ratio.mean, ratio.low, ratio.high, ratio.num_blocks) == (pytest.approx(2.5), 0.0, math.inf, 1)
    assert not ratio.is_significant
    assert ratio.to_dict()["high"] is None


@pytest.mark.parametrize(
    ("baseline", "candidate", "why"),
    [([1.0], [1.0, 2.0], "equally"), ([], [], "equally"), ([0.0], [1.0], "positive"), ([1.0], [math.inf], "positive")],
)
def test_blocks_that_cannot_be_paired_are_refused(baseline: list[float], candidate: list[float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        paired_ratio(baseline, candidate)


# --- comparisons ---

JITTER = (1.0, 1.02, 0.99, 1.01, 1.0, 0.98)


def block_runs(accepted: int, draft_s: float, block: int, jitter: float = 1.0, **overrides: object) -> list[Run]:
    """Plain decoding at 0.75 s a step and a chain3 run, in one block."""
    chain = [round_step((accepted,) * 2, draft_s=draft_s * jitter) for _ in range(4)]
    return [run_of(off_step(), off_step(), block=block, **overrides), run_of(*chain, block=block, **overrides)]


def compared(accepted: int, draft_s: float) -> Comparison:
    runs = [run for b, jitter in enumerate(JITTER) for run in block_runs(accepted, draft_s, b, jitter)]
    return compare(runs)[1]


def test_a_gain_is_said_with_interval_blocks_cost_and_yield() -> None:
    found = compared(accepted=2, draft_s=0.75)
    assert found.speedup is not None
    assert found.speedup.mean == pytest.approx(1.5, rel=0.01)
    assert found.break_even_acceptance_length == pytest.approx(2.0)
    assert found.tokens_per_round == pytest.approx(3.0)
    assert found.verdict == (
        "1.50x faster (1.49 to 1.51, 6 blocks): a round costs 2.00 plain steps (draft 1.00, verify 0.83, rest 0.17) "
        "and yields 3.00 tokens"
    )


def test_a_loss_is_explained_by_what_a_round_costs_and_yields() -> None:
    assert compared(accepted=1, draft_s=1.5).verdict == (
        "slower, 0.67x (0.66 to 0.67, 6 blocks): a round costs 3.00 plain steps (draft 2.00, verify 0.83, rest 0.17) "
        "and yields 2.00 tokens"
    )


def test_a_hopeless_loss_says_that_no_acceptance_would_help() -> None:
    words = compared(accepted=3, draft_s=6.0).verdict
    assert words.startswith("slower, 0.44x")
    assert words.endswith("and yields 4.00 tokens; even full acceptance, 4 tokens, would not pay")


def test_no_difference_is_not_significant() -> None:
    found = compared(accepted=1, draft_s=0.75)
    assert found.speedup is not None
    assert not found.speedup.is_significant
    assert found.verdict.startswith("not significant: 1.00x (0.99 to 1.01, 6 blocks); a round costs 2.00 plain steps")


def test_a_single_block_is_never_significant() -> None:
    found = compare(block_runs(3, 0.25, block=0))[1]
    assert found.verdict.startswith("not significant: 3.00x in 1 block, which gives no interval; a round costs 1.33")


@given(st.integers(0, 3), st.floats(0.01, 8.0))
def test_the_speed_up_is_the_yield_over_the_break_even_length(accepted: int, draft_s: float) -> None:
    found = compared(accepted, draft_s)
    assert found.speedup is not None
    assert found.break_even_acceptance_length is not None
    assert found.speedup.mean == pytest.approx(found.tokens_per_round / found.break_even_acceptance_length, rel=1e-3)
    if found.speedup.is_significant:
        assert ("faster" in found.verdict) == (found.tokens_per_round > found.break_even_acceptance_length)


def test_plain_decoding_is_the_baseline_and_yields_one_token() -> None:
    off = compare(block_runs(2, 0.5, block=0))[0]
    assert off.config == "off"
    assert (off.speedup, off.break_even_acceptance_length) == (None, None)
    assert off.tokens_per_round == pytest.approx(1.0)
    assert off.verdict == "plain decoding, the baseline"


def test_a_configuration_is_paired_with_plain_decoding_of_its_own_block_only() -> None:
    # The machine ran at half speed in block 1: unpaired means would blame or praise the configuration.
    fast = block_runs(2, 0.75, block=0)
    slow = [run_of(off_step(scale=2), block=1), run_of(*[round_step((2, 2), draft_s=1.5, scale=2)] * 9, block=1)]
    alone = [run_of(round_step((0, 0)), block=2), run_of(off_step(scale=16), block=3)]
    found = compare([*fast, *slow, *alone])[1]
    assert found.speedup is not None
    assert found.speedup.num_blocks == 2
    assert (found.speedup.low, found.speedup.high) == (pytest.approx(1.5), pytest.approx(1.5))
    assert found.break_even_acceptance_length == pytest.approx((4 * 1.5 + 9 * 3.0) / 13 / ((2 * 0.75 + 1.5) / 3))
    assert found.tokens_per_round == pytest.approx(3.0)
    assert found.summary.num_spec_steps == 2 * (4 + 9 + 1)


def test_repeats_within_a_block_count_as_one_block() -> None:
    off, chain = block_runs(2, 0.75, block=0)
    assert compare([off, chain, chain, off])[1].speedup == compare([off, chain])[1].speedup


@pytest.mark.parametrize(
    "other",
    [{"workload": "code"}, {"temperature": 0.7}, {"backend": "triton"}, {"instrumented": False}, {"cell": "2x4096"}],
)
def test_runs_of_other_conditions_are_never_paired(other: dict[str, object]) -> None:
    off, chain = block_runs(2, 0.75, block=0)
    stranger = Run(run_of(**{"block": 0, "config": chain.header.config, **other}).header, chain.steps)
    found = compare([off, stranger])[1]
    assert found.speedup is None
    assert found.break_even_acceptance_length is None
    assert found.verdict == "no verdict: no block measured plain decoding beside it"


def test_cells_and_configurations_come_in_the_order_of_first_appearance() -> None:
    names = [("2x4096", "ngram/chain2"), ("2x512", "off"), ("2x4096", "off"), ("2x512", "self:full/chain1")]
    runs = [run_of(off_step() if c == "off" else round_step((0, 1), config=c), cell=cell) for cell, c in names]
    found = [(str(c.cell), c.config) for c in compare(runs)]
    assert found == [names[0], names[2], names[1], names[3]]


def test_caveats_travel_with_the_verdict() -> None:
    off, chain = block_runs(2, 0.75, block=0)
    busy = round_step((2, 2), flags=("busy",))
    forced = Run(run_of(block=0, labels=("forced", "KV fits in cache")).header, (*chain.steps, busy))
    words = compare([off, Run(forced.header, forced.steps)])[1].verdict
    assert words.endswith("[forced, machine busy in 1 rounds]")


def test_blocks_that_contradict_their_pool_are_told() -> None:
    summary = summarize(run_of(*[round_step((3, 3))] * 3))
    words = verdict(summary, PairedRatio(0.8, 0.7, 0.9, 4), off_step_s=0.5, tokens_per_round=4.0)
    assert "slower, 0.80x" in words
    assert "all blocks pooled say the opposite" in words
