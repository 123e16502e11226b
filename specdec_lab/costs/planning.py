"""What theory promises before anything is measured: per cell the fastest draft at the physical limits of a machine.

Every number here is modelled. It bounds what engineering can reach, for an acceptance that somebody has to assume; what a
draft is really worth, `tune` measures. Not known here: this machine, its clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..records import Cell, KvView, SpecConfig, TreeShape
from .limits import Limits, Prediction, forward_floor, ideal_speedup, largest_batch
from .shapes import ModelShape

GIB = 2.0**30
LONGEST_CHAIN = 32
ENOUGH = 0.995  # of the fastest: a longer chain for less than half a percent is not worth its graph


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as a few numbers. `source` says whose numbers these are."""

    name: str
    limits: Limits
    memory_bytes: float
    source: str

    def __post_init__(self) -> None:
        for what, value in (("read_bytes_per_s", self.limits.read_bytes_per_s), ("flops_per_s", self.limits.flops_per_s),
                            ("memory_bytes", self.memory_bytes)):  # fmt: skip
            if not 0 < value < float("inf"):
                raise ValueError(f"Machine.{what} must be a number above 0, got {value}")


# 16-bit matrix products without sparsity.
MACHINES = {
    "h200": Machine("H200", Limits(4.3e12, 788e12), 139 * GIB, "planning figures: what a copy and a large product reach"),
    "h100": Machine("H100 SXM", Limits(3.35e12, 989e12), 80e9, "data sheet, which nothing reaches"),
    "a100": Machine("A100 SXM 80GB", Limits(2.039e12, 312e12), 80e9, "data sheet, which nothing reaches"),
}


@dataclass(frozen=True, slots=True)
class Draft:
    """Who drafts, through which view; `shape` is the second network's, None for `self` and `ngram`."""

    drafter: str
    view: KvView | None
    shape: ModelShape | None = None

    @classmethod
    def parse(cls, text: str, shape: ModelShape | None = None) -> Draft:
        """Read `self:4+508`, `model:full` or `ngram`: a configuration without its tree."""
        config = SpecConfig.parse(f"{text}/chain1")
        if (shape is None) == (config.drafter == "model"):
            raise ValueError(
                f"{text}: a second network's sizes are needed for `model` drafts and for these only (in a shell: --draft-shape)"
            )
        return cls(config.drafter, config.view, shape)

    def chain(self, gamma: int) -> SpecConfig:
        """The configuration that drafts `gamma` tokens in a row; 0 is plain decoding."""
        return SpecConfig(self.drafter, self.view, TreeShape.chain(gamma)) if gamma else SpecConfig.off()

    @property
    def view_tokens(self) -> int | None:
        """Keys that a drafted token reads at most; None = all."""
        return None if self.view is None else self.view.max_tokens


@dataclass(frozen=True, slots=True)
class LimitRow:
    """A cell at the limits. `best` is None where the cell does not fit; `largest_batch` is what fits at its length.

    kv_share  of a plain step
    """

    cell: Cell
    plain_s: float
    kv_share: float
    largest_batch: int
    config: SpecConfig
    best: Prediction | None


def limit_row(shape: ModelShape, machine: Machine, cell: Cell, draft: Draft, alpha: float) -> LimitRow:
    """The shortest chain that is as good as the fastest, in 16 bit.

    alpha  chance of every drafted token while all before it were accepted

    An n-gram draft costs nothing here. A second network's weights and KV count against the memory.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is the chance that a drafted token is accepted, 0 to 1, got {alpha}")
    plain = forward_floor(shape, machine.limits, cell.batch, 1, cell.length)
    most = largest_batch(shape, cell.length, machine.memory_bytes, drafter=draft.shape)
    if cell.batch > most:
        return LimitRow(cell, plain.total_s, plain.attention_s / plain.total_s, most, SpecConfig.off(), None)
    chains = [_at(shape, machine, cell, draft, alpha, gamma) for gamma in range(LONGEST_CHAIN + 1)]
    fastest = max(chain.speedup for chain in chains)
    best = next(chain for chain in chains if chain.speedup >= ENOUGH * fastest)
    return LimitRow(cell, plain.total_s, plain.attention_s / plain.total_s, most, draft.chain(best.gamma), best)


def _at(shape: ModelShape, machine: Machine, cell: Cell, draft: Draft, alpha: float, gamma: int) -> Prediction:
    found = ideal_speedup(shape, machine.limits, cell, alpha, gamma, draft.view_tokens, draft.shape)
    if draft.drafter != "ngram":
        return found
    return Prediction(gamma, found.omega * found.plain_s / found.verify_s, found.omega, found.plain_s, 0.0, found.verify_s)


def limit_rows(
    shape: ModelShape, machine: Machine, cells: Iterable[Cell], draft: Draft, alpha: float
) -> tuple[LimitRow, ...]:
    """A row per cell, in their order."""
    return tuple(limit_row(shape, machine, cell, draft, alpha) for cell in cells)


def half_length(shape: ModelShape, limits: Limits, batch: int) -> float:
    """The context at which KV takes half of a plain step, tokens: beyond it, reading KV is the larger part."""
    other = forward_floor(shape, limits, batch, 1, 0).linear_s
    per_token = forward_floor(shape, limits, batch, 1, 1_000_000).attention_s / 1e6
    return other / per_token


def half_lengths(shape: ModelShape, limits: Limits, batches: Sequence[int]) -> tuple[tuple[int, float], ...]:
    """(batch, that length), for each."""
    return tuple((batch, half_length(shape, limits, batch)) for batch in batches)
