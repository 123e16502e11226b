"""What a cell is made of: the target's forward by nodes, draft forwards by width, the rest of a round, acceptance by rank.

Which runs of the tuner's own `measure` show these parts, in which order, and what a finished run says of them. A run cut
off the list by time leaves fewer parts, never guessed ones. Not known here: which tree follows (compose.py), databases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from ..records import Cell, KvView, SpecConfig, StepRecord, TreeShape
from ..trees import Counts, Drafting, observed, probe_tree

KINDS = ("verify", "draft", "acceptance")  # of the records that a run of the probe leaves


@dataclass(frozen=True, slots=True)
class ProbePlan:
    """How much of a cell's time goes into its parts, and which shapes show them.

    chains   show how long drafting token by token takes; their sizes are those at which chains are weighed
    widths   of the second level of trees `w,1`: their draft time beyond the root's is that of one forward of w tokens
    nodes    root counted, of trees of one level: one draft forward, so a cheap way to time the target's forward
    ranks    children of an examined node of the wide tree, which shows acceptance by rank to `depth`
    """

    share: float = 0.15  # of a cell's share of the budget
    least_s: float = 1.5  # a cell that may spend less is not probed
    most_s: float = 60.0  # more would tell nothing that a race does not
    chains: tuple[int, ...] = (4, 2, 1, 7)
    widths: tuple[int, ...] = (8, 2, 4, 16)
    nodes: tuple[int, ...] = (12, 6, 25, 4, 14, 7, 41)
    ranks: int = 8
    depth: int = 4
    views: int = 3  # of each drafter
    wide_weight: int = 3  # seconds of a wide run, in those of another: acceptance needs the most rounds
    warm_share: float = 0.3  # of its time that a run may take to warm up

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"ProbePlan.share must lie between 0 and 1, got {self.share}")
        least = min((self.ranks, self.depth, self.views, *self.chains, *self.widths))
        if not self.chains or least < 1 or min(self.nodes, default=2) < 2:
            raise ValueError(f"ProbePlan needs a chain, counts of at least 1, and at least 2 nodes, root counted, got {self}")

    @property
    def wide(self) -> TreeShape:
        """The tree that puts ranks to the test."""
        return probe_tree(self.ranks, self.depth)

    def seconds(self, share_s: float) -> float:
        """What a cell's probe may take; 0 where that is too little to say anything."""
        wanted = share_s * self.share
        return min(wanted, self.most_s) if wanted >= self.least_s else 0.0

    def shares(self, runs: Sequence[SpecConfig], seconds: float) -> tuple[float, ...]:
        """Scored seconds of each of these runs."""
        weights = [self.wide_weight if config.tree == self.wide else 1 for config in runs]
        return tuple((1 - self.warm_share) * seconds * weight / sum(weights) for weight in weights)

    def runs(self, configs: Sequence[SpecConfig], cell: Cell) -> tuple[SpecConfig, ...]:
        """What to run for these candidates, the most telling first: acceptance, then times, then further views."""
        draftings = self._draftings(configs, cell)
        first = [by_view[0] for by_view in draftings]
        timed = [drafting for drafting in first if drafting.view is not None]
        shapes = [TreeShape.chain(self.chains[0]), TreeShape.branching([2])]
        shapes += [TreeShape.branching([width, 1]) for width in self.widths[:2]]
        rest = [TreeShape.chain(length) for length in self.chains[1:]]
        rest += [TreeShape.branching([width, 1]) for width in self.widths[2:]]
        rest += [TreeShape.branching([nodes - 1]) for nodes in self.nodes]
        found = [drafting.config(self.wide) for drafting in first]
        found += [drafting.config(tree) for tree in shapes for drafting in timed]
        found += [drafting.config(tree) for by_view in draftings for drafting in by_view[1:] for tree in (shapes[0], self.wide)]
        found += [drafting.config(tree) for tree in rest for drafting in timed[:1]]  # the target's forwards: any drafter shows
        return tuple(dict.fromkeys(found))

    def _draftings(self, configs: Sequence[SpecConfig], cell: Cell) -> list[list[Drafting]]:
        """Per drafter its views, the likeliest first."""
        found = []
        for kind in dict.fromkeys(config.drafter for config in configs):
            views = dict.fromkeys(config.view for config in configs if config.drafter == kind)
            found.append([Drafting(kind, view) for view in _likeliest([*views], cell)[: self.views]])
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def _likeliest(views: Sequence[KvView | None], cell: Cell) -> list[KvView | None]:
    """Around a sixteenth of the context, at least 64 tokens; the best SnapKV view comes second, so that both kinds are seen."""
    wanted = math.log2(max(64, cell.length / 16))

    def distance(view: KvView | None) -> tuple[float, str]:
        tokens = view.max_tokens if view is not None else None
        return abs(math.log2(tokens or cell.length) - wanted), str(view)

    ordered = sorted(views, key=distance)
    chosen = [view for view in ordered if view is not None and view.kind == "snapkv"]
    others = [view for view in ordered if view not in chosen]
    return [*others[:1], *chosen[:1], *others[1:], *chosen[1:]]


def parts_of(config: SpecConfig, rounds: Sequence[StepRecord]) -> dict[str, dict[str, Any]]:
    """Summaries by kind of record of the scored rounds of one run.

    Times are 20th percentiles: what the machine takes when nothing disturbs it, from few rounds. Counts are of all rows.
    """
    tokens = [step.query_tokens or config.num_nodes + 1 for step in rounds]
    found: dict[str, dict[str, Any]] = {
        "verify": {
            "nodes": max(tokens), "verify_s": _undisturbed(step.verify_s for step in rounds),
            "overhead_s": _undisturbed(step.wall_s - step.draft_s - step.verify_s for step in rounds),
            "round_s": _undisturbed(step.wall_s for step in rounds), "rounds": len(rounds),
        }
    }  # fmt: skip
    if config.is_off:
        return found
    found["draft"] = {"draft_s": _undisturbed(step.draft_s for step in rounds), "rounds": len(rounds)}
    whole = [_as_whole(step, config.num_nodes) for step in rounds] if config.drafter == "ngram" else rounds
    # rounds that verified drafts: on the host those where some row found one, on a device all, padding included
    matched = fmean(any(step.drafted) or step.query_tokens > 1 for step in rounds)
    found["acceptance"] = {
        "by_depth": [{str(children): list(o) for children, o in c.examined.items()} for c in observed(whole)],
        "rounds": len(rounds), "matched": matched,
    }  # fmt: skip
    return found


def _undisturbed(seconds: Iterable[float]) -> float:
    return float(np.percentile(list(seconds), 20))


def _as_whole(step: StepRecord, num_nodes: int) -> StepRecord:
    """A text drafter's round as if all rows had drafted every node: what it did not find was not accepted either.

    So its chances are those of a place in the tree, whether or not something stands there.
    """
    drafted = tuple(num_nodes if tokens else 0 for tokens in step.tokens)
    ranks = step.ranks or tuple((1,) * accepted for accepted in step.accepted)
    return replace(step, drafted=drafted, nodes=(), ranks=ranks)


def counts_of(summary: Mapping[str, Any]) -> tuple[Counts, ...]:
    """The counts by depth of an acceptance record."""
    return tuple(Counts({int(m): tuple(o) for m, o in counts.items()}) for counts in summary["by_depth"])
