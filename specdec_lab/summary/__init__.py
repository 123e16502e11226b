"""From finished runs to the numbers people quote: acceptance, time, speed-up with its interval, a verdict in words.

Names and definitions follow vLLM's per-request metrics. Knows records, trees and numpy; neither how a step was produced nor
how a number is drawn.
"""

from __future__ import annotations

from .comparing import Comparison, compare
from .intervals import PairedRatio, paired_ratio, spread, student_quantile, wilson_interval
from .pooling import check_one_acceptance, pool, steady_rounds, summarize
from .rates import Acceptance, acceptance, request_acceptance_lengths
from .verdicts import verdict

__all__ = [
    "Acceptance", "Comparison", "PairedRatio", "acceptance", "check_one_acceptance", "compare", "paired_ratio", "pool",
    "request_acceptance_lengths", "spread", "steady_rounds", "student_quantile", "summarize", "verdict", "wilson_interval",
]  # fmt: skip
