"""What scaling points say: every cell against the fitted lines and the machine's floors, critical lengths, where batch stops
helping.

T_T is a plain step, T_D a drafted token, T_V a verify forward, T_ovh accept + commit + host of a round, Omega the measured
tokens of a round; a plain step has T_ovh too. Pure functions of the points. Not known here: engines, and how it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...costs import (
    CostModel,
    alpha_implied,
    forward_floor,
    inflection_length,
    kv_half_length,
    self_draft_disagreement,
)
from ...records import Cell, SpecConfig
from ...summary import PairedRatio
from .lines import Fits, cost_model, fit_lines
from .samples import Point, Scaling

INFLECTION_STEPS = 16  # lengths per doubling that are tried


@dataclass(frozen=True, slots=True)
class PlainRow:
    """Plain decoding in one cell. `fitted_s` and `floor_s` are of a whole step; None without a fit."""

    point: Point
    fitted_s: float | None
    floor_s: float

    @property
    def step_s(self) -> float:
        """T_T, measured."""
        return self.point.step_s.median

    @property
    def residual(self) -> float | None:
        """Measured over fitted - 1."""
        return self.step_s / self.fitted_s - 1 if self.fitted_s else None

    @property
    def efficiency(self) -> float:
        """eta_AR: the floor over what was measured."""
        return self.floor_s / self.step_s


@dataclass(frozen=True, slots=True)
class SpecRow:
    """One speculative configuration in one cell: measured times, the speed-up measured and by the identity, and its ceiling.

    fitted_speedup  from the fitted lines and this cell's acceptance; None where a line is missing
    ideal_speedup   measured Omega, with every forward replaced by its floor
    """

    point: Point
    plain_s: float
    depth: int
    fitted_speedup: float | None
    ideal_speedup: float

    @property
    def omega(self) -> float:
        """Tokens of a round per row, measured, bonus included."""
        return self.point.tokens_per_round

    @property
    def draft_ratio(self) -> float:
        """T_D / T_T."""
        assert self.point.draft_s is not None
        return self.point.draft_s.median / self.plain_s

    @property
    def verify_ratio(self) -> float:
        """T_V / T_T."""
        return self.point.verify_s / self.plain_s

    @property
    def overhead_ratio(self) -> float:
        """T_ovh / T_T."""
        return self.point.overhead_s.median / self.plain_s

    @property
    def identity(self) -> float:
        """Omega * T_T / T_step, from medians."""
        return self.omega / (self.depth * self.draft_ratio + self.verify_ratio + self.overhead_ratio)

    @property
    def speedup(self) -> PairedRatio | None:
        """Tokens/s over those of plain decoding, block by block."""
        return self.point.speedup

    @property
    def share_of_ideal(self) -> float | None:
        """S / S_ideal: what engineering leaves to be had, acceptance apart."""
        return self.speedup.mean / self.ideal_speedup if self.speedup else None


@dataclass(frozen=True, slots=True)
class Flattening:
    """How the fitted speed-up of a configuration moves with batch at one length, T_step = fixed_s + batch * (the rest).

    kv_s, compute_s, overhead_s  what each sequence adds to a round: KV reads, computing (per token terms), overhead
    draft_s          what each sequence adds to one drafted token: dT_D/dB
    first, limit     speed-up towards no fixed time amortised, and towards infinite batch
    compute_length   context below which computing exceeds KV reads in what a sequence adds; None: KV costs nothing
    is_one_window    the KV that the draft reads is within compute_s
    measured         (batch, speed-up) at this length, by batch
    """

    config: str
    length: int
    omega: float
    fixed_s: float
    draft_s: float
    kv_s: float
    compute_s: float
    overhead_s: float
    first: float
    limit: float
    compute_length: float | None
    is_one_window: bool
    measured: tuple[tuple[int, float], ...]

    @property
    def batch(self) -> float:
        """Where sequences add more than the fixed time: half of the way from `first` to `limit`."""
        added = self.kv_s + self.compute_s + self.overhead_s
        return self.fixed_s / added if added else math.inf


@dataclass(frozen=True, slots=True)
class Analysis:
    """All that is concluded from a Scaling.

    kv_half       (batch, query tokens) -> S_kv50, fitted
    inflection    configuration -> S_inflection within the measured lengths, fitted; None: no such length
    disagreement  largest relative gap between self-drafted tokens and the target's line
    """

    scaling: Scaling
    fits: Fits
    plain: tuple[PlainRow, ...]
    rows: tuple[SpecRow, ...]
    kv_half: Mapping[tuple[int, int], float]
    inflection: Mapping[str, int | None]
    flattening: tuple[Flattening, ...]
    disagreement: float | None


def analyse(scaling: Scaling) -> Analysis:
    """Fit the lines and hold every cell against them."""
    fits = fit_lines(scaling)
    rows = tuple(_spec_rows(scaling, fits))
    batches = sorted({p.cell.batch for p in scaling.points})
    widths = sorted({1} | {SpecConfig.parse(c).num_nodes + 1 for c in scaling.configs})
    kv = scaling.target.kv_bytes_per_token
    half = {(b, q): kv_half_length(fits.target, b, q, kv) for b in batches for q in widths} if fits.target else {}
    models = {config: model for config in scaling.configs if (model := cost_model(scaling, fits, config)) is not None}
    drafted = fits.drafts.get("self")
    return Analysis(
        scaling, fits, tuple(_plain_rows(scaling, fits)), rows, half,
        {config: _inflection(scaling, model, config) for config, model in models.items()},
        tuple(_flattening(scaling, fits, model, config) for config, model in models.items()),
        self_draft_disagreement(fits.target, drafted) if fits.target and drafted else None,
    )


# Cell by cell.


def context_cell(point: Point) -> Cell:
    """The cell with the context that its rounds had on average: it grows while they run."""
    return Cell(point.cell.batch, round(point.context_tokens))


def plain_fitted_s(scaling: Scaling, fits: Fits, cell: Cell) -> float | None:
    """T_T of a cell by the fitted lines."""
    if fits.target is None:
        return None
    return CostModel(
        fits.target, None, None, scaling.target.kv_bytes_per_token, 0, plain_overhead=fits.plain_overhead
    ).plain_s(cell)


def _plain_rows(scaling: Scaling, fits: Fits) -> Iterator[PlainRow]:
    for point in scaling.points:
        if point.config == "off":
            fitted_s = plain_fitted_s(scaling, fits, context_cell(point))
            yield PlainRow(point, fitted_s, _floor_s(scaling, point, "target", 1, None))


def _spec_rows(scaling: Scaling, fits: Fits) -> Iterator[SpecRow]:
    for point in scaling.points:
        plain = scaling.point(point.cell, "off")
        if point.config not in scaling.configs or plain is None:
            continue
        spec, model = point.spec, cost_model(scaling, fits, point.config)
        fitted = None if model is None else fitted_speedup(model, spec, context_cell(point), point.tokens_per_round)
        yield SpecRow(point, plain.step_s.median, spec.depth, fitted, _ideal_speedup(scaling, point, spec))


def fitted_speedup(model: CostModel, spec: SpecConfig, cell: Cell, omega: float) -> float:
    """x by the fitted lines at a prescribed Omega."""
    view = spec.view.max_tokens if spec.view else None
    return model.predict(cell, spec.depth, view, alpha_implied(spec.depth, omega)).speedup


def _floor_s(scaling: Scaling, point: Point, network: str, query_tokens: int, view_tokens: int | None) -> float:
    found = scaling.draft if network == "draft" else scaling.target
    assert found is not None
    keys = round(point.context_tokens)
    seen = keys if view_tokens is None else min(keys, view_tokens)
    return forward_floor(found.shape, scaling.limits, point.cell.batch, query_tokens, seen, found.element_bytes).total_s


def _ideal_speedup(scaling: Scaling, point: Point, spec: SpecConfig) -> float:
    """Omega floors of plain steps over the floors of a round; a lookup drafts for nothing."""
    view = spec.view.max_tokens if spec.view else None
    drafted = 0.0
    if spec.drafter != "ngram":
        drafted = spec.depth * _floor_s(scaling, point, "draft" if spec.drafter == "model" else "target", 1, view)
    round_s = drafted + _floor_s(scaling, point, "target", spec.num_nodes + 1, None)
    return point.tokens_per_round * _floor_s(scaling, point, "target", 1, None) / round_s


# Critical lengths, and where more batch stops helping.


def omega_at(scaling: Scaling, config: str, length: int) -> float:
    """Measured tokens of a round at a context length: mean over batches, between measured lengths linear in its logarithm."""
    by_length: dict[int, list[float]] = {}
    for p in scaling.points:
        if p.config == config:
            by_length.setdefault(p.cell.length, []).append(p.tokens_per_round)
    known = sorted((math.log(n), sum(values) / len(values)) for n, values in by_length.items())
    at = math.log(length)
    for (left, low), (right, high) in zip(known, known[1:], strict=False):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return known[0][1] if at < known[0][0] else known[-1][1]


def _inflection(scaling: Scaling, model: CostModel, config: str) -> int | None:
    spec = SpecConfig.parse(config)
    cells = [p.cell for p in scaling.points if p.config == config]
    shortest, longest = min(c.length for c in cells), max(c.length for c in cells)
    steps = max(1, round(INFLECTION_STEPS * math.log2(longest / shortest)))
    lengths = sorted({round(shortest * (longest / shortest) ** (i / steps)) for i in range(steps + 1)})
    return inflection_length(
        model, sorted({c.batch for c in cells}), lengths, spec.depth, spec.view.max_tokens if spec.view else None,
        lambda length: alpha_implied(spec.depth, omega_at(scaling, config, length)),
    )


def _flattening(scaling: Scaling, fits: Fits, model: CostModel, config: str) -> Flattening:
    """At the longest measured length."""
    spec = SpecConfig.parse(config)
    gamma, q, draft, target = spec.depth, spec.num_nodes + 1, model.draft, model.target
    assert draft is not None
    length = max(p.cell.length for p in scaling.points if p.config == config)
    view = spec.view.max_tokens if spec.view else None
    omega = omega_at(scaling, config, length)
    draft_kv_s = draft.per_kv_byte_s * model.draft_kv_bytes_per_token * min(length, view or length)
    kv_per_token_s = target.per_kv_byte_s * model.kv_bytes_per_token
    compute_s = gamma * draft.per_token_s + q * target.per_token_s
    kv_s = gamma * draft_kv_s + kv_per_token_s * length
    over, plain = model.overhead, model.plain_overhead
    over_fixed, over_row = (over.fixed_s, over.per_token_s) if over else (0.0, 0.0)
    plain_fixed, plain_row = (plain.fixed_s, plain.per_token_s) if plain else (0.0, 0.0)
    fixed_s = gamma * draft.fixed_s + target.fixed_s + over_fixed
    return Flattening(
        config, length, omega, fixed_s, draft.per_token_s + draft_kv_s, kv_s, compute_s, over_row,
        first=_ratio(omega * (target.fixed_s + plain_fixed), fixed_s),
        limit=_ratio(omega * (target.per_token_s + kv_per_token_s * length + plain_row), compute_s + kv_s + over_row),
        compute_length=max(0.0, compute_s - gamma * draft_kv_s) / kv_per_token_s if kv_per_token_s else None,
        is_one_window=spec.drafter in fits.one_window, measured=_gains(scaling, config, length),
    )


def _gains(scaling: Scaling, config: str, length: int) -> tuple[tuple[int, float], ...]:
    points = (p for p in scaling.points if p.config == config and p.cell.length == length)
    return tuple(sorted((p.cell.batch, p.speedup.mean) for p in points if p.speedup))


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.inf
