"""From acceptance by rank to the tree worth drafting (Sequoia, Chen 2024), and the tree files of other projects.

    p1, b = fit = fit_acceptance(counts)                              # counts of accepted ranks -> two numbers and their error
    best_tree(fit.vector(32), nodes=64, levels=8)                     # most expected tokens
    choose(fit.vector(32), draft_time, verify_time, levels=8).reason  # most expected tokens per second, or `off`

`nodes` and `levels` count the root, as the papers do; a TreeShape does not. Knows arithmetic and records only, neither torch
nor the engine: torch is imported by files.py while it reads a `.pt` file, and by nothing else here.
"""

from __future__ import annotations

from .acceptance import Acceptance, why_not_heap
from .choice import ChainTimes, Choice, choose
from .counts import Counts, Walk, rank_counts
from .files import TreeFileError
from .fit import RankFit, fit_acceptance
from .growmap import load_growmap
from .importers import OptimizerConfig, load_acceptance, load_optimizer_config
from .margin import Margin
from .observed import observed
from .probing import Drafting, probe_tree
from .search import best_tree
from .shape import expected_tokens, path_chances

__all__ = [
    "Acceptance", "ChainTimes", "Choice", "Counts", "Drafting", "Margin", "OptimizerConfig", "RankFit", "TreeFileError", "Walk",
    "best_tree", "choose", "expected_tokens", "fit_acceptance", "load_acceptance", "load_growmap", "load_optimizer_config",
    "observed", "path_chances", "probe_tree", "rank_counts", "why_not_heap",
]  # fmt: skip
