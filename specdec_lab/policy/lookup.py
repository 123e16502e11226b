"""Which configuration at this batch and length: pure functions over a measured grid, O(portfolio) per question.

Inside the grid the logarithm of the speed-up of every candidate is interpolated bilinearly in log2(batch) and
log2(length) over the feasible corners, and the largest wins if it reaches `min_speedup`. A candidate that was not
measured in one of these corners is not eligible there: nobody knows that it pays; and in a cell no candidate is worth more
than its confirmed winner, so that the answer at a measured cell is the winner of that cell. Standard library only.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..records import Cell, SpecConfig
from . import reading

if TYPE_CHECKING:
    from .table import Row

METHODS = ("interp", "nearest", "ceil", "floor")
OFF = "off"


@dataclass(frozen=True, slots=True)
class Outside:
    """What happens outside the measured grid: `clamp` to its border, or `off`."""

    batch_above: str = "off"
    batch_below: str = "clamp"
    length_above: str = "clamp"  # configurations whose draft reads the full KV are off there all the same
    length_below: str = "off"


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """When a running engine may change its configuration."""

    switch_gain: float = 0.02
    min_dwell_steps: int = 32
    recheck_tokens: int = 128


@dataclass(frozen=True, slots=True)
class Guard:
    """When a running engine gives up on a draft whose acceptance does not pay here."""

    window_steps: int = 256
    cooldown_steps: int = 2048
    margin: float = 0.03


@dataclass(frozen=True, slots=True)
class Rules:
    """How a table becomes an answer; the `lookup` object of a policy file."""

    method: str = "interp"
    value: str = "ci_low"
    min_speedup: float = 1.03
    ctx_agg: str = "mean"
    outside: Outside = field(default_factory=Outside)
    hysteresis: Hysteresis = field(default_factory=Hysteresis)
    guard: Guard = field(default_factory=Guard)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Rules:
        """Read and check the `lookup` object."""
        data = reading.mapping(data, where)
        reading.only(data, where, ("method", "value", "min_speedup", "outside"), ("ctx_agg", "hysteresis", "guard"))
        return cls(
            method=reading.one_of(data["method"], f"{where}.method", METHODS),
            value=reading.one_of(data["value"], f"{where}.value", ("mean", "ci_low")),
            min_speedup=reading.number(data["min_speedup"], f"{where}.min_speedup", 1),
            ctx_agg=reading.one_of(data.get("ctx_agg", "mean"), f"{where}.ctx_agg", ("mean", "max")),
            outside=_outside(data["outside"], f"{where}.outside"),
            hysteresis=_hysteresis(data.get("hysteresis", {}), f"{where}.hysteresis"),
            guard=_guard(data.get("guard", {}), f"{where}.guard"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def _outside(data: Any, where: str) -> Outside:
    data = reading.mapping(data, where)
    reading.only(data, where, tuple(asdict(Outside())))
    return Outside(**{name: reading.one_of(value, f"{where}.{name}", ("clamp", OFF)) for name, value in data.items()})


def _hysteresis(data: Any, where: str) -> Hysteresis:
    known = asdict(Hysteresis())
    reading.only(reading.mapping(data, where), where, (), tuple(known))
    data = {**known, **data}
    return Hysteresis(
        reading.number(data["switch_gain"], f"{where}.switch_gain", 0),
        reading.whole(data["min_dwell_steps"], f"{where}.min_dwell_steps", 0),
        reading.whole(data["recheck_tokens"], f"{where}.recheck_tokens", 1),
    )


def _guard(data: Any, where: str) -> Guard:
    known = asdict(Guard())
    reading.only(reading.mapping(data, where), where, (), tuple(known))
    data = {**known, **data}
    return Guard(
        reading.whole(data["window_steps"], f"{where}.window_steps", 1),
        reading.whole(data["cooldown_steps"], f"{where}.cooldown_steps", 1),
        reading.number(data["margin"], f"{where}.margin", 0),
    )


@dataclass(frozen=True, slots=True)
class Grid:
    """The table, indexed."""

    portfolio: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: Mapping[Cell, Row]
    infeasible: tuple[Cell, ...]
    growing: frozenset[str]  # configurations whose draft reads more KV as the context grows

    @classmethod
    def of(cls, table: Sequence[Row], portfolio: Sequence[str]) -> Grid:
        """Index a table."""
        configs = {name: SpecConfig.parse(name) for name in portfolio}
        return cls(
            portfolio=tuple(portfolio),
            batches=tuple(sorted({row.cell.batch for row in table})),
            lengths=tuple(sorted({row.cell.length for row in table})),
            rows={row.cell: row for row in table},
            infeasible=tuple(row.cell for row in table if row.state == "infeasible"),
            growing=frozenset(name for name, config in configs.items() if config.view and config.view.max_tokens is None),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a question falls: weighted cells (None = not in the table), or the reason why nothing may be chosen."""

    corners: tuple[tuple[float, Cell, Row | None], ...] = ()
    beyond: bool = False  # longer than every measured length
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """An answer. `values` holds the log speed-up of every eligible candidate; `off` is 0."""

    config: str
    values: Mapping[str, float]
    reason: str

    @property
    def value(self) -> float:
        """Log speed-up of the answer."""
        return self.values[self.config]


def _bracket(axis: Sequence[int], x: float) -> tuple[tuple[int, float], ...]:
    """The grid values around x with their weights in log2; x is clamped to the axis; zero weights are left out."""
    x = min(max(x, axis[0]), axis[-1])
    upper = bisect_left(axis, x)
    if axis[upper] == x:
        return ((axis[upper], 1.0),)
    low, high = axis[upper - 1], axis[upper]
    share = math.log2(x / low) / math.log2(high / low)
    return (low, 1 - share), (high, share)


def _single(axis: Sequence[int], x: float, method: str) -> int:
    around = _bracket(axis, x)
    if method == "nearest":
        return max(around, key=lambda item: item[1])[0]
    return around[-1][0] if method == "ceil" else around[0][0]


def _refusal(grid: Grid, rules: Rules, batch: int, length: float) -> str:
    """Why a point outside the grid, or as large as an infeasible cell, gets `off`; empty when it may go on."""
    if not grid.rows:
        return "the table is empty"
    outside = rules.outside
    borders = (
        (batch > grid.batches[-1], outside.batch_above, f"batch {batch} is above the largest measured, {grid.batches[-1]}"),
        (batch < grid.batches[0], outside.batch_below, f"batch {batch} is below the smallest measured, {grid.batches[0]}"),
        (length > grid.lengths[-1], outside.length_above, f"length {length:g} is above the longest, {grid.lengths[-1]}"),
        (length < grid.lengths[0], outside.length_below, f"length {length:g} is below the shortest, {grid.lengths[0]}"),
    )
    for is_outside, rule, words in borders:
        if is_outside and rule == OFF:
            return words
    for cell in grid.infeasible:
        if batch >= cell.batch and length >= cell.length:
            return f"at least as large as {cell}, which is infeasible: {grid.rows[cell].reason or 'no reason given'}"
    return ""


def locate(grid: Grid, rules: Rules, batch: int, length: float) -> Place:
    """The measured cells that answer for this batch and length, infeasible ones left out."""
    if batch < 1 or length < 0:
        raise ValueError(f"lookup needs a batch of at least 1 and a length of at least 0, got {batch} and {length}")
    if refused := _refusal(grid, rules, batch, length):
        return Place(refused=refused)
    beyond = length > grid.lengths[-1]
    if rules.method == "interp":
        along_batch, along_length = _bracket(grid.batches, batch), _bracket(grid.lengths, length)
        weighted = [(share * part, Cell(b, s)) for b, share in along_batch for s, part in along_length]
    else:
        b, s = _single(grid.batches, batch, rules.method), _single(grid.lengths, length, rules.method)
        weighted = [(1.0, Cell(b, s))]
    feasible = [(weight, cell) for weight, cell in weighted if cell not in grid.infeasible]
    total = sum(weight for weight, _ in feasible)
    if not feasible:
        return Place(refused=f"every cell around {batch}x{length:g} is infeasible")
    return Place(tuple((weight / total, cell, grid.rows.get(cell)) for weight, cell in feasible), beyond)


def worth(grid: Grid, rules: Rules, place: Place, name: str) -> float | None:
    """Log speed-up of a configuration at a place; None where it was not measured in every corner."""
    if name == OFF:
        return 0.0
    if place.refused or (place.beyond and name in grid.growing):
        return None
    total = 0.0
    for weight, _, row in place.corners:
        value = _value(row, rules, name)
        if value is None:
            return None
        total += weight * value
    return total


def _value(row: Row | None, rules: Rules, name: str) -> float | None:
    """Log speed-up in one cell. What nobody confirmed there is worth at most what the cell's own winner is."""
    if row is None or not row.is_decided or row.config is None:
        return None
    if name == OFF:
        return 0.0
    estimate = row.estimates.get(name)
    speedup = None if estimate is None else estimate.ci95[0] if rules.value == "ci_low" else estimate.speedup
    if speedup is None or speedup <= 0:
        return None
    ceiling = math.log(speedup) if name == row.config else _value(row, rules, row.config)
    return math.log(speedup) if ceiling is None else min(math.log(speedup), ceiling)


def break_even(grid: Grid, rules: Rules, batch: int, length: float, name: str) -> float | None:
    """Tokens per row that a round of this configuration must yield to pay; None where it was not measured."""
    place = locate(grid, rules, batch, length)
    total = 0.0
    for weight, _, row in place.corners:
        estimate = row.estimates.get(name) if row is not None else None
        if estimate is None or estimate.break_even_acceptance_length is None:
            return None
        total += weight * math.log(estimate.break_even_acceptance_length)
    return math.exp(total) if place.corners else None


def choose(grid: Grid, rules: Rules, batch: int, length: float) -> Choice:
    """The candidate with the largest value, or `off`."""
    place = locate(grid, rules, batch, length)
    worths = {name: worth(grid, rules, place, name) for name in grid.portfolio}
    values = {name: value for name, value in worths.items() if value is not None}
    if place.refused:
        return Choice(OFF, values, place.refused)
    best = max(values, key=lambda name: (values[name], _backing(place, name)))
    if best == OFF:
        return Choice(OFF, values, "no candidate is expected to be faster than plain decoding")
    if values[best] < math.log(rules.min_speedup):
        return Choice(OFF, values, f"the best, {best}, reaches {math.exp(values[best]):.3f}x, below {rules.min_speedup:g}x")
    return Choice(best, values, f"{math.exp(values[best]):.3f}x ({rules.value})")


def _backing(place: Place, name: str) -> float:
    """The weight of the cells that this configuration won; decides between equals."""
    return sum(weight for weight, _, row in place.corners if row is not None and row.config == name)


def explain(grid: Grid, rules: Rules, batch: int, length: float) -> str:
    """The answer in words, with what it rests on."""
    choice, place = choose(grid, rules, batch, length), locate(grid, rules, batch, length)
    lines = [f"{batch}x{length:g}: {choice.config}, because {choice.reason}"]
    for weight, cell, row in place.corners:
        state = "not in the table" if row is None else row.state + (f", {row.config} won" if row.config else "")
        lines.append(f"  {weight:5.1%} of {cell} ({state})")
    for name in grid.portfolio:
        value = choice.values.get(name)
        known = "not measured in every one of these cells" if value is None else f"{math.exp(value):.3f}x"
        lines.append(f"  {name}: {known}")
    return "\n".join(lines)


def compile_table(grid: Grid, rules: Rules, max_batch: int, edges: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For every batch and bucket, the index of the best candidate in its middle that is eligible at both of its ends."""
    if max_batch < 1 or not edges or edges[0] < 1 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
        raise ValueError(f"compile needs max_batch >= 1 and rising length edges >= 1, got {max_batch} and {list(edges)}")
    buckets = [(a, math.sqrt(a * (b - 1)), b - 1) for a, b in zip(edges, (*edges[1:], edges[-1] + 1), strict=True)]
    return tuple(tuple(_bucket(grid, rules, batch, *bucket) for bucket in buckets) for batch in range(1, max_batch + 1))


def _bucket(grid: Grid, rules: Rules, batch: int, first: int, middle: float, last: int) -> int:
    choice = choose(grid, rules, batch, max(middle, first))
    ends = (choose(grid, rules, batch, length).values for length in (first, last))
    config = choice.config if all(choice.config in values for values in ends) else OFF
    return grid.portfolio.index(config)


def batch_bucket(grid: Grid, batch: int) -> int:
    """The interval of the batch axis that `batch` lies in; a grid value is an interval of its own."""
    return bisect_left(grid.batches, batch) + bisect_right(grid.batches, batch)
