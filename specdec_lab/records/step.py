"""What one step of a batch did, what it read and how long its parts took, and the laws that such a record obeys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

FELL_BACK = "fell back"  # how the flag begins that the first round after a live fall-back carries; "from CONFIG" follows

# The measured parts of a round, in the order in which they are stacked. They sum to wall_s.
PHASES = ("draft_s", "linear_s", "attention_s", "commit_s", "accept_s", "host_s")


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One draft-verify-commit round of one batch, or the prefill of a turn. Times are measured, in seconds.

    Per-sequence fields are tuples with one entry per row of the batch; a finished row has emitted nothing.
    `verify_s = linear_s + attention_s`. `kv_floor_s` is modelled: bytes over the calibrated read bandwidth.
    """

    index: int
    kind: str  # "prefill" or "round"
    config: str
    start_s: float  # since the start of the run, waiting of the consumer not counted
    wall_s: float
    draft_s: float
    linear_s: float
    attention_s: float
    commit_s: float
    accept_s: float
    host_s: float
    cpu_s: float  # thread CPU time of the engine's thread; wall far above it means a busy machine
    context_tokens: tuple[int, ...]  # committed KV length before the step
    drafted: tuple[int, ...]  # drafted nodes per row
    accepted: tuple[int, ...]  # accepted and emitted draft tokens, bonus not counted
    tokens: tuple[tuple[int, ...], ...]  # emitted tokens, bonus included
    censored: tuple[bool, ...]  # cut by end of text or length limit: neither accepted nor rejected
    ranks: tuple[tuple[int, ...], ...] = ()  # trees: per row which child (1 = first) was accepted at each depth
    nodes: tuple[tuple[int, ...], ...] = ()  # trees: which nodes each row drafted, where some row drafted fewer than all
    draft_linear_s: float = 0.0
    draft_attention_s: float = 0.0
    draft_kv_floor_s: float = 0.0
    kv_floor_s: float = 0.0
    kv_read_bytes: int = 0  # verify
    draft_kv_read_bytes: int = 0
    kv_write_bytes: int = 0
    weight_bytes: int = 0  # read by verify and draft forwards together
    linear_flops: int = 0
    attention_flops: int = 0
    query_tokens: int = 0  # per sequence in the verify forward, root counted
    draft_threads: int = 0  # of draft forwards and of verify on a CPU, as measured to be fastest; 0 where it means nothing
    verify_threads: int = 0
    context_cost_s: float | None = None  # sampled: step(n) - step(tiny n)
    flags: tuple[str, ...] = ()  # "busy", "floor-above-measured", "fell back from CONFIG"

    def __post_init__(self) -> None:
        if self.kind not in ("prefill", "round"):
            raise ValueError(f"StepRecord.kind must be prefill or round, got {self.kind!r}")
        rows = len(self.context_tokens)
        for name in ("drafted", "accepted", "tokens", "censored"):
            if len(getattr(self, name)) != rows:
                raise ValueError(f"StepRecord.{name} has {len(getattr(self, name))} entries for a batch of {rows}")
        for name in ("ranks", "nodes"):
            counts = self.accepted if name == "ranks" else self.drafted
            if (given := getattr(self, name)) and tuple(map(len, given)) != tuple(counts):
                raise ValueError(f"StepRecord.{name} {given} does not fit the counts {tuple(counts)} of its rows")
        if self.kind == "round":
            for row, (drafted, accepted) in enumerate(zip(self.drafted, self.accepted, strict=True)):
                if not 0 <= accepted <= drafted:
                    raise ValueError(f"row {row} accepted {accepted} of {drafted} drafted tokens")
        for name in ("wall_s", *PHASES):
            if getattr(self, name) < 0:
                raise ValueError(f"StepRecord.{name} is negative: {getattr(self, name)}")

    @property
    def verify_s(self) -> float:
        """Time of the target's forward."""
        return self.linear_s + self.attention_s

    @property
    def batch(self) -> int:
        """Rows of the batch, finished ones included."""
        return len(self.context_tokens)

    @property
    def live(self) -> tuple[bool, ...]:
        """Which rows emitted something in this step."""
        return tuple(bool(t) for t in self.tokens)

    @property
    def num_emitted(self) -> int:
        """Tokens emitted by all rows, bonus included."""
        return sum(len(t) for t in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; defaults are left out to keep traces small."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepRecord:
        """The inverse of to_dict; unknown keys of newer writers are ignored, missing ones raise ValueError."""
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        try:
            for name in ("context_tokens", "drafted", "accepted", "censored", "flags"):
                if name in values:
                    values[name] = tuple(values[name])
            for name in ("tokens", "ranks", "nodes"):
                if name in values:
                    values[name] = tuple(tuple(t) for t in values[name])
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a step record: {error}") from None
