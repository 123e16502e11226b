"""A synthetic world for trees: times at the limits of a machine, acceptance by rank from two numbers. Nothing is real.

Every place of a text has one random number for all configurations; it falls into the share of a rank, or of none. So the
truth is known in closed form: expected tokens of a tree, over times that are sums of floors and a launch.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from specdec_lab.costs import SHAPES, Limits, ModelShape, forward_floor
from specdec_lab.records import Cell, SpecConfig, StepRecord, TreeShape, UnsupportedConfig
from specdec_lab.trees import RankFit, choose, expected_tokens
from specdec_lab.trees.shape import level_widths

TARGET, DRAFT = SHAPES["Llama-3.1-8B"], SHAPES["1B"]
MACHINE = Limits(read_bytes_per_s=4e12, flops_per_s=8e14)
LAUNCH_S, OVERHEAD_S = 2e-4, 1e-4
RANKS = 64


@dataclass
class TreeWorld:
    """measure(cell, config). p1, b: of a draft that sees everything; a window lowers p1."""

    p1: float = 0.75
    b: float = 1.2
    noise: float = 0.0
    seed: int = 0
    snapkv_draws_trees: bool = False
    max_new_tokens: int = 1_000_000
    seconds: float = 0.0
    num_calls: int = 0

    def clock(self) -> float:
        return self.seconds

    def chances(self, cell: Cell, config: SpecConfig) -> tuple[float, ...]:
        """p_k of every node."""
        p1 = self.p1 if config.drafter == "model" else 0.95
        if config.view is not None and config.view.max_tokens is not None:
            seen = min(1.0, math.log2(config.view.max_tokens + 1) / math.log2(cell.length + 1))
            p1 *= 1 - (0.15 if config.view.kind == "window" else 0.1) * (1 - seen)
        return RankFit(p1, self.b, 0, 0, 1, 1).vector(RANKS)

    def forward_s(self, shape: ModelShape, cell: Cell, tokens: int, keys: int) -> float:
        return LAUNCH_S + forward_floor(shape, MACHINE, cell.batch, tokens, keys).total_s

    def parts_s(self, cell: Cell, config: SpecConfig) -> tuple[float, float, float]:
        """Seconds of drafting, of the target's forward, of the rest."""
        verify = self.forward_s(TARGET, cell, config.num_nodes + 1, cell.length)
        if config.is_off:
            return 0.0, verify, 0.0
        shape = TARGET if config.drafter == "self" else DRAFT
        keys = min(config.view.max_tokens or cell.length, cell.length)
        draft = sum(self.forward_s(shape, cell, width, keys) for width in level_widths(config.tree))
        return draft, verify, OVERHEAD_S

    def speedup(self, cell: Cell, config: SpecConfig) -> float:
        """The truth."""
        if config.is_off:
            return 1.0
        chances = self.chances(cell, config)
        return expected_tokens(config.tree, chances) * self.parts_s(cell, SpecConfig.off())[1] / sum(self.parts_s(cell, config))

    def best(self, cell: Cell, config: SpecConfig, sizes=range(1, 65)) -> tuple[float, TreeShape | None]:
        """The truly best tree of this drafter and view, of any size."""
        keys = min(config.view.max_tokens or cell.length, cell.length)
        shape = TARGET if config.drafter == "self" else DRAFT
        verify = {n: self.forward_s(TARGET, cell, n, cell.length) for n in sizes}
        found = choose(self.chances(cell, config), lambda w: self.forward_s(shape, cell, w, keys), verify, 9,
                       overhead_time=OVERHEAD_S)  # fmt: skip
        return found.speedup, found.tree

    def __call__(self, cell: Cell, config: SpecConfig):
        self.num_calls += 1
        is_snapkv = config.view is not None and config.view.kind == "snapkv"
        if is_snapkv and not config.is_chain and not self.snapkv_draws_trees:
            raise UnsupportedConfig(f"{config}: SnapKV views draft chains here")
        return self._rounds(cell, config, random.Random(f"{self.seed}/{self.num_calls}"))

    def _rounds(self, cell: Cell, config: SpecConfig, noise: random.Random):
        text = [random.Random(f"{self.seed}/{cell.length}/{row}") for row in range(cell.batch)]
        luck: list[list[float]] = [[] for _ in range(cell.batch)]
        chances = () if config.is_off else self.chances(cell, config)
        children = _children(config.tree)
        index = 0
        while min(map(len, luck)) < self.max_new_tokens:
            walks, tokens = [], []
            for row in range(cell.batch):
                walk = _walk(children, chances, luck[row], text[row])
                walks.append(walk)
                tokens.append(tuple(int(1e6 * u) for u in luck[row][-len(walk) - 1 :]))
            draft, verify, rest = (part * math.exp(noise.gauss(0, self.noise)) for part in self.parts_s(cell, config))
            wall = draft + verify + rest
            self.seconds += wall
            ranks = () if config.is_off or config.is_chain else tuple(walks)
            yield StepRecord(
                index, "round", str(config), self.seconds, wall, draft, 0.6 * verify, verify - 0.6 * verify, 0.0, 0.0,
                wall - draft - 0.6 * verify - (verify - 0.6 * verify), wall, (cell.length,) * cell.batch,
                (config.num_nodes,) * cell.batch, tuple(map(len, walks)), tuple(tokens), (False,) * cell.batch, ranks=ranks,
                query_tokens=config.num_nodes + 1,
            )  # fmt: skip
            index += 1


def _children(tree: TreeShape | None) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents if tree else ()):
        found.setdefault(parent, []).append(node)
    return found


def _walk(children, chances, luck, text) -> tuple[int, ...]:
    """Ranks accepted on the way down; every place visited has its number, the last one is the bonus token's."""
    node, ranks = -1, []
    while True:
        u = text.random()
        luck.append(u)
        below, rank = 0.0, 0
        for k, p in enumerate(chances, start=1):
            below += p
            if u < below:
                rank = k
                break
        here = children.get(node, [])
        if not 1 <= rank <= len(here):
            return tuple(ranks)
        ranks.append(rank)
        node = here[rank - 1]
