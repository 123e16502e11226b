"""From the parts of a cell to the tree, chain or `off` that they promise: a pure function of records, so it can be verified.

A composed speed-up is a prediction. It is raced like everything else, and what was measured wins.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from ..records import Cell, SpecConfig, TreeShape
from ..trees import Acceptance, ChainTimes, Choice, Counts, Drafting, choose, fit_acceptance
from .db import Measurement
from .probe import counts_of

LEVELS = 9  # of the trees that are weighed, root's counted: deeper ones extrapolate too far
MIN_EXAMINED = 40  # examined nodes, before acceptance by rank is believed
MAX_PROPOSALS = 5
HOPEFUL = 0.93  # of the best composed speed-up: what is expected below it is not worth a race
OTHER_KIND = 0.8  # the same for the best tree beside a chain, or the best chain beside a tree

Counted = tuple[Counts, ...]  # by depth of the examined node


@dataclass(frozen=True, slots=True)
class DraftParts:
    """Of one drafter and view: seconds of drafting by tree that was run, acceptance by depth, rounds with a match."""

    seconds: Mapping[TreeShape, float]
    counts: Counted
    matched: float = 1.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What is known of a cell.

    plain_s     a step of plain decoding
    verify_s    the target's forward by nodes, root counted; only sizes that ran
    overhead_s  the rest of a round, of "chain" and "tree"
    """

    plain_s: float
    verify_s: Mapping[int, float]
    overhead_s: Mapping[str, float]
    drafts: Mapping[Drafting, DraftParts]

    @classmethod
    def of(cls, cell: Cell, records: Iterable[Measurement]) -> Parts | None:
        """From good records of one workload; None where plain decoding was not probed in the cell.

        The target's forward counts where it ran, in the cell. Acceptance does not know the batch, so cells of the same length
        pool. Drafting through a window does not know the context, so cells of the same batch stand in for each other.
        """
        good = [record for record in records if record.status == "ok"]
        verify = [r for r in good if r.kind == "verify" and r.cell == cell]
        plain = [r.summary["round_s"] for r in verify if r.config == "off"]
        if not plain:
            return None
        by_size, by_kind = defaultdict(list), defaultdict(list)
        for record in verify:
            config = SpecConfig.parse(record.config)
            if config.tree is not None and config.view is not None:  # a text drafter's rounds differ in nodes
                by_size[record.summary["nodes"]].append(record.summary["verify_s"])
                by_kind["chain" if config.is_chain else "tree"].append(record.summary["overhead_s"])
        sizes = {nodes: median(found) for nodes, found in sorted(by_size.items())}
        return cls(median(plain), sizes, {kind: median(found) for kind, found in by_kind.items()}, _drafts(cell, good))


def _drafts(cell: Cell, records: Sequence[Measurement]) -> dict[Drafting, DraftParts]:
    seconds: dict[Drafting, dict[TreeShape, list[tuple[bool, float]]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[Drafting, Counted] = defaultdict(tuple)
    matched: dict[Drafting, list[float]] = defaultdict(list)
    for record in records:
        config = SpecConfig.parse(record.config)
        if config.tree is None:
            continue
        drafting = Drafting(config.drafter, config.view)
        if record.kind == "draft" and _tells_draft_time(record, config, cell):
            seconds[drafting][config.tree].append((record.cell == cell, record.summary["draft_s"]))
        if record.kind == "acceptance" and record.cell.length == cell.length:
            counts[drafting] = _pooled(counts[drafting], counts_of(record.summary))
            matched[drafting].append(record.summary["matched"])
    return {
        drafting: DraftParts(
            {tree: _own_first(found) for tree, found in times.items()}, counts[drafting], median(matched[drafting] or [1.0])
        )
        for drafting, times in seconds.items()
    }


def _tells_draft_time(record: Measurement, config: SpecConfig, cell: Cell) -> bool:
    if record.cell == cell:
        return True
    most = None if config.view is None else config.view.max_tokens
    return record.cell.batch == cell.batch and most is not None and most <= min(cell.length, record.cell.length)


def _own_first(found: Sequence[tuple[bool, float]]) -> float:
    """What was measured in the cell, else in others."""
    own = [seconds for is_own, seconds in found if is_own]
    return median(own or [seconds for _, seconds in found])


def _pooled(ours: Counted, theirs: Counted) -> Counted:
    longer, shorter = (ours, theirs) if len(ours) >= len(theirs) else (theirs, ours)
    return tuple(counts + shorter[d] if d < len(shorter) else counts for d, counts in enumerate(longer))


@dataclass(frozen=True, slots=True)
class Proposal:
    """A configuration and the speed-up that its parts promise."""

    config: SpecConfig
    speedup: float


@dataclass(frozen=True, slots=True)
class Composition:
    """What the parts of a cell promise.

    best       the fastest of all, which may be `off`
    choice     of the drafter and view of `best` (where that is `off`, of those that came nearest): tree, reason, margins
    proposals  what is worth a race, best first: the best tree and the best chain, then whatever is expected nearly as fast
    """

    best: Proposal
    drafting: Drafting
    choice: Choice
    proposals: tuple[Proposal, ...]

    def why(self, winner: str) -> str:
        """The reason in a sentence, and whether measurement agreed."""
        words = f"composed for {self.drafting}: {self.choice.reason}"
        if winner == str(self.best.config):
            return words
        return f"{words}. Measured otherwise: {winner} won"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: the prediction, marked as one, and the marginal rule in numbers."""
        kept, left_out = self.choice.kept, self.choice.left_out
        return {
            "how": "composed", "config": str(self.best.config), "speedup": self.best.speedup, "nodes": self.choice.nodes,
            "levels": self.choice.levels, "kept": asdict(kept) if kept else None,
            "left_out": asdict(left_out) if left_out else None,
        }  # fmt: skip


def compose(cell: Cell, records: Iterable[Measurement]) -> Composition | None:
    """The best of every probed drafter and view by expected tokens over measured times; None where too few parts are known."""
    parts = Parts.of(cell, records)
    if parts is None:
        return None
    found = [(drafting, choice) for drafting in parts.drafts if (choice := weigh(parts, drafting)) is not None]
    if not found:
        return None
    drafting, choice = max(found, key=lambda item: (item[1].speedup, _runner_up(item[1]), str(item[0])))
    best = Proposal(SpecConfig.off() if choice.tree is None else drafting.config(choice.tree), choice.speedup)
    return Composition(best, drafting, choice, _proposals(found))


def _runner_up(choice: Choice) -> float:
    return max((c.speedup for c in (choice.chain, choice.branching) if c is not None), default=0.0)


def _proposals(found: Sequence[tuple[Drafting, Choice]]) -> tuple[Proposal, ...]:
    chains: list[Proposal] = []
    trees: list[Proposal] = []
    for drafting, choice in found:
        for candidate, group in ((choice.chain, chains), (choice.branching, trees)):
            if candidate is not None and candidate.tree is not None:
                group.append(Proposal(drafting.config(candidate.tree), candidate.speedup))
    ranked = [sorted(group, key=lambda p: (-p.speedup, str(p.config))) for group in (chains, trees)]
    most = max((group[0].speedup for group in ranked if group), default=0.0)
    leaders = [group[0] for group in ranked if group and group[0].speedup >= OTHER_KIND * most]
    others = [p for group in ranked for p in group[1:] if p.speedup >= HOPEFUL * most]
    by_speed = sorted(others, key=lambda p: (-p.speedup, str(p.config)))
    return tuple((*sorted(leaders, key=lambda p: (-p.speedup, str(p.config))), *by_speed)[:MAX_PROPOSALS])


def weigh(parts: Parts, drafting: Drafting) -> Choice | None:
    """The best tree, chain or `off` of one drafter and view; None where its acceptance or times are not known."""
    mine = parts.drafts[drafting]
    acceptance = _acceptance(drafting, mine.counts)
    chain_s, tree_s = _chain_seconds(mine), _tree_seconds(parts, drafting)
    overhead = parts.overhead_s.get("tree", parts.overhead_s.get("chain"))
    if acceptance is None or overhead is None or not parts.verify_s:
        return None
    chain_overhead = parts.overhead_s.get("chain", overhead)
    if drafting.drafter == "ngram":  # one look into the text, whatever the tree
        look = median(mine.seconds.values())
        verify = {n: mine.matched * s + (1 - mine.matched) * parts.plain_s for n, s in parts.verify_s.items()}
        return choose(
            acceptance, 0.0, {**verify, 1: parts.plain_s}, LEVELS, overhead_time=overhead + look,
            chains=ChainTimes(0.0, chain_overhead + look),
        )  # fmt: skip
    if chain_s is None:
        return None
    if tree_s is None:  # nothing is known of trees through this view
        acceptance = Acceptance(tuple(row[:1] for row in acceptance.rows), acceptance.repeats)
    return choose(
        acceptance, tree_s or chain_s, {**parts.verify_s, 1: parts.plain_s}, LEVELS, overhead_time=overhead,
        chains=ChainTimes(chain_s, chain_overhead),
    )  # fmt: skip


def _acceptance(drafting: Drafting, counts: Counted) -> Acceptance | None:
    """Depth x rank: one row for the root's children and one for all others, which see drafted text.

    Deeper nodes that are too few borrow from the root, except those of a text drafter: there a match goes on or there is none.
    """
    everything = sum(counts, Counts())
    if everything.num_nodes < MIN_EXAMINED:
        return None
    root, below = counts[0], sum(counts[1:], Counts())
    if below.num_nodes < MIN_EXAMINED:
        below = below if drafting.drafter == "ngram" and below.num_nodes else everything
    first, others = _chances(root), _chances(below)
    width = max(len(first), len(others))
    padded = [row + (0.0,) * (width - len(row)) for row in (first, others)]
    return Acceptance.of([padded[0], *[padded[1]] * (LEVELS - 2)])


def _chances(counts: Counts) -> tuple[float, ...]:
    """By rank: of the two-parameter fit where it is good, else as counted."""
    try:
        fit = fit_acceptance(counts)
    except ValueError:  # chains alone, or too few rejections, tell no second parameter
        return counts.vector()
    return fit.vector(counts.ranks) if fit.is_good else counts.vector()


def _chain_seconds(mine: DraftParts) -> float | None:
    """Seconds per drafted token of a chain."""
    found = [seconds / tree.num_nodes for tree, seconds in mine.seconds.items() if tree.is_chain]
    return median(found) if found else None


def _tree_seconds(parts: Parts, drafting: Drafting) -> Callable[[int], float] | None:
    """Seconds of a tree's draft forward by its query tokens: those of the next larger width that was run.

    A view through which only one branching tree was drafted borrows another's widths, scaled by the time of that tree.
    """
    mine = parts.drafts[drafting].seconds
    widths, scale = _widths(mine), 1.0
    if not widths:
        for other, theirs in parts.drafts.items():
            shared = [tree for tree in theirs.seconds if tree in mine and not tree.is_chain]
            if other.drafter == drafting.drafter and shared and (widths := _widths(theirs.seconds)):
                scale = mine[shared[0]] / theirs.seconds[shared[0]] if theirs.seconds[shared[0]] else 1.0
                break
    if not widths:
        return None
    return lambda width: scale * _at_width(widths, width)


def _at_width(widths: Mapping[int, float], width: int) -> float:
    wider = [seconds for known, seconds in sorted(widths.items()) if known >= width]
    return wider[0] if wider else widths[max(widths)] * width / max(widths)


def _widths(seconds: Mapping[TreeShape, float]) -> dict[int, float]:
    """From trees of one level the time of a single token, from trees `w,1` that of w tokens."""
    levels = {tree.children_per_level(): s for tree, s in seconds.items() if not tree.is_chain}
    single = [s for per_level, s in levels.items() if per_level is not None and len(per_level) == 1]
    if not single:
        return {}
    found = {1: median(single)}
    for per_level, s in levels.items():
        if per_level is not None and len(per_level) == 2 and per_level[1] == 1:
            found[per_level[0]] = max(s - found[1], found[1])
    return found
