"""The record of a round that was read: its stamps in seconds, beside exact counts of the forwards that it made.

Counts are those of what was computed: every row, finished ones too; of n-grams the whole chain, whether or not a row found
one. Not known here: how rounds are played.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...records import KvView, SpecConfig, StepRecord
from ..accounts import Commit, Progress, count, step_record
from ..batch import Forward, count_forward
from ..calibrate import Ceilings
from ..models.loading import ModelPair
from .flights import Flight
from .program import Program
from .readings import Reading, lap
from .state import ACCEPTED, CONTEXT, CUT, DRAFTED, EMITTED, LAG, RANKS, TOKENS

FULL = KvView.full()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the host did for the drafts of the next round: its forwards, and how long it took."""

    forwards: tuple[Forward, ...] = ()
    ns: int = 0


def record_of(
    reading: Reading, flight: Flight, gap_ns: int, prepared: Prepared, pair: ModelPair, progress: Progress, ceilings: Ceilings
) -> StepRecord:
    """gap_ns: what the host kept the device waiting before it, what it prepared not counted."""
    config, entries = flight.config, reading.entries
    took, flags = lap(flight.player.phases, reading.times, gap_ns, prepared.ns)
    context = tuple(entry[CONTEXT] for entry in entries)
    target, draft = _counts(flight.program, config, context, [entry[LAG] for entry in entries])
    commit = Commit(
        tuple(entry[ACCEPTED] for entry in entries),
        tuple(tuple(entry[TOKENS : TOKENS + entry[EMITTED]]) for entry in entries),
        tuple(bool(entry[CUT]) for entry in entries),
        tuple(tuple(entry[RANKS : RANKS + entry[ACCEPTED]]) for entry in entries) if flight.program.layout is not None else (),
    )
    drafting = pair.draft if config.drafter == "model" and pair.draft else pair.target
    record = step_record(
        "round", config, progress, took, context, tuple(entry[DRAFTED] for entry in entries), commit,
        count(pair.target, target, 0), count(drafting, prepared.forwards + draft, 0), ceilings,
    )
    return replace(record, flags=record.flags + flags) if flags else record


def _counts(
    program: Program, config: SpecConfig, context: Sequence[int], lags: Sequence[int]
) -> tuple[tuple[Forward, ...], tuple[Forward, ...]]:
    """Exact counts of the forwards of a round: of verify, and of drafting."""
    committed, view = list(context), config.view
    if view is None:
        return (count_forward(committed, config.depth + 1, FULL),), ()
    behind = lags if config.drafter == "model" else [0] * len(lags)
    first = count_forward(
        [n - lag for n, lag in zip(committed, behind, strict=True)], program.drafts[0].num_queries, view
    )
    if program.layout is None:
        drafts = [first] + [count_forward(committed, 1, view, step) for step in range(1, config.depth)]
        return (count_forward(committed, config.depth + 1, FULL),), tuple(drafts)
    drafts = [first] + [level.count(committed, view) for level in program.layout.levels[1:]]
    return (program.layout.whole.count(committed, FULL),), tuple(drafts)


def with_idle(record: StepRecord, idle_s: float) -> StepRecord:
    """The record with the time of rounds that ran after its last row had ended."""
    return replace(
        record, wall_s=record.wall_s + idle_s, host_s=record.host_s + idle_s, flags=(*record.flags, "idle-rounds")
    )
