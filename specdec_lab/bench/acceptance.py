"""How often the k-th child is accepted: a wide probe tree through the engine, and the trees that the answer is worth.

Not known here: time. What a tree costs is measured elsewhere; `trees.choose` weighs both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records import Cell, StepRecord, TreeShape, UnsupportedConfig
from ..stream import record
from ..trees import Counts, Drafting, RankFit, best_tree, expected_tokens, fit_acceptance, observed, probe_tree
from ..workload import Sampling, Workload
from .provenance import made_with, provenance
from .sessions import Sessions

if TYPE_CHECKING:
    from ..engine.loop import Engine

SCHEMA = "specdec_lab.acceptance/1"
SIZES = (4, 8, 16, 32, 64)  # nodes, root counted
LEVELS = 9  # of the trees that are compared, root's counted: deeper ones extrapolate too far


@dataclass(frozen=True, slots=True)
class Rivals:
    """Expected tokens of a round, bonus included, of trees of at most `nodes` nodes, root counted."""

    nodes: int
    best: TreeShape
    best_tokens: float
    chain: TreeShape
    chain_tokens: float
    top_k: TreeShape | None  # the same number of children everywhere; None where no such tree branches
    top_k_tokens: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "nodes": self.nodes, "best": str(self.best), "best_tokens": self.best_tokens, "chain": str(self.chain),
            "chain_tokens": self.chain_tokens, "top_k": None if self.top_k is None else str(self.top_k),
            "top_k_tokens": self.top_k_tokens,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class AcceptanceReport:
    """Counts by depth of the examined node, what they say pooled, and trees compared by it.

    vector   chances by rank over all depths: of the fit where it is good, else the empirical ones
    why_not  why there is no fit
    rivals   empty where no child was ever accepted
    """

    header: dict[str, Any]
    by_depth: tuple[Counts, ...]
    fit: RankFit | None
    why_not: str
    vector: tuple[float, ...]
    rivals: tuple[Rivals, ...]

    @property
    def pooled(self) -> Counts:
        """Counts over all depths."""
        return sum(self.by_depth, Counts())

    def __str__(self) -> str:
        about = self.header
        lines = [
            f"{about['drafting']} on {about['workload']} at {about['cell']}, temperature {about['temperature']:g}: "
            f"{about['rounds']} rounds with a probe of width {about['width']} and depth {about['depth']} "
            f"({about['probe_nodes']} nodes)",
            "", *_table(self.by_depth, self.pooled), "",
            f"fit: {self.fit}" if self.fit is not None else f"no fit: {self.why_not}",
        ]  # fmt: skip
        if self.rivals:
            lines += ["", *_rivals_table(self.rivals)]
        return "\n".join([*lines, "", f"{about['device']}, {made_with(about)}"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, one row of the bench folder."""
        fit = None if self.fit is None else {
            "p1": self.fit.p1, "b": self.fit.b, "error": self.fit.error, "granted": self.fit.granted,
            "worst_rank": self.fit.worst_rank, "is_good": self.fit.is_good,
        }  # fmt: skip
        return {
            "schema": SCHEMA, **self.header, "by_depth": [counts.to_dict() for counts in self.by_depth], "fit": fit,
            "why_no_fit": self.why_not, "empirical": list(self.pooled.vector()), "vector": list(self.vector),
            "trees": [rivals.to_dict() for rivals in self.rivals],
        }  # fmt: skip


def measure_acceptance(
    engine: Engine, drafting: Drafting, cell: Cell, *, width: int = 8, depth: int = 3,
    workload: str | Callable[[Cell], Workload] = "prose", sampling: Sampling | None = None, new_tokens: int = 128,
    sizes: Sequence[int] = SIZES, sessions: Sessions | None = None, say: Callable[[str], None] = lambda line: None,
) -> AcceptanceReport:
    """Run the probe over a cell's prompts until every row has `new_tokens`, and count.

    Text is that of plain decoding: a probe changes what is drafted, never what is said. ValueError for a probe that is too
    large; UnsupportedConfig for a drafter that this engine lacks.

    sessions  of the same workload, sampling and new tokens, whose prompts need not be read again
    """
    if (forced := engine.identity().base.get("acceptance")) is not None:
        raise UnsupportedConfig(f"{forced}: there is nothing to measure. Load the engine without it.")
    sampling = sampling or {}
    config = drafting.config(probe_tree(width, depth))
    say(f"probing {drafting} at {cell}: {new_tokens} tokens of {cell.batch} sequences")
    sessions = sessions or Sessions(engine, workload, max_new_tokens=new_tokens, sampling=sampling)
    run = record(sessions.steps(cell, config))
    header = {
        **provenance(), "device": engine.identity().device, "base": dict(engine.identity().base),
        "key": engine.identity().of(config), "labels": list(run.header.labels),
        "workload": run.header.workload, "cell": str(cell), "drafting": str(drafting), "temperature": run.header.temperature,
        "verifier": run.header.verifier, "sampling": dict(sampling), "seed": run.header.seed, "width": width, "depth": depth,
        "probe": str(config.tree), "probe_nodes": config.num_nodes, "rounds": len(run.rounds), "interrupted": run.interrupted,
        "new_tokens": new_tokens,
    }  # fmt: skip
    return evaluate(header, run.steps, sizes)


def evaluate(header: dict[str, Any], steps: Sequence[StepRecord], sizes: Sequence[int] = SIZES) -> AcceptanceReport:
    """The report of rounds that were run."""
    by_depth = observed(steps)
    pooled = sum(by_depth, Counts())
    fit, why_not = None, ""
    try:
        fit = fit_acceptance(pooled)
    except ValueError as error:
        why_not = str(error)
    vector = fit.vector(pooled.ranks) if fit is not None and fit.is_good else pooled.vector()
    rivals = tuple(_compare(vector, nodes) for nodes in sizes) if any(vector) else ()
    return AcceptanceReport(header, by_depth, fit, why_not, vector, rivals)


def _compare(vector: tuple[float, ...], nodes: int) -> Rivals:
    """Expected tokens by the pooled vector, which is taken to hold at every depth."""
    best = best_tree(vector, nodes, LEVELS)
    chain = TreeShape.chain(min(nodes, LEVELS) - 1)
    plain = [tree for k in range(2, len(vector) + 1) for tree in _regular(k, nodes)]
    top_k = max(plain, key=lambda tree: expected_tokens(tree, vector), default=None)
    return Rivals(
        nodes, best, expected_tokens(best, vector), chain, expected_tokens(chain, vector), top_k,
        expected_tokens(top_k, vector) if top_k is not None else 1.0,
    )


def _regular(children: int, nodes: int) -> list[TreeShape]:
    """Trees whose inner nodes all have so many children, of at most `nodes` nodes, root counted."""
    found, size, width = [], 1, 1
    for levels in range(1, LEVELS):
        width *= children
        size += width
        if size > nodes:
            break
        found.append(TreeShape.branching([children] * levels))
    return found


def _table(by_depth: Sequence[Counts], pooled: Counts) -> list[str]:
    ranks = range(1, pooled.ranks + 1)
    names = "".join(f"  k={k:<4}" for k in ranks)
    lines = ["chance that child k of an accepted node is the accepted one", f"depth  examined   none {names}".rstrip()]
    for name, counts in [*((str(depth), counts) for depth, counts in enumerate(by_depth, start=1)), ("all", pooled)]:
        chances = counts.vector()
        none = f"{1 - sum(chances):.3f}" if chances else "    -"
        lines.append(f"{name:>5} {counts.num_nodes:>9}  {none} " + " ".join(f"  {p:.3f}" for p in chances))
    return lines


def _rivals_table(rivals: Sequence[Rivals]) -> list[str]:
    lines = ["expected tokens of a round, at most so many nodes (root counted)"]
    lines.append("nodes  chain  plain top-k tree       best tree")
    for r in rivals:
        top_k = "-" if r.top_k is None else f"{r.top_k_tokens:.2f} {r.top_k}"
        lines.append(f"{r.nodes:>5}  {r.chain_tokens:>5.2f}  {top_k:<22} {r.best_tokens:.2f} {_short(r.best)}")
    return lines


def _short(tree: TreeShape) -> str:
    spelled = str(tree)
    return spelled if len(spelled) <= 60 else f"({tree.num_nodes + 1} nodes, {tree.depth + 1} levels; --json spells it)"
