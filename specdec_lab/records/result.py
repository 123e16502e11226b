"""The metrics of a run as values. How they are computed is the matter of `summary`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of a per-step quantity with its 5th and 95th percentile and its count."""

    median: float
    p05: float
    p95: float
    count: int


@dataclass(frozen=True, slots=True)
class Summary:
    """The metrics of a run, named as vLLM names them (engines.md section 4). Lengths include the bonus token.

    Acceptance statistics leave censored rows out. `parts_s` are mean seconds per round of each phase.
    """

    config: str
    num_spec_steps: int  # row-rounds that drafted
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_emitted_tokens: int  # of rounds, prefill not counted
    mean_acceptance_length: float
    draft_acceptance_rate: float | None
    acceptance_histogram: tuple[int, ...]
    acceptance_rate_per_pos: tuple[float, ...]
    conditional_acceptance: tuple[float, ...]
    step_s: Spread
    tokens_per_s: float
    tokens_per_s_spread: Spread
    parts_s: Mapping[str, float]
    prefill_s: float
    kv_read_bytes: float  # mean per round, verify and draft
    kv_floor_share: float | None  # KV floor of verify over measured attention
    kv_read_bytes_per_s: float | None  # verify bytes over measured attention
    busy_steps: int
    labels: tuple[str, ...] = field(default=())
    rank_acceptance: tuple[float, ...] = ()  # chance that the k-th child of an accepted node is accepted, over all depths

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)
