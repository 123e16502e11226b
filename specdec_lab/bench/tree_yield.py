"""Tokens per round, measured: the best tree beside a chain and plain top-k trees of equal size.

Ranks are counted first with a wide probe (acceptance.py); the trees chosen by them then draft the same text for real. Not known
here: time. A larger tree always yields more; what it costs is weighed by `trees.choose`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ..records import Cell, Run, TreeShape
from ..stream import record
from ..trees import Drafting, best_tree, expected_tokens
from ..workload import Sampling
from .acceptance import AcceptanceReport, measure_acceptance
from .provenance import made_with, provenance
from .sessions import Sessions
from .tables import aligned, github

if TYPE_CHECKING:
    from ..engine.loop import Engine

SCHEMA = "specdec_lab.tree_yield/1"
DRAFTINGS = tuple(map(Drafting.parse, ("self:4+60", "self:4+252", "self:snapkv256+32", "model:4+252", "ngram")))
LENGTHS = (1024, 4096, 7936)
TEMPERATURES = (0.0, 0.8)
SIZES = (8, 16)  # nodes, root counted
NEW_TOKENS = 128
ROWS = 4


@dataclass(frozen=True, slots=True)
class Yield:
    """Tokens per round and row, bonus included: expected by the probe's ranks, measured, and the standard error over rows.

    Ranks are those of rounds that drafted: an n-gram drafter without a match drafts nothing, and measures less than expected.
    """

    tree: TreeShape
    expected: float
    measured: float
    error: float | None  # of one row there is none
    rounds: int  # live rows, summed over rounds

    def __str__(self) -> str:
        spread = "" if self.error is None else f"±{self.error:.2f}"
        return f"{self.measured:.2f}{spread} ({self.expected:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"tree": str(self.tree), "expected": self.expected, "measured": self.measured, "error": self.error,
                "rounds": self.rounds}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contest:
    """Trees of at most `nodes` nodes, root counted, over the same prompts.

    top_k  the plain tree that measured best: the same number of children everywhere
    """

    nodes: int
    best: Yield
    chain: Yield
    top_k: Yield | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"nodes": self.nodes, "best": self.best.to_dict(), "chain": self.chain.to_dict(),
                "top_k": self.top_k.to_dict() if self.top_k else None}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One drafter at one length and temperature. Without contests no child was ever accepted."""

    drafting: Drafting
    ranks: AcceptanceReport
    contests: tuple[Contest, ...]


@dataclass(frozen=True, slots=True)
class TreeYields:
    """All entries, and what the numbers depend on."""

    entries: tuple[Entry, ...]
    header: dict[str, Any]

    def __str__(self) -> str:
        made = f"{self.header['device']}, {made_with(self.header)}"
        return "\n".join([*_rank_lines(self.entries), "", *_contest_lines(self.entries), made])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    @property
    def markdown(self) -> str:
        """Both tables for a README."""
        return "\n".join([*github(_rank_rows(self.entries)), "", *github(_contest_rows(self.entries))])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, one row of the bench folder."""
        entries = [{"drafting": str(e.drafting), "ranks": e.ranks.to_dict(), "contests": [c.to_dict() for c in e.contests]}
                   for e in self.entries]  # fmt: skip
        return {"schema": SCHEMA, **self.header, "entries": entries}


def measure_yields(
    engine: Engine, draftings: Sequence[Drafting] = DRAFTINGS, lengths: Sequence[int] = LENGTHS,
    temperatures: Sequence[float] = TEMPERATURES, *, batch: int = ROWS, sizes: Sequence[int] = SIZES,
    new_tokens: int = NEW_TOKENS, workload: str = "prose", seed: int = 0, verifier: str = "rejection",
    say: Callable[[str], None] = lambda line: None,
) -> TreeYields:
    """Probe and contests of every drafter, length and temperature."""
    if min(sizes, default=0) < 2 or not (draftings and lengths and temperatures):
        raise ValueError(f"trees of at least 2 nodes, and a drafter, length and temperature are needed, got sizes {sizes}")
    entries = []
    for length in lengths:
        for temperature in temperatures:
            sampling = Sampling(temperature=temperature, seed=seed, verifier=verifier)
            sessions = Sessions(engine, workload, max_new_tokens=new_tokens, sampling=sampling)
            for drafting in draftings:
                ranks = measure_acceptance(
                    engine, drafting, Cell(batch, length), workload=workload, sampling=sampling, new_tokens=new_tokens,
                    sessions=sessions,
                )
                entry = Entry(drafting, ranks, _contests(sessions, drafting, Cell(batch, length), ranks.vector, sizes))
                entries.append(entry)
                say("  ".join(map(str, _rank_row(entry))))
    identity = engine.identity()
    header = {
        **provenance(), "device": identity.device, "base": dict(identity.base),
        "workload": workload, "new_tokens": new_tokens, "batch": batch, "seed": seed, "verifier": verifier,
    }  # fmt: skip
    return TreeYields(tuple(entries), header)


def _contests(
    sessions: Sessions, drafting: Drafting, cell: Cell, vector: tuple[float, ...], sizes: Sequence[int]
) -> tuple[Contest, ...]:
    if not any(vector):
        return ()
    seen: dict[TreeShape, Yield] = {}

    def measured(tree: TreeShape) -> Yield:
        if tree not in seen:
            seen[tree] = _yield(tree, record(sessions.steps(cell, drafting.config(tree))), vector)
        return seen[tree]

    contests = []
    for nodes in sizes:
        plain = [measured(tree) for tree in plain_trees(nodes)]
        contests.append(Contest(
            nodes, measured(best_tree(vector, nodes)), measured(TreeShape.chain(nodes - 1)),
            max(plain, key=lambda y: y.measured, default=None),
        ))  # fmt: skip
    return tuple(contests)


def plain_trees(nodes: int) -> tuple[TreeShape, ...]:
    """Trees of exactly `nodes` nodes, root counted, that give every node k children as long as nodes last, k = 2, 3, 4."""
    trees = (TreeShape(tuple((node - 1) // k - 1 if node >= k + 1 else -1 for node in range(1, nodes))) for k in (2, 3, 4))
    return tuple(dict.fromkeys(tree for tree in trees if not tree.is_chain))


def _yield(tree: TreeShape, run: Run, vector: Sequence[float]) -> Yield:
    """Rounds that a row's end cut say less than they could have, and are left out. Ranks the probe never saw count as 0."""
    vector = (*vector, *(0.0 for _ in range(len(vector), max(Counter(tree.parents).values()))))
    rows: dict[int, list[int]] = {}
    for step in run.rounds:
        for row, (accepted, cut, tokens) in enumerate(zip(step.accepted, step.censored, step.tokens, strict=True)):
            if tokens and not cut:
                rows.setdefault(row, []).append(accepted + 1)
    means = [fmean(found) for found in rows.values()]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    every = [tokens for found in rows.values() for tokens in found]
    return Yield(tree, expected_tokens(tree, vector), fmean(every), error, len(every))


def _place(entry: Entry) -> list[str]:
    about = entry.ranks.header
    return [str(entry.drafting), about["cell"], f"{about['temperature']:g}"]


def _rank_row(entry: Entry) -> list[str]:
    pooled, fit = entry.ranks.pooled, entry.ranks.fit
    chances = pooled.vector()[:4]
    fitted = f"{fit.p1:.2f}, {fit.b:.2f} ({fit.error:.3f})" if fit else "-"
    return [*_place(entry), *(f"{p:.3f}" for p in chances), *("-" for _ in range(4 - len(chances))),
            f"{sum(pooled.vector()):.3f}", fitted, str(pooled.num_nodes)]  # fmt: skip


def _rank_rows(entries: Iterable[Entry]) -> list[list[str]]:
    head = ["drafter", "cell", "T", "p1", "p2", "p3", "p4", "sum of 8", "fit p1, b (error)", "examined"]
    return [head, *map(_rank_row, entries)]


def _contest_rows(entries: Iterable[Entry]) -> list[list[str]]:
    rows = [["drafter", "cell", "T", "nodes", "chain", "plain top-k tree", "best tree", "levels of the best"]]
    for entry in entries:
        for c in entry.contests:
            rows.append([*_place(entry), str(c.nodes), str(c.chain), str(c.top_k or "-"), str(c.best),
                         "chain" if c.best.tree.is_chain else str(c.best.tree.depth + 1)])  # fmt: skip
    return rows


def _rank_lines(entries: Iterable[Entry]) -> list[str]:
    title = "chance that child k of an accepted node is the accepted one, pooled over depths"
    return [title, *aligned(_rank_rows(entries))]


def _contest_lines(entries: Iterable[Entry]) -> list[str]:
    title = "tokens of a round, measured ± standard error over rows (expected by the ranks above), at equal size"
    return [title, *aligned(_contest_rows(entries))]
