"""Which cells and configurations are searched, in which order, with which share of the budget. Nothing is measured here.

A cell that does not fit in memory is dropped before anything runs, with the bytes as its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..records import Cell, KvView, SpecConfig, TreeShape
from .probe import ProbePlan
from .shard import WHOLE, CellShard, by_size, deal

SINK = 4
WINDOWS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # sink and recent together
CHAINS = (1, 2, 3, 4, 5, 6, 7, 8)
SNAPKV_BUDGETS = (128, 256, 512, 1024, 2048)  # tokens that a self-draft keeps of the context
SNAPKV_RECENT = 32
SNAPKV_REFRESH = (0, 64)
MIN_DUEL_BLOCKS = 6

Fits = Callable[[Cell], str | None]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How a result is measured and when it counts.

    A block is four runs, plain-candidate-candidate-plain or the reverse. `*_s` are the longest scored time of one such
    run; a small budget shortens the runs, not their number, down to `min_rounds`.
    """

    race_run_s: float = 0.4
    duel_run_s: float = 2.0
    min_rounds: int = 4  # scored, per run
    warmup_rounds: int = 1  # per run, not scored
    race_blocks: int = 6  # at most; fewer where a cell's share would allow less than `trials_wanted`
    trials_wanted: int = 10
    duel_blocks: int = MIN_DUEL_BLOCKS
    pilot_blocks: int = 4
    max_trials: int = 40  # per cell
    hopeless: float = 0.25  # a race ends this / blocks (log) below the best, until the spread of blocks is known
    blocks_per_cell: int = 40  # that a cell's share of the budget is cut into
    duel_share: float = 0.4  # of a cell's share
    fill_share: float = 0.12  # of the whole budget, kept to measure the winners of some cells in the others
    busy_retries: int = 4  # of busy blocks in a row; then the machine is taken as it is, and the policy labelled
    min_speedup: float = 1.03
    tie: float = 0.02  # within the interval, and at most this far from the best, the plainer configuration wins

    def __post_init__(self) -> None:
        if self.duel_blocks < MIN_DUEL_BLOCKS:
            raise ValueError(f"Protocol.duel_blocks must be at least {MIN_DUEL_BLOCKS}, got {self.duel_blocks}")
        if self.min_rounds < 2 or min(self.race_blocks, self.pilot_blocks, self.max_trials) < 1:
            raise ValueError("Protocol needs at least 2 rounds per run, and 1 block and 1 trial")
        if self.min_speedup < 1:
            raise ValueError(f"Protocol.min_speedup must be at least 1, got {self.min_speedup}: slower is never chosen")

    def race_seconds(self, share_s: float) -> float:
        """Scored seconds of one run of a race, for a cell that may take `share_s`."""
        return min(self.race_run_s, share_s * (1 - self.duel_share) / (4 * self.blocks_per_cell))

    def block_seconds(self, run_s: float, plain_step_s: float) -> float:
        """What a block will take, a candidate's round being guessed at three plain steps."""
        rounds = self.warmup_rounds + self.min_rounds
        return 2 * (max(run_s, rounds * plain_step_s) + max(run_s, rounds * 3 * plain_step_s))

    def race_blocks_within(self, seconds: float, block_s: float) -> int:
        """Blocks per trial, 2 to `race_blocks`, so that `trials_wanted` of them fit."""
        return max(min(2, self.race_blocks), min(self.race_blocks, int(seconds / (self.trials_wanted * block_s))))

    def duel_seconds(self, share_s: float) -> float:
        """Scored seconds of one run of a duel: longer, because it sees more text."""
        return min(self.duel_run_s, share_s * self.duel_share / (4 * self.duel_blocks))


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be tuned: cells in the order of measuring, candidates of each (`off` is always measured beside them).

    probe  how a cell's parts are measured before its search, so that trees can be composed from them; None = not at all
    lanes  cells that may be tuned side by side. A cell starts from the winners of those at least this far before it, so the
           policy depends on this number, and neither on the number of workers nor on which of them is done first
    shard  which cells of a larger plan these are; a cell starts from cells of its own shard only
    siblings  the cells of the other shards, with the reason where they cannot run here
    """

    cells: tuple[Cell, ...]
    configs: Mapping[Cell, tuple[SpecConfig, ...]]
    budget_s: float
    infeasible: Mapping[Cell, str] = field(default_factory=dict)
    protocol: Protocol = field(default_factory=Protocol)
    probe: ProbePlan | None = None
    lanes: int = 1
    shard: CellShard = WHOLE
    siblings: Mapping[Cell, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.budget_s > 0:
            raise ValueError(f"Plan.budget_s must be above 0, got {self.budget_s}")
        if self.lanes < 1:
            raise ValueError(f"Plan.lanes must be at least 1, got {self.lanes}")
        if len(set(self.cells)) != len(self.cells):
            raise ValueError("Plan.cells holds a cell twice")
        if empty := [str(cell) for cell in self.cells if not self.configs.get(cell)]:
            raise ValueError(f"no candidate for {', '.join(empty)}: load a drafter, or allow a window not above the length")

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """Feasible and infeasible cells, sorted."""
        return tuple(sorted((*self.cells, *self.infeasible)))

    def before(self, cell: Cell) -> tuple[Cell, ...]:
        """The cells that are finished before this one starts."""
        dealt = deal((*self.all_cells, *self.siblings), self.shard.count)  # of a shard's own cells: all one number
        own = [other for other in self.cells if dealt[other] == dealt[cell]]
        return tuple(own[: max(own.index(cell) - self.lanes + 1, 0)])

    def of_shard(self, shard: CellShard) -> Plan:
        """The cells of a shard, or all of them as if each shard were tuned by itself; ValueError where it has none to run."""
        if shard.is_whole:
            return replace(self, shard=shard)
        dealt = deal(self.all_cells, shard.count)
        cells = tuple(cell for cell in self.cells if dealt[cell] == shard.index)
        infeasible = {cell: reason for cell, reason in self.infeasible.items() if dealt[cell] == shard.index}
        if not cells:
            why = "; ".join(f"{cell}: {reason}" for cell, reason in infeasible.items()) or f"there are {len(dealt)} cells"
            raise ValueError(f"shard {shard} has no cell that can run: {why}. Use fewer shards, or leave this one out")
        configs = {cell: self.configs[cell] for cell in cells}
        siblings = {cell: self.infeasible.get(cell, "") for cell in self.all_cells if dealt[cell] != shard.index}
        return replace(self, cells=cells, configs=configs, infeasible=infeasible, shard=shard, siblings=siblings)

    def share_s(self, seconds_left: float, cells_left: int) -> float:
        """What the next cell may take, of `cells_left` that wait, itself counted."""
        return seconds_left / max(math.ceil(cells_left / self.lanes), 1)

    @property
    def fill_s(self) -> float:
        """Seconds kept for the last stage; none where there is one cell, or where other shards must be finished before."""
        is_last = len(self.cells) > 1 and self.shard.count == 1
        return self.budget_s * self.protocol.fill_share if is_last else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; what makes two plans the same experiment, so without the budget."""
        return {
            "cells": [str(cell) for cell in self.cells],
            "configs": {str(cell): [str(config) for config in self.configs[cell]] for cell in self.cells},
            "infeasible": {str(cell): reason for cell, reason in self.infeasible.items()},
            "protocol": asdict(self.protocol),
            **({} if self.probe is None else {"probe": self.probe.to_dict()}),
            **({} if self.lanes == 1 else {"lanes": self.lanes}),
            **({} if self.shard.count == 1 else {"shard": str(self.shard)}),
        }

    def describe(self) -> str:
        """What `--dry-run` prints."""
        share = self.share_s(self.budget_s - self.fill_s, len(self.cells))
        beside = f", {self.lanes} at a time," if self.lanes > 1 else ""
        race, duel = self.protocol.race_seconds(share), self.protocol.duel_seconds(share)
        lines = [
            f"{len(self.cells)} cells{self._shard_words()}{beside} in at most {self.budget_s:g} s: {share:.1f} s each"
            + (f", {self.fill_s:.1f} s to measure winners in the other cells" if self.fill_s else ""),
            f"a block = 4 runs (plain, candidate, candidate, plain) of about {race:.2g} s, in the confirming duel "
            f"{duel:.2g} s, at least {self.protocol.min_rounds} rounds each",
            f"up to {self.protocol.max_trials} trials a cell; it speculates if the lower bound of {self.protocol.duel_blocks} "
            f"duel blocks exceeds {self.protocol.min_speedup:g}x",
            *self._probe_words(share),
        ]
        lines += [f"  {i + 1}. {cell}: {_count(self.configs[cell])}" for i, cell in enumerate(self.cells)]
        lines += [f"  -  {cell}: left out, {reason}" for cell, reason in sorted(self.infeasible.items())]
        return "\n".join(lines)

    def _shard_words(self) -> str:
        return "" if self.shard.count == 1 else f" (shard {self.shard} of {len(self.cells) + len(self.siblings)})"

    def _probe_words(self, share_s: float) -> list[str]:
        """Whether trees can be composed, or why not."""
        if self.probe is None:
            return []
        seconds = self.probe.seconds(share_s)
        if not seconds:
            return [
                f"parts are not probed, so no trees are composed: {self.probe.share:.0%} of {share_s:.1f} s is less than the "
                f"{self.probe.least_s:g} s that acceptance by rank and times by tree size need. Use more budget or fewer cells"
            ]
        runs = max(len(self.probe.runs(self.configs[cell], cell)) for cell in self.cells)
        return [
            f"before its search up to {runs} short runs in about {seconds:.1f} s show a cell's parts: acceptance by rank, "
            "times by tree size; the trees, chains and views that they promise are raced first"
        ]


def _count(configs: Sequence[SpecConfig]) -> str:
    kinds = dict.fromkeys(config.drafter for config in configs)
    parts = [f"{sum(config.drafter == kind for config in configs)} {kind}" for kind in kinds]
    return f"{len(configs)} candidates ({', '.join(parts)})"


def make_plan(
    batches: Sequence[int],
    lengths: Sequence[int],
    budget_s: float,
    drafters: Sequence[str],
    *,
    fits: Fits = lambda cell: None,
    windows: Sequence[int] = WINDOWS,
    chains: Sequence[int] = CHAINS,
    snapkv: Sequence[int] = (),
    protocol: Protocol | None = None,
    probe: ProbePlan | None = None,
    lanes: int = 1,
) -> Plan:
    """All cells of batches x lengths, cheapest first, each with every candidate of the loaded drafters.

    fits    a cell -> None, or the reason in words, with bytes, why it does not fit; asked before anything runs
    snapkv  budgets of the SnapKV views that `self` may draft through, where they lie below the length
    probe   measure parts first and compose trees from them
    lanes   cells tuned side by side, see Plan
    """
    if not batches or not lengths:
        raise ValueError("a plan needs at least one batch and one length, for example --batches 1,4 --lengths 512,1k")
    cells = sorted({Cell(b, s) for b in batches for s in lengths}, key=by_size)
    reasons = {cell: fits(cell) for cell in cells}
    feasible = tuple(cell for cell in cells if reasons[cell] is None)
    configs = {cell: candidates(cell, drafters, windows, chains, snapkv) for cell in feasible}
    infeasible = {cell: reason for cell, reason in reasons.items() if reason is not None}
    return Plan(feasible, configs, budget_s, infeasible, protocol or Protocol(), probe, lanes)


def candidates(
    cell: Cell, drafters: Sequence[str], windows: Sequence[int] = WINDOWS, chains: Sequence[int] = CHAINS,
    snapkv: Sequence[int] = (),
) -> tuple[SpecConfig, ...]:  # fmt: skip
    """Every drafter, window not above the context or (`self`) SnapKV budget below it, and chain."""
    views = [KvView.window(SINK, total - SINK) for total in windows if SINK < total <= cell.length]
    chosen = [KvView.snapkv(b, SNAPKV_RECENT, r) for b in snapkv if b + SNAPKV_RECENT < cell.length for r in SNAPKV_REFRESH]
    by_drafter: dict[str, list[KvView | None]] = {"ngram": [None], "self": [*views, *chosen], "model": [*views]}
    found: list[SpecConfig] = []
    for drafter in drafters:
        for view in by_drafter[drafter]:
            found += [SpecConfig(drafter, view, TreeShape.chain(n)) for n in chains]
    return tuple(found)


def with_trees(configs: Sequence[SpecConfig], found: Sequence[SpecConfig], cell: Cell) -> tuple[SpecConfig, ...]:
    """The candidates with further ones that can run in this cell.

    The trees among these come through every window of their drafter, so that they have neighbours along both axes of a search.
    """
    fitting = [c for c in found if not c.is_off and (c.view is None or (c.view.max_tokens or 0) <= cell.length)]
    more = list(fitting)
    for tree_config in (config for config in fitting if not config.is_chain):
        views = dict.fromkeys(c.view for c in configs if c.drafter == tree_config.drafter)
        windows = [view for view in views if view is None or view.kind == "window"]
        more += [SpecConfig(tree_config.drafter, view, tree_config.tree) for view in windows]
    return tuple(dict.fromkeys((*configs, *more)))


def starting_points(configs: Sequence[SpecConfig], cell: Cell) -> tuple[SpecConfig, ...]:
    """One good guess per drafter: a sixteenth of the context, at least 64 tokens, as window; a chain of 3."""
    wanted = math.log2(max(64, cell.length / 16))
    guesses = []
    for kind in dict.fromkeys(config.drafter for config in configs):
        mine = [config for config in configs if config.drafter == kind]
        guesses.append(min(mine, key=lambda c: (abs(_log_window(c, cell) - wanted), abs(c.num_nodes - 3), str(c))))
    return tuple(guesses)


def _log_window(config: SpecConfig, cell: Cell) -> float:
    tokens = config.view.max_tokens if config.view else None
    return math.log2(tokens or cell.length)
