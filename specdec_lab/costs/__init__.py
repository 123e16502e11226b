"""What theory expects: bytes and FLOPs of a forward, the machine's limits, a fitted cost model and its what-ifs.

Knows arithmetic only: numpy and records, neither torch nor the engine. The engine takes its exact byte and FLOP counts
from here, so the counts in a record and the counts in a prediction are one formula. Letters are those of the papers:
B batch, S context, q query tokens per sequence, K keys a draft reads, gamma drafted tokens of a chain, alpha the chance
of a drafted token, Omega the tokens of a round, bonus included.
"""

from __future__ import annotations

from .acceptance import AcceptanceFit, alpha_implied, fit_acceptance, omega
from .fitted import CostSample, FittedCost, fit_cost, nonnegative_least_squares, self_draft_disagreement
from .limits import (
    ForwardFloor,
    Limits,
    MemoryBound,
    Prediction,
    counted_floor,
    forward_floor,
    ideal_speedup,
    largest_batch,
    memory_bound,
)
from .model import (
    CostModel,
    WhatIf,
    inflection_length,
    kv_half_length,
    longer_chain_pays,
    node_pays,
    what_if,
)
from .planning import MACHINES, Draft, LimitRow, Machine, half_length, half_lengths, limit_row, limit_rows
from .shapes import SHAPES, ModelShape

__all__ = [
    "AcceptanceFit",
    "CostModel",
    "CostSample",
    "Draft",
    "FittedCost",
    "ForwardFloor",
    "LimitRow",
    "Limits",
    "MACHINES",
    "Machine",
    "MemoryBound",
    "ModelShape",
    "Prediction",
    "SHAPES",
    "WhatIf",
    "alpha_implied",
    "counted_floor",
    "fit_acceptance",
    "fit_cost",
    "forward_floor",
    "half_length",
    "half_lengths",
    "ideal_speedup",
    "inflection_length",
    "kv_half_length",
    "largest_batch",
    "limit_row",
    "limit_rows",
    "longer_chain_pays",
    "memory_bound",
    "node_pays",
    "nonnegative_least_squares",
    "omega",
    "self_draft_disagreement",
    "what_if",
]
