"""From a policy over (batch, length) to what one engine can be told: a table over batches, and what was lost.

No engine reads a length axis. A `Slice` is the policy at one length, or averaged over a traffic histogram by expected
log speed-up; the best over all lengths is never taken, because it would be right nowhere. The engine then says which
configurations it cannot run, and `Slice.choose` gives a `Column`: one configuration per tabled batch. This module knows
no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..policy import Policy
from ..records import Cell, SpecConfig, parse_count

OFF = SpecConfig.off()
NGRAM_MATCH = (2, 4)  # shortest and longest match that the measured ngram drafter tries
PLAIN = ("nothing speculates: the server runs without a draft",)
WhyNot = Callable[[SpecConfig], str | None]


class ExportError(ValueError):
    """What an engine would reject, ignore or misread; the message says what, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A policy in an engine's own format.

    files    name -> content, for the engine to read
    command  what starts the engine with it; for transformers, lines of Python
    dropped  everything of the policy that the engine cannot be told, in words
    notes    where the numbers come from, and what the engine needs to honour them
    """

    target: str
    files: Mapping[str, str]
    command: str | None
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Column:
    """One configuration per tabled batch, all of which the engine can run."""

    name: str  # "len4096" or "traffic"; part of file names
    choices: Mapping[int, SpecConfig]
    below: str  # "clamp" or "off": batches smaller than the smallest tabled one
    above: str
    lost: tuple[str, ...]

    @property
    def max_depth(self) -> int:
        """The longest draft of any batch; 0 when nothing speculates."""
        return max(config.depth for config in self.choices.values())

    def at(self, batch: int) -> SpecConfig:
        """The configuration of the smallest tabled batch that is not smaller than `batch`."""
        if batch < 1:
            raise ExportError(f"batch must be at least 1, got {batch}. Pass the usual running batch of the deployment")
        first, last = min(self.choices), max(self.choices)
        if batch > last:
            return OFF if self.above == "off" else self.choices[last]
        if batch < first and self.below == "off":
            return OFF
        return self.choices[min(b for b in self.choices if b >= batch)]

    def ranges(self) -> list[tuple[int, int | None, int]]:
        """(first batch, last batch, draft length), gapless from 1; the last range is open: its end is None."""
        first, last = min(self.choices), max(self.choices)
        ends = sorted({*self.choices, first - 1} - {0})
        ranges: list[tuple[int, int | None, int]] = []
        for start, end in zip([1, *(e + 1 for e in ends)], [*ends, None], strict=True):
            depth = self.at(end or last + 1).depth
            if ranges and ranges[-1][2] == depth:
                start = ranges.pop()[0]
            ranges.append((start, end, depth))
        return ranges

    def single(self, batch: int, engine: str) -> Column:
        """The setting at one batch, for an engine that takes one setting for every batch."""
        others = ", ".join(str(b) for b in sorted(self.choices) if b != batch)
        left = f", the rows of {others} are left out" if others else ""
        lost = f"batch: {engine} takes one setting for every batch; this is the policy's at {batch}{left}"
        return replace(self, choices={batch: self.at(batch)}, lost=(*self.lost, lost))

    def lost_views(self, engine: str) -> tuple[str, ...]:
        """What an engine without a window for its draft loses."""
        views = {str(c.view) for c in self.choices.values() if c.view is not None and c.view.kind != "full"}
        if not views:
            return ()
        names = ", ".join(sorted(views))
        return (f"window {names}: {engine} drafts with the full context, the speed-up was measured through the window",)


@dataclass(frozen=True, slots=True)
class Slice:
    """A policy at one length, or averaged over a mix of lengths: the winner and every estimate per tabled batch."""

    name: str
    wanted: Mapping[int, SpecConfig]
    gains: Mapping[int, Mapping[SpecConfig, float]]  # expected log speed-up over plain decoding
    min_gain: float
    below: str
    above: str
    lost: tuple[str, ...]

    def drafter(self, draft_model: str | None, drafter: str | None) -> str:
        """What the server will load: `drafter` if given, else model when a draft model is named, else ngram."""
        if drafter not in (None, "model", "ngram"):
            raise ExportError(f"drafter {drafter!r} cannot be exported: engines load model or ngram. Pass one of them")
        wants_model = drafter is None and any(config.drafter == "model" for config in self.wanted.values())
        if (drafter == "model" or wants_model) and not draft_model:
            raise ExportError(
                "the policy drafts with a second network and none is named: the engine has to load it. "
                "Pass draft_model=<name or path>, or drafter='ngram' to export without one"
            )
        return drafter or ("model" if draft_model else "ngram")

    def choose(self, why_not: WhyNot) -> Column:
        """The winner of each batch if the engine can run it, else the best estimate that it can run, else off."""
        choices, lost = {}, list(self.lost)
        for batch, wanted in self.wanted.items():
            reason = None if wanted.is_off else why_not(wanted)
            choices[batch] = wanted if reason is None else best(self.gains[batch], self.min_gain, why_not)
            if reason is not None:
                instead = "plain decoding" if choices[batch].is_off else f"the next best, {choices[batch]},"
                lost.append(f"batch {batch}: {wanted} is dropped, because {reason}; {instead} takes its place")
        return Column(self.name, choices, self.below, self.above, tuple(lost))


def chains_of(drafter: str, engine: str, *, trees: bool = False) -> WhyNot:
    """Why an engine that loads one drafter and verifies chains (or trees too) cannot run a configuration."""

    def why_not(config: SpecConfig) -> str | None:
        if config.drafter == "self":
            return f"{engine} has no drafter that reads the target's own KV"
        if config.drafter != drafter:
            return f"the server loads the {drafter} drafter only"
        if not trees and config.tree is not None and not config.tree.is_chain:
            return f"{engine} is given chains only, not a tree"
        return None

    return why_not


def best(gains: Mapping[SpecConfig, float], min_gain: float, why_not: WhyNot) -> SpecConfig:
    """The configuration with the largest gain of those that can run; off when none reaches `min_gain`."""
    able = [config for config in gains if why_not(config) is None and gains[config] >= min_gain]
    return max(able, key=gains.__getitem__, default=OFF)


def other_drafter(measured: str, exported: str) -> tuple[str, ...]:
    """What is lost when the engine's kind of draft is not the measured one, an independent draft model."""
    if measured == exported:
        return ()
    return (f"drafter: acceptance was measured with an independent draft model, the export is for {exported}",)


def slices(policy: Policy, length: int | str | None, traffic: Mapping[str, float] | None) -> list[Slice]:
    """The policy at the tabled length nearest to `length`, at "each" length, or averaged over `traffic`."""
    lengths = policy.grid.lengths
    if not lengths:
        raise ExportError("the policy has no rows, so there is nothing to export. Tune at least one cell")
    if length is not None and traffic is not None:
        raise ExportError("both length and traffic are given, and each alone picks the table. Pass one of them")
    if traffic is not None:
        shares = _shares(traffic, lengths)
        how = ", ".join(f"{share:.0%} at {tokens}" for tokens, share in shares.items())
        return [_slice(policy, shares, "traffic", f"averages over the traffic ({how} tokens)")]
    if length == "each":
        return [_slice(policy, {n: 1.0}, f"len{n}", f"holds at {n} tokens") for n in lengths]
    if length is None and len(lengths) > 1:
        raise ExportError(
            f"the policy knows {len(lengths)} lengths ({', '.join(map(str, lengths))}) and the engine one table. "
            'Pass length=<median context of the deployment>, traffic={"4096": 0.7, ...} or length="each"'
        )
    asked = lengths[0] if length is None else length if isinstance(length, int) else parse_count(length)
    near = _nearest(lengths, asked)
    nearest = "" if near == asked else f", the tabled length nearest to {asked}"
    return [_slice(policy, {near: 1.0}, f"len{near}", f"holds at {near} tokens{nearest}")]


def _slice(policy: Policy, shares: Mapping[int, float], name: str, how: str) -> Slice:
    batches, rules = policy.grid.batches, policy.rules
    min_gain = math.log(rules.min_speedup)
    gains = {batch: _gains(policy, batch, shares) for batch in batches}
    if len(shares) == 1:
        wanted = {batch: policy.lookup(batch, next(iter(shares))) for batch in batches}
    else:
        wanted = {batch: best(gains[batch], min_gain, lambda _: None) for batch in batches}
    lost = (*_lost_axes(policy, shares, how), *_lost_rows(policy, shares))
    lost += ("run-time rules: hysteresis and acceptance guard stay behind, the engine switches at once",)
    return Slice(name, wanted, gains, min_gain, rules.outside.batch_below, rules.outside.batch_above, lost)


def _gains(policy: Policy, batch: int, shares: Mapping[int, float]) -> dict[SpecConfig, float]:
    """Mean log speed-up, over the lengths at which this batch fits, of what was measured at all of them."""
    fits = [(share, n) for n, share in shares.items() if Cell(batch, n) not in policy.grid.infeasible]
    values = [(share, policy.choice(batch, n).values) for share, n in fits]
    names = [name for name in policy.portfolio if name != str(OFF) and values and all(name in v for _, v in values)]
    total = sum(share for share, _ in fits)
    return {SpecConfig.parse(name): sum(share * v[name] for share, v in values) / total for name in names}


def _nearest(lengths: Sequence[int], asked: int) -> int:
    """The tabled length nearest in log2; further than half a doubling outside of the table is refused."""
    if asked < 1:
        raise ExportError(f"length must be at least 1 token, got {asked}. Pass the median context of the deployment")
    near = min(lengths, key=lambda n: abs(math.log2(n / asked)))
    if not lengths[0] <= asked <= lengths[-1] and abs(math.log2(near / asked)) > 0.5:
        raise ExportError(
            f"length {asked} lies outside of the tuned lengths {lengths[0]}..{lengths[-1]}: a table for it would be a "
            f"guess. Tune that length, or pass length={near} to say that the nearest one is meant"
        )
    return near


def _shares(traffic: Mapping[str, float], lengths: Sequence[int]) -> dict[int, float]:
    """Share of the traffic per tabled length; every length counts for its nearest tabled one."""
    total = sum(traffic.values())
    if not (math.isfinite(total) and total > 0 and min(traffic.values()) >= 0):
        raise ExportError(f"traffic {dict(traffic)} has no usable weights. Pass counts or shares, none negative, not all 0")
    shares = dict.fromkeys(lengths, 0.0)
    for text, weight in traffic.items():
        if weight:
            shares[_nearest(lengths, parse_count(str(text)))] += weight / total
    return {tokens: share for tokens, share in shares.items() if share > 0}


def _lost_axes(policy: Policy, shares: Mapping[int, float], how: str) -> list[str]:
    others = [str(n) for n in policy.grid.lengths if n not in shares]
    left = f"; the rows at {', '.join(others)} are left out" if others else ""
    lost = [f"length: the table {how}, and the engine uses it at every length{left}"]
    if len(policy.grid.batches) > 1:
        batches = ", ".join(map(str, policy.grid.batches))
        lost.append(f"batch: between the tabled batches {batches} the next larger one decides")
    return lost


def _lost_rows(policy: Policy, shares: Iterable[int]) -> list[str]:
    lost = []
    for cell in (Cell(batch, n) for batch in policy.grid.batches for n in shares):
        row = policy.grid.rows.get(cell)
        if row is None or not row.is_decided:
            state = "not tabled" if row is None else row.state.replace("_", " ")
            why = f" ({row.reason})" if row is not None and row.reason else ""
            lost.append(f"row {cell}: {state}{why}, so nothing is known to pay there")
    return lost
