"""The nouns: cells, configurations, step records, run headers, runs, summaries.

Every noun is a frozen dataclass that checks itself when made, and every noun that a user types has one text spelling,
used by magics, command line, JSON, Optuna and labels alike: `X.parse(str(x)) == x`. This room knows the standard
library only: not torch, not the engine, not the view.
"""

from __future__ import annotations

from .cell import Cell, parse_count
from .config import DRAFTERS, SpecConfig
from .errors import ParseError, UnsupportedConfig
from .identity import Identity, fingerprint
from .kv_view import KvView
from .labels import FORCED, MODELLED, ONE_SHARD, RANDOM_CONTEXT, RANDOM_WEIGHTS, forced_label, not_measured
from .result import Spread, Summary
from .run import STEP_SCHEMA, Run, RunHeader
from .step import FELL_BACK, PHASES, StepRecord
from .tree import MAX_DEPTH, MAX_NODES, TreeShape

__all__ = [
    "DRAFTERS", "FELL_BACK", "FORCED", "MAX_DEPTH", "MAX_NODES", "MODELLED", "ONE_SHARD", "PHASES", "RANDOM_CONTEXT",
    "RANDOM_WEIGHTS", "STEP_SCHEMA", "Cell", "Identity", "KvView", "ParseError", "Run", "RunHeader", "SpecConfig", "Spread",
    "StepRecord", "Summary", "TreeShape", "UnsupportedConfig", "fingerprint", "forced_label", "not_measured", "parse_count",
]  # fmt: skip
