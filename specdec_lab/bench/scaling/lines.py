"""The cost lines through scaling points: forwards of the target, drafted tokens, overhead; each fitted, or a reason why not.

Not known here: what is concluded from a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...costs import CostModel, CostSample, FittedCost, fit_cost
from ...records import Cell, SpecConfig
from .samples import IN_CACHE, Point, Scaling

SAME_WINDOW = 1.25  # ratio of KV bytes below which windows count as one


@dataclass(frozen=True, slots=True)
class Fits:
    """The lines of section 1.3 of the cost model; None or absent where they could not be told apart, with the reason.

    target          decode and verify forwards together; one sample per `sampled` (cell, configuration, width)
    beyond_cache    the same from the cells whose KV does not fit in cache; None where that is all or too few of them
    drafts          a drafted token, by drafter
    overhead        T_ovh of a round; plain_overhead: of a plain step
    one_window      drafters measured with one window: what their KV costs is within the time per token
    """

    target: FittedCost | None
    sampled: tuple[tuple[Cell, str, int], ...]
    beyond_cache: FittedCost | None
    drafts: Mapping[str, FittedCost]
    overhead: FittedCost | None
    plain_overhead: FittedCost | None
    one_window: frozenset[str]
    why_not: Mapping[str, str]


def fit_lines(scaling: Scaling) -> Fits:
    """Decode and verify medians, draft medians of the configurations (not of probes), and overheads."""
    why_not: dict[str, str] = {}
    sampled = [(p, time) for p in scaling.points for time in p.verify if time.seconds.median > 0]
    samples = [CostSample(p.cell.batch, t.query_tokens, t.kv_bytes, t.seconds.median) for p, t in sampled]
    target = _fit("target", samples, why_not)
    beyond = [sample for sample, (p, _) in zip(samples, sampled, strict=True) if IN_CACHE not in p.labels]
    is_mixed = 0 < len(beyond) < len(samples)
    drafts, one_window = {}, set()
    for drafter in dict.fromkeys(SpecConfig.parse(config).drafter for config in scaling.configs):
        tokens = _draft_samples(scaling, drafter)
        if not tokens:
            why_not[f"draft {drafter}"] = "it drafts without a chain of forwards"
            continue
        if _is_one_window(tokens):
            one_window.add(drafter)
        fitted = _fit_draft(drafter, tokens, drafter in one_window, why_not)
        if fitted is not None:
            drafts[drafter] = fitted
    spec = [p for p in scaling.points if p.config in scaling.configs]
    plain = [p for p in scaling.points if p.config == "off"]
    return Fits(
        target, tuple((p.cell, p.config, time.query_tokens) for p, time in sampled),
        _fit("target beyond the cache", beyond, why_not) if is_mixed else None, drafts,
        _fit("overhead", _overhead_samples(spec), why_not), _fit("plain overhead", _overhead_samples(plain), why_not),
        frozenset(one_window), why_not,
    )


def _fit(name: str, samples: Sequence[CostSample], why_not: dict[str, str]) -> FittedCost | None:
    try:
        return fit_cost(samples)
    except ValueError as error:
        why_not[name] = str(error)
        return None


def _draft_samples(scaling: Scaling, drafter: str) -> list[CostSample]:
    """Medians of a drafted token, of chains only: a level of a tree is wider than one token."""
    return [
        CostSample(p.cell.batch, 1, p.draft_kv_bytes, p.draft_s.median)
        for p in scaling.points
        if p.config in scaling.configs and p.spec.drafter == drafter and p.draft_s and p.draft_s.median > 0
        and p.draft_kv_bytes > 0 and p.spec.tree is not None and p.spec.tree.is_chain
    ]  # fmt: skip


def _is_one_window(samples: Sequence[CostSample]) -> bool:
    """Whether all read about the same KV per sequence; a first token that travels with the root makes it not quite equal."""
    per_row = [sample.kv_bytes / sample.batch for sample in samples]
    return max(per_row) < SAME_WINDOW * min(per_row)


def _fit_draft(drafter: str, samples: Sequence[CostSample], is_one_window: bool, why_not: dict[str, str]) -> FittedCost | None:
    """d0 + d1*B + d2*KV. With one window KV bytes grow as the batch does and cannot be told from it: then d0 + d1*B."""
    seen = [replace(sample, kv_bytes=0.0) for sample in samples] if is_one_window else samples
    fitted = _fit(f"draft {drafter}", seen, why_not)
    return None if fitted is None else replace(fitted, samples=tuple(samples))


def _overhead_samples(points: Sequence[Point]) -> list[CostSample]:
    return [CostSample(p.cell.batch, 1, 0, p.overhead_s.median) for p in points if p.overhead_s.median > 0]


def cost_model(scaling: Scaling, fits: Fits, config: str) -> CostModel | None:
    """The fitted lines of a chain configuration; None where one of them is missing."""
    spec = SpecConfig.parse(config)
    drafting = scaling.draft if spec.drafter == "model" else scaling.target
    if fits.target is None or spec.drafter not in fits.drafts or drafting is None:
        return None
    if spec.tree is None or not spec.tree.is_chain:
        return None
    return CostModel(
        fits.target, fits.drafts[spec.drafter], fits.overhead, scaling.target.kv_bytes_per_token,
        drafting.kv_bytes_per_token, plain_overhead=fits.plain_overhead,
    )
