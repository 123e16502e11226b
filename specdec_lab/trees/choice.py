"""Which tree pays on this machine: expected tokens against measured times, chains and plain decoding among the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..records import TreeShape
from .acceptance import Acceptance, RankChances
from .heap import HeapSearch
from .margin import Margin, first_left_out, last_kept
from .reasons import OFF, Candidate, explain
from .search import check_levels, check_nodes, search_for
from .shape import expected_tokens, level_widths
from .table import TableSearch

DRAFT_FORWARDS = ("levels-1", "levels")
DraftTime = float | Callable[[int], float]
CLEARLY = 1e-12  # a larger tree must beat a smaller one by more than rounding


@dataclass(frozen=True, slots=True)
class ChainTimes:
    """Seconds of a draft forward, and of the overhead of a round, of chains that an engine drafts otherwise than trees."""

    draft_time: float
    overhead_time: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The tree with the highest expected speed-up, and why.

    tree             None is plain decoding (`off`)
    expected_tokens  of a round, bonus token included
    break_even       time of a round over time of a plain step: the tokens that a round must yield to gain nothing
    method           how trees were searched: `heap` or `dp`
    reason           one sentence: what the runner-up reaches, and the marginal rule in numbers
    kept, left_out   the marginal rule for the least likely node kept and the likeliest one left out, verify time taken as even
                     between the sizes that were timed; None where there is no such node or no such size
    chain, branching the fastest chain and the fastest tree that branches among all that were weighed
    """

    tree: TreeShape | None
    expected_tokens: float
    break_even: float
    method: str
    reason: str
    kept: Margin | None = None
    left_out: Margin | None = None
    chain: Candidate | None = None
    branching: Candidate | None = None

    @property
    def speedup(self) -> float:
        """Expected, against plain decoding."""
        return self.expected_tokens / self.break_even

    @property
    def nodes(self) -> int:
        """Nodes of the tree, root counted."""
        return self.tree.num_nodes + 1 if self.tree else 1

    @property
    def levels(self) -> int:
        """Levels of the tree, the root's counted."""
        return self.tree.depth + 1 if self.tree else 1


def choose(
    acceptance: RankChances | Acceptance, draft_time: DraftTime, verify_time: Mapping[int, float], levels: int,
    draft_forwards: str = "levels-1", *, overhead_time: float = 0.0, chains: ChainTimes | None = None,
) -> Choice:  # fmt: skip
    """The tree that maximises expected tokens over time: G(n, D) / ((draft forwards + T_V(n) + overhead) / T_V(1)).

    acceptance      rank vector [K] or depth x rank matrix [D, K]
    draft_time      seconds of a draft forward: a number, or a function of its query tokens (nodes with children at a level)
    verify_time     seconds of a target forward by nodes, ROOT COUNTED; the entry for 1 is the plain step and must be there.
                    Only these sizes are considered, times are not interpolated; a tree that cannot fill a size is charged it
    levels          most levels, root's counted; 1 = only plain decoding
    draft_forwards  a tree of D levels needs `levels-1` (this engine: verify fills the leaves' KV) or `levels` (Sequoia's
                    code, whose last forward runs over the deepest level)
    overhead_time   seconds of every round that plain decoding does not pay: selection, host
    chains          draft and overhead times of chains, where they are not those of trees
    For every size and cap the best tree and the chain are weighed, `off` as well; of equals the smaller wins. Any unit of
    time serves. Departure from Sequoia's script: it charges plain decoding one draft forward, so it may name a tree that
    is slower than plain decoding where this says `off`.
    Source: Sequoia (Chen 2024), section 3.3; chain and level widths: algorithms.md 3.4.
    """
    known = Acceptance.of(acceptance)
    cap = min(check_levels(levels), known.max_levels)
    clock = _Clock.checked(draft_time, verify_time, draft_forwards, overhead_time, chains)
    search = search_for(known, max(clock.sizes), cap)
    best, weighed = OFF, [OFF]
    for size, tree in _trees(search, clock.sizes, cap, known):
        candidate = Candidate(tree, size, expected_tokens(tree, known), clock.break_even(tree, size))
        weighed.append(candidate)
        if candidate.speedup > best.speedup * (1 + CLEARLY):
            best = candidate
    around = _Around(clock, best.size)
    return Choice(
        best.tree, best.tokens, best.break_even, search.method, explain(best, weighed, known),
        last_kept(best.tree, known, best.speedup, around), first_left_out(best.tree, known, cap, best.speedup, around),
        _fastest(c for c in weighed if c.tree is not None and not c.branches), _fastest(c for c in weighed if c.branches),
    )  # fmt: skip


def _fastest(candidates: Iterable[Candidate]) -> Candidate | None:
    return max(candidates, key=lambda candidate: candidate.speedup, default=None)


def _trees(
    search: HeapSearch | TableSearch, sizes: tuple[int, ...], levels: int, known: Acceptance
) -> Iterator[tuple[int, TreeShape]]:
    """(size it is verified at, tree), small ones first: the best of each size and cap, and the chains."""
    for size in sizes[1:]:
        if size <= levels and known.useful(1):
            yield size, TreeShape.chain(size - 1)
        for cap in range(2, min(levels, size) + 1):
            tree = search.tree(size, cap)
            if tree is None:
                break
            if tree.depth + 1 == cap:
                yield size, tree
            elif search.method == "heap":
                break  # the cap no longer binds the likeliest nodes. Where acceptance rises with rank a deeper one still may


@dataclass(frozen=True, slots=True)
class _Clock:
    """Times of a round, checked."""

    draft: Callable[[int], float]
    verify: Mapping[int, float]
    draft_leaves: bool
    overhead: float
    chains: ChainTimes | None

    @classmethod
    def checked(
        cls, draft: DraftTime, verify: Mapping[int, float], forwards: str, overhead: float, chains: ChainTimes | None
    ) -> _Clock:
        if forwards not in DRAFT_FORWARDS:
            raise ValueError(f"draft_forwards must be one of {', '.join(DRAFT_FORWARDS)}, got {forwards!r}")
        verify = {check_nodes(nodes): verify[nodes] for nodes in sorted(verify)}
        if 1 not in verify:
            raise ValueError(
                f"verify_time has sizes {list(verify)} and none of 1 node, the plain step that speed-up is measured against; "
                "add it"
            )
        for nodes, seconds in verify.items():
            if not 0 < seconds < math.inf:
                raise ValueError(f"verify_time of {nodes} nodes is {seconds}; leave sizes that were not measured out")
        _check_time("overhead_time", overhead)
        if chains is not None:
            _check_time("chains.draft_time", chains.draft_time)
            _check_time("chains.overhead_time", chains.overhead_time)
        if callable(draft):
            return cls(_remembered(draft), verify, forwards == "levels", overhead, chains)
        constant = _check_time("draft_time", draft)
        return cls(lambda _: constant, verify, forwards == "levels", overhead, chains)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.verify)

    def break_even(self, tree: TreeShape, size: int) -> float:
        """Time of a round over time of a plain step."""
        return self.steps(tree, self.verify[size])

    def steps(self, tree: TreeShape, verify_s: float) -> float:
        """The same with this time of the target's forward."""
        widths = level_widths(tree)
        if self.draft_leaves:
            widths += (tree.depths.count(tree.depth),)
        if self.chains is not None and tree.is_chain:
            draft_s, overhead = len(widths) * self.chains.draft_time, self.chains.overhead_time
        else:
            draft_s, overhead = math.fsum(map(self.draft, widths)), self.overhead
        return math.fsum((draft_s, verify_s, overhead)) / self.verify[1]


@dataclass(frozen=True, slots=True)
class _Around:
    """Rounds of trees that differ by a node from one verified at `size`; between timed sizes time is taken as even."""

    clock: _Clock
    size: int

    def __call__(self, tree: TreeShape | None, added: int) -> float | None:
        """The round in plain steps; None where no size on that side was timed."""
        if tree is None:
            return 1.0
        verify, here = self.clock.verify, self.clock.verify[self.size]
        if added == 0:
            return self.clock.steps(tree, here)
        beyond = [n for n in self.clock.sizes if (n > self.size if added > 0 else n < self.size)]
        if not beyond:
            return None
        other = min(beyond) if added > 0 else max(beyond)
        return self.clock.steps(tree, here + added * (verify[other] - here) / (other - self.size))


def _remembered(draft: Callable[[int], float]) -> Callable[[int], float]:
    known: dict[int, float] = {}

    def seconds(width: int) -> float:
        if width not in known:
            known[width] = _check_time(f"draft_time of {width} query tokens", draft(width))
        return known[width]

    return seconds


def _check_time(name: str, seconds: float) -> float:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} must be a time of 0 or more, got {seconds}")
    return seconds
