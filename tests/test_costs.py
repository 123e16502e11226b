"""Theory is arithmetic: counts are exact, limits reproduce known tables, fits find the law that made the data."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specdec_lab.costs import (
    SHAPES,
    CostModel,
    CostSample,
    FittedCost,
    Limits,
    ModelShape,
    WhatIf,
    alpha_implied,
    fit_acceptance,
    fit_cost,
    forward_floor,
    ideal_speedup,
    inflection_length,
    kv_half_length,
    largest_batch,
    longer_chain_pays,
    memory_bound,
    node_pays,
    nonnegative_least_squares,
    omega,
    self_draft_disagreement,
    what_if,
)
from specdec_lab.records import Cell

H200 = Limits(read_bytes_per_s=4.3e12, flops_per_s=788e12)
MEMORY = 139 * 2**30
TINY = ModelShape(layers=3, hidden=10, heads=4, kv_heads=2, head_dim=6, intermediate=7, vocab=11)

# --- counts ---


def matrices(shape: ModelShape) -> list[tuple[int, int]]:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    d, ff = shape.hidden, shape.intermediate
    return [(d, q), (d, kv), (d, kv), (q, d), (d, ff), (d, ff), (ff, d)] * shape.layers


def test_parameters_are_the_entries_of_the_matrices() -> None:
    blocks = sum(rows * columns for rows, columns in matrices(TINY))
    assert TINY.block_params == blocks
    assert TINY.linear_params == blocks + 110
    assert TINY.params == blocks + 220
    assert ModelShape(3, 10, 4, 2, 6, 7, 11, tied=True).params == blocks + 110


def test_a_forward_reads_each_weight_once_and_multiplies_each_token_with_it() -> None:
    assert TINY.weight_bytes(2) == 2 * TINY.linear_params
    assert TINY.linear_flops(5) == 5 * (sum(2 * r * c for r, c in matrices(TINY)) + 2 * 110)


def test_attention_flops_are_two_dot_products_per_query_and_key() -> None:
    queries_keys = [(0, 3), (1, 4), (2, 5)]
    pairs = sum(keys for _, keys in queries_keys)
    assert TINY.attention_flops(pairs) == sum(2 * 2 * 6 for _ in range(pairs)) * 4 * 3


@pytest.mark.parametrize(
    ("name", "gigabytes", "kv_kib"),
    [("Llama-3.1-8B", 15.01, 128), ("Llama-2-7B-32K", 13.21, 512), ("1.7B", 3.44, 112), ("1B", 2.47, 32)],
)
def test_known_models_have_their_known_sizes(name: str, gigabytes: float, kv_kib: int) -> None:
    assert SHAPES[name].weight_bytes(2) == pytest.approx(gigabytes * 1e9, abs=5e6)
    assert SHAPES[name].kv_bytes_per_token(2) == kv_kib * 1024


@pytest.mark.parametrize("change", [{"layers": 0}, {"kv_heads": 3}])
def test_an_impossible_shape_is_refused(change: dict[str, int]) -> None:
    sizes = {"layers": 3, "hidden": 10, "heads": 4, "kv_heads": 2, "head_dim": 6, "intermediate": 7, "vocab": 11}
    with pytest.raises(ValueError, match="ModelShape"):
        ModelShape(**{**sizes, **change})


# --- limits ---

# model, batch, K tokens | plain step ms, KV share %, verify 5 and 9 ms, draft 256/512/1024 ms | speed-ups at
# alpha .7/.8/.9 with window 512, "@best gamma" | with the 1B draft
TABLE = """
Llama-3.1-8B 1 1     3.52 1    3.52 3.52    3.50 3.51 3.52  0.85@1 0.90@1 0.95@1  1.70 2.03 2.65
Llama-3.1-8B 1 128   7.49 53   7.49 7.49    3.50 3.51 3.52  1.16@1 1.26@2 1.43@3  2.12 2.70 3.88
Llama-3.1-8B 8 16    7.49 53   7.49 7.49    3.55 3.62 3.74  1.15@1 1.24@2 1.40@3  2.09 2.66 3.79
Llama-3.1-8B 8 64    19.47 82  19.47 19.47  3.55 3.62 3.74  1.63@3 1.93@4 2.48@7  2.58 3.49 5.56
Llama-3.1-8B 32 16   19.47 82  19.48 21.48  3.75 3.99 4.49  1.57@3 1.85@4 2.30@5  2.47 3.15 4.50
Llama-3.1-8B 64 1    5.49 36   8.11 13.00   4.00 4.50 5.49  0.93@1 0.99@1 1.04@1  1.64 1.83 2.03
Llama-3.1-8B 128 4   19.48 82  28.21 37.99  4.51 5.51 7.51  1.26@1 1.38@2 1.59@4  1.70 2.01 2.57
Llama-3.1-8B 7 128   31.46 89  31.46 31.46  3.55 3.60 3.71  1.90@4 2.35@5 3.21@9  2.77 3.85 6.44
Llama-2-7B-32K 1 32  7.07 57   7.07 7.07    3.10 3.14 3.20  1.18@1 1.29@2 1.48@4  - - -
Llama-2-7B-32K 32 4  19.06 84  19.09 20.88  4.09 5.09 7.09  1.43@2 1.64@3 2.00@5  - - -
Llama-2-7B-32K 128 1 19.07 84  26.85 35.56  7.15 11.14 19.07  1.03@1 1.09@1 1.15@2  - - -
Llama-2-7B-32K 14 16 31.04 90  31.06 31.07  3.52 3.96 4.83  1.84@4 2.25@5 3.03@9  - - -
1.7B 1 1             0.83 3    0.83 0.83    0.81 0.81 0.83  0.86@1 0.91@1 0.96@1  - - -
1.7B 8 128           28.77 97  28.77 28.77  0.86 0.91 1.02  2.57@7 3.47@9 5.53@16  - - -
1.7B 64 4            7.79 90   8.40 9.54    1.25 1.68 2.56  1.52@2 1.75@3 2.14@5  - - -
1.7B 292 4           33.18 96  38.35 43.51  3.31 5.30 9.29  1.59@3 1.87@4 2.38@7  - - -
1.7B 37 32           33.14 98  33.15 33.81  1.06 1.31 1.82  2.45@6 3.24@8 4.95@14  - - -
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:3]))
def test_the_limit_tables_are_reproduced(row: list[str]) -> None:
    shape, batch, length = SHAPES[row[0]], int(row[1]), int(row[2]) * 1024
    plain = forward_floor(shape, H200, batch, 1, length)
    verify = [forward_floor(shape, H200, batch, q, length + q - 1).total_s for q in (5, 9)]
    drafts = [forward_floor(shape, H200, batch, 1, min(length, window + 4)).total_s for window in (256, 512, 1024)]
    expected = [float(value) for value in (row[3], *row[5:10])]
    assert [1e3 * t for t in (plain.total_s, *verify, *drafts)] == pytest.approx(expected, abs=0.0101)
    assert round(100 * plain.attention_s / plain.total_s) == int(row[4])
    for alpha, wanted, small in zip((0.7, 0.8, 0.9), row[10:13], row[13:16], strict=True):
        best = best_ideal(shape, Cell(batch, length), alpha)
        assert f"{best.speedup:.2f}@{best.gamma}" == wanted
        if small != "-":
            assert f"{best_ideal(shape, Cell(batch, length), alpha, SHAPES['1B']).speedup:.2f}" == small


def best_ideal(shape: ModelShape, cell: Cell, alpha: float, drafter: ModelShape | None = None):  # noqa: ANN201
    chains = (ideal_speedup(shape, H200, cell, alpha, gamma, 516, drafter) for gamma in range(1, 33))
    return max(chains, key=lambda p: p.speedup)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("Llama-3.1-8B", {4: 232, 16: 58, 32: 29, 64: 14, 128: 7}),
        ("Llama-2-7B-32K", {4: 59, 16: 14, 32: 7}),
        ("1.7B", {4: 292, 16: 73, 32: 37, 64: 18, 128: 9}),
    ],
)
def test_the_largest_batch_of_the_tables_is_what_fits(name: str, fits: dict[int, int]) -> None:
    assert {k: largest_batch(SHAPES[name], k * 1024, MEMORY) for k in fits} == fits


def test_verify_is_free_until_the_ridge_and_then_costs_compute() -> None:
    shape = SHAPES["Llama-3.1-8B"]
    assert H200.ridge == pytest.approx(183, abs=0.5)
    assert forward_floor(shape, H200, 1, 183, 1024).linear_s == forward_floor(shape, H200, 1, 1, 1024).linear_s
    beyond = forward_floor(shape, H200, 1, 366, 1024)
    assert beyond.linear_s == beyond.linear_compute_s > beyond.weights_s


@given(
    st.sampled_from(sorted(SHAPES)), st.sampled_from([1, 4, 16, 64, 128, 256]), st.sampled_from([1, 5, 40, 200, 800])
)
def test_s_mem_is_where_the_intensity_of_the_whole_model_crosses_the_ridge(name: str, batch: int, q: int) -> None:
    shape = SHAPES[name]

    def intensity(length: float) -> float:
        flops = shape.linear_flops(batch * q) + shape.attention_flops(1) * batch * q * length
        return flops / (shape.weight_bytes(2) + batch * length * shape.kv_bytes_per_token(2))

    bound = memory_bound(shape, H200, batch, q)
    short, long = intensity(0) <= H200.ridge, intensity(1e12) <= H200.ridge
    assert bound.where == {(True, True): "always", (False, False): "never", (True, False): "below"}.get(
        (short, long), "beyond"
    )
    if bound.length is not None:
        assert intensity(bound.length) == pytest.approx(H200.ridge)


# --- acceptance ---


@given(st.integers(0, 64), st.floats(0, 0.99))
def test_omega_is_the_closed_form_where_that_is_safe(gamma: int, alpha: float) -> None:
    assert omega(gamma, alpha) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


def test_omega_of_a_perfect_draft_counts_all_tokens() -> None:
    assert omega(7, 1.0) == 8


@given(st.integers(1, 64), st.floats(0, 1))
def test_alpha_implied_is_the_inverse_of_omega(gamma: int, alpha: float) -> None:
    assert omega(gamma, alpha_implied(gamma, omega(gamma, alpha))) == pytest.approx(omega(gamma, alpha))


def test_alpha_implied_is_clamped() -> None:
    assert alpha_implied(3, 0.5) == 0
    assert alpha_implied(3, 1.0) == 0
    assert alpha_implied(3, 4.0) == 1
    assert alpha_implied(3, 9.0) == 1
    with pytest.raises(ValueError, match="at least 1 drafted token"):
        alpha_implied(0, 1.0)


def test_the_acceptance_law_is_found_again_clamped_and_flagged_outside() -> None:
    law = {(s, k): 0.9 - 0.03 * math.log(s) + 0.02 * math.log(k) for s in (512, 4096) for k in (64, 512)}
    fit = fit_acceptance([(s, k, alpha) for (s, k), alpha in law.items()])
    assert fit.alpha(1024, 128) == pytest.approx(0.9 - 0.03 * math.log(1024) + 0.02 * math.log(128))
    assert fit.outside(1024, 128) == ()
    assert fit.outside(8192, 32) == (
        "acceptance: length 8192 is outside the calibrated 512 to 4096",
        "acceptance: view 32 is outside the calibrated 64 to 512",
    )
    assert fit.alpha(10**30, 1) == 0
    with pytest.raises(ValueError, match="context length and window apart"):
        fit_acceptance([(512, 64, 0.8), (1024, 64, 0.7), (2048, 64, 0.6)])


# --- the fitted cost model ---

KV = 1024.0
A, B, C, B2, KNEE = 2e-3, 3e-6, 4e-10, 5e-6, 60


def law(batch: int, q: int, kv_bytes: float, knee: float = math.inf) -> float:
    return A + B * batch * q + C * kv_bytes + (B2 * (batch * q - knee) if batch * q > knee else 0)


def grid(knee: float = math.inf) -> list[CostSample]:
    cells = product((1, 4, 16, 32), (1, 5), (256, 2048, 8192))
    return [CostSample(b, q, b * s * KV, law(b, q, b * s * KV, knee)) for b, q, s in cells]


@pytest.mark.parametrize("knee", [math.inf, KNEE])
def test_a_fit_finds_the_law_that_made_the_times(knee: float) -> None:
    fit = fit_cost(grid(knee), knee)
    assert fit.fixed_s == pytest.approx(A)
    assert fit.per_token_s == pytest.approx(B)
    assert fit.per_kv_byte_s == pytest.approx(C)
    assert fit.beyond_knee_s == pytest.approx(B2 if knee == KNEE else 0)
    assert fit.seconds(8, 3, 8 * 1000 * KV) == pytest.approx(law(8, 3, 8 * 1000 * KV, knee))
    assert fit.left_out == pytest.approx(0, abs=1e-9)
    assert max(map(abs, fit.residuals)) < 1e-9


def test_the_fit_is_relative_so_that_short_times_count_like_long_ones() -> None:
    samples = [CostSample(s.batch, s.query_tokens, s.kv_bytes, s.seconds * (1 + i % 5)) for i, s in enumerate(grid())]
    fit = fit_cost(samples)
    relative = [fit.seconds(s.batch, s.query_tokens, s.kv_bytes) / s.seconds - 1 for s in samples]
    slopes = [error / s.seconds for error, s in zip(relative, samples, strict=True)]
    assert fit.fixed_s > 0
    assert sum(slopes) == pytest.approx(0, abs=1e-9 * sum(map(abs, slopes)))  # the optimum in relative weights only


def test_a_kernel_inefficient_at_one_batch_shows_as_residuals_of_that_batch() -> None:
    slow = [
        CostSample(s.batch, s.query_tokens, s.kv_bytes, s.seconds * (1.3 if s.batch == 16 else 1)) for s in grid()
    ]
    fit = fit_cost(slow)
    at_16 = [r for s, r in zip(slow, fit.residuals, strict=True) if s.batch == 16]
    others = [r for s, r in zip(slow, fit.residuals, strict=True) if s.batch != 16]
    assert min(at_16) > max(others)
    assert fit.left_out is not None
    assert fit.left_out > 0.1


def test_leaving_the_calibrated_range_is_said() -> None:
    fit = fit_cost(grid())
    assert fit.outside(8, 4, 1e6) == ()
    assert fit.outside(64, 1, 1e6) == ("batch 64 is outside the calibrated 1 to 32",)
    assert fit.outside(32, 6, 1e12) == (
        "tokens 192 is outside the calibrated 1 to 160",
        "kv_bytes 1e+12 is outside the calibrated 262144 to 2.68435e+08",
    )


def test_samples_that_cannot_tell_causes_apart_are_refused_with_what_to_measure() -> None:
    one_window = [CostSample(b, 1, b * 512 * KV, law(b, 1, b * 512 * KV)) for b in (1, 4, 16, 32)]
    with pytest.raises(ValueError, match=r"4 samples do not tell .* apart; .*two windows"):
        fit_cost(one_window)
    with pytest.raises(ValueError, match="0 samples"):
        fit_cost([])
    with pytest.raises(ValueError, match="positive finite"):
        fit_cost([CostSample(1, 1, 1.0, 0.0)])


def test_an_overhead_without_kv_is_the_same_fit() -> None:
    fit = fit_cost([CostSample(b, 1, 0, 1e-4 + 2e-5 * b) for b in (1, 8, 64)])
    assert (fit.fixed_s, fit.per_token_s, fit.per_kv_byte_s) == pytest.approx((1e-4, 2e-5, 0))
    assert fit_cost([CostSample(b, 1, 0, 1e-4 * b) for b in (1, 8)]).left_out is None


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_nonnegative_least_squares_meets_the_optimality_conditions(seed: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    matrix, wanted = generator.normal(size=(7, columns)), generator.normal(size=7)
    x = nonnegative_least_squares(matrix, wanted)
    gradient = matrix.T @ (matrix @ x - wanted)
    assert (x >= 0).all()
    assert (gradient >= -1e-9).all()  # no coefficient can grow
    assert np.abs(gradient * x).max() < 1e-9  # nor any used one change


def test_a_coefficient_is_never_negative_even_when_the_data_asks_for_it() -> None:
    falling = [CostSample(b, q, 0, 1e-3 - 1e-6 * b * q) for b, q in ((1, 1), (4, 5), (16, 5))]
    assert fit_cost(falling).per_token_s == 0


def test_self_drafts_must_cost_what_the_target_costs() -> None:
    target = fit_cost(grid())
    same = fit_cost([CostSample(b, 1, b * k * KV, law(b, 1, b * k * KV)) for b in (1, 32) for k in (64, 512)])
    assert self_draft_disagreement(target, same) < 1e-9
    slow = fit_cost([CostSample(b, 1, b * k * KV, 1.25 * law(b, 1, b * k * KV)) for b in (1, 32) for k in (64, 512)])
    assert self_draft_disagreement(target, slow) == pytest.approx(0.2)


# --- predictions ---


def line(scale: float = 1.0, fixed: float = A) -> FittedCost:
    return FittedCost(scale * fixed, scale * B, scale * C, 0.0, math.inf, tuple(grid()))


def model(**changes: object) -> CostModel:
    parts = {"target": line(), "draft": line(), "overhead": None}
    return CostModel(**{**parts, "kv_bytes_per_token": KV, "draft_kv_bytes_per_token": KV, **changes})  # type: ignore[arg-type]


cells = st.builds(Cell, st.integers(1, 256), st.integers(16, 100_000))
alphas = st.floats(0.01, 0.99)


@given(cells, st.integers(1, 16), alphas, st.integers(8, 4096))
def test_the_speed_up_is_plain_time_over_time_per_token(cell: Cell, gamma: int, alpha: float, view: int) -> None:
    overhead = fit_cost([CostSample(b, 1, 0, 1e-4 + 2e-5 * b) for b in (1, 8, 64)])
    p = model(overhead=overhead, select_s=1e-3).predict(cell, gamma, view, alpha)
    draft = gamma * law(cell.batch, 1, cell.batch * min(view, cell.length) * KV)
    verify = law(cell.batch, gamma + 1, cell.batch * cell.length * KV)
    step = draft + verify + 1e-4 + 2e-5 * cell.batch + 1e-3
    assert p.round_s == pytest.approx(step)
    assert p.speedup == pytest.approx(p.plain_s / (step / omega(gamma, alpha)))
    assert p.plain_s == pytest.approx(law(cell.batch, 1, cell.batch * cell.length * KV))


@given(cells, st.integers(1, 16), alphas)
def test_a_plain_step_has_an_overhead_of_its_own(cell: Cell, gamma: int, alpha: float) -> None:
    overhead = fit_cost([CostSample(b, 1, 0, 3e-4 + 2e-5 * b) for b in (1, 8, 64)])
    plain = fit_cost([CostSample(b, 1, 0, 1e-4 + 1e-5 * b) for b in (1, 8, 64)])
    with_both, with_one = model(overhead=overhead, plain_overhead=plain), model(overhead=overhead)
    assert with_both.plain_s(cell) == pytest.approx(with_one.plain_s(cell) + 1e-4 + 1e-5 * cell.batch)
    both, one = with_both.predict(cell, gamma, 64, alpha), with_one.predict(cell, gamma, 64, alpha)
    assert both.round_s == one.round_s
    assert both.speedup / one.speedup == pytest.approx(both.plain_s / one.plain_s)
    assert with_both.predict(cell, 0, 64, alpha).speedup == 1


def test_no_chain_is_plain_decoding_exactly() -> None:
    overhead = fit_cost([CostSample(b, 1, 0, 1e-2 * b) for b in (1, 8)])
    p = model(overhead=overhead, select_s=1.0).predict(Cell(4, 1024), 0, 64, 0.9)
    assert p.speedup == 1
    assert p.round_s == p.plain_s
    assert model(overhead=overhead).best(Cell(4, 64), 64, 0.1).gamma == 0


@given(cells, alphas, st.integers(8, 1024))
def test_the_marginal_rule_says_when_one_more_token_pays(cell: Cell, alpha: float, view: int) -> None:
    m = model()
    for gamma in range(1, 6):
        now, longer = m.predict(cell, gamma, view, alpha), m.predict(cell, gamma + 1, view, alpha)
        assume(abs(longer.speedup / now.speedup - 1) > 1e-9)
        slope = longer.verify_s - now.verify_s
        assert longer_chain_pays(now, alpha, now.draft_s / gamma, slope) == (longer.speedup > now.speedup)
        # a chain's next token is a node whose path probability is alpha^(gamma+1)
        assert node_pays(alpha ** (gamma + 1), now, now.draft_s / gamma + slope) == (longer.speedup > now.speedup)


@given(cells, alphas, st.integers(8, 1024))
def test_the_best_chain_is_found_by_trying_all(cell: Cell, alpha: float, view: int) -> None:
    best = model().best(cell, view, alpha, max_gamma=8)
    assert best.speedup == max(model().predict(cell, g, view, alpha).speedup for g in range(9))
    assert best.speedup >= 1


# --- critical lengths ---


@given(st.integers(1, 256), st.integers(1, 16))
def test_at_s_kv50_reading_kv_takes_as_long_as_all_else(batch: int, q: int) -> None:
    length = kv_half_length(line(), batch, q, KV)
    kv_s = C * batch * length * KV
    assert kv_s == pytest.approx(line().seconds(batch, q, batch * length * KV) / 2)


def test_without_kv_cost_there_is_no_half_length() -> None:
    assert kv_half_length(FittedCost(A, B, 0.0, 0.0, math.inf, ()), 4, 1, KV) == math.inf


@given(st.integers(1, 8), alphas, st.integers(8, 2048), st.integers(8, 60_000))
def test_self_speculation_gains_with_batch_beyond_the_closed_form(gamma: int, alpha: float, k: int, s: int) -> None:
    assume(s >= k)
    threshold = k + B / (C * KV)
    assume(abs(s / threshold - 1) > 1e-3)
    gains = [model().predict(Cell(b, s), gamma, k, alpha).speedup for b in (1, 10, 100, 1000)]
    assert gains == sorted(gains, reverse=s < threshold)


@given(st.integers(1, 8), alphas, st.integers(8, 2048), st.integers(8, 60_000))
def test_at_large_batch_self_speculation_pays_beyond_the_closed_form(gamma: int, alpha: float, k: int, s: int) -> None:
    tokens = omega(gamma, alpha)
    threshold = (gamma * k + (2 * gamma + 1 - tokens) * B / (C * KV)) / (tokens - 1)
    assume(s >= k)
    assume(abs(s / threshold - 1) > 1e-2)
    assert (model().predict(Cell(10**9, s), gamma, k, alpha).speedup > 1) == (s > threshold)


def test_s_inflection_is_the_shortest_length_that_pays_at_every_batch_and_more_with_batch() -> None:
    lengths, batches = [1024, 65536, 4096, 262144, 16384], (1, 8, 64)
    found = inflection_length(model(), batches, lengths, 3, 64, lambda _: 0.9)

    def qualifies(length: int) -> bool:
        gains = [model().predict(Cell(b, length), 3, 64, 0.9).speedup for b in batches]
        return min(gains) >= 1 and gains == sorted(gains)

    assert found == min(filter(qualifies, lengths))
    assert found is not None
    assert found > min(lengths)
    assert inflection_length(model(), batches, lengths, 3, 64, lambda _: 0.01) is None


# --- what if ---


ACCEPTANCE = fit_acceptance([(s, k, 0.8) for s in (256, 8192) for k in (64, 512)])
CELL = Cell(16, 4096)


def test_nothing_changed_is_the_model_itself() -> None:
    answer = what_if(model(), ACCEPTANCE, CELL, 3, 256, WhatIf())
    plain = model().predict(CELL, 3, 256, ACCEPTANCE.alpha(4096, 256))
    assert answer == plain
    assert answer.caveats == ()


def test_another_window_changes_draft_time_and_acceptance_together() -> None:
    rising = fit_acceptance([(s, k, 0.1 * math.log(k)) for s in (256, 8192) for k in (64, 512)])
    narrow, wide = (what_if(model(), rising, CELL, 3, k, WhatIf()) for k in (64, 512))
    assert narrow.draft_s < wide.draft_s
    assert narrow.omega < wide.omega


def test_halved_kv_halves_exactly_the_kv_time_and_warns_about_acceptance() -> None:
    now, then = (what_if(model(), ACCEPTANCE, CELL, 3, 256, WhatIf(kv_scale=k)) for k in (1.0, 0.5))
    assert now.verify_s - then.verify_s == pytest.approx(0.5 * C * 16 * 4096 * KV)
    assert now.draft_s - then.draft_s == pytest.approx(0.5 * 3 * C * 16 * 256 * KV)
    assert "other KV may change alpha: measure" in then.caveats


def test_faster_memory_shortens_reading_and_not_launching() -> None:
    then = what_if(model(), ACCEPTANCE, CELL, 3, 256, WhatIf(memory_speed=2.0, launch_s=5e-4))
    assert then.plain_s == pytest.approx(5e-4 + (A - 5e-4) / 2 + B * 16 + C / 2 * 16 * 4096 * KV)
    with pytest.raises(ValueError, match="must lie within the fixed time"):
        what_if(model(), ACCEPTANCE, CELL, 3, 256, WhatIf(launch_s=1.0))


@given(cells, st.integers(1, 16), st.integers(8, 1024))
def test_perfect_and_free_drafts_bound_every_other(cell: Cell, gamma: int, view: int) -> None:
    real, perfect, free = (
        what_if(model(), ACCEPTANCE, cell, gamma, view, change)
        for change in (WhatIf(), WhatIf(alpha=1.0), WhatIf(free_draft=True))
    )
    assert perfect.omega == gamma + 1
    assert free.draft_s == 0
    assert min(perfect.speedup, free.speedup) >= real.speedup
    assert "alpha 1 is assumed" in perfect.caveats
    assert "a free draft is an upper bound" in free.caveats


def test_an_answer_outside_the_calibrated_range_or_memory_says_so() -> None:
    answer = what_if(model(), ACCEPTANCE, Cell(64, 16384), 3, 32, WhatIf(), weight_bytes=2e9, memory_bytes=3e9)
    assert answer.caveats == (
        "acceptance: length 16384 is outside the calibrated 256 to 8192",
        "acceptance: view 32 is outside the calibrated 64 to 512",
        "needs 3.1 GB of 3.0 GB: does not fit",
        "target: batch 64 is outside the calibrated 1 to 32",
        "target: tokens 256 is outside the calibrated 1 to 160",
        "target: kv_bytes 1.07374e+09 is outside the calibrated 262144 to 2.68435e+08",
        "draft: batch 64 is outside the calibrated 1 to 32",
    )
