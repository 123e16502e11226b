"""What repeated plain decoding says of the machine: how steady it is, when it was another one, what many at once cost.

A sentinel is a record of kind `sentinel`: plain decoding of one cell, at the start and about every five minutes of a worker's
time. Everything measured in between carries the id of the last good one. One that is shifted re-opens what was measured since
(status `throttled`: it is measured again), or flags it (`is_drift`, where no time was left). All of it follows from records
alone, so a policy can be rebuilt. Not known here: who measures them, and when (watch.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import Cell
from .db import Measurement

KIND = "sentinel"
SHIFT = 0.03  # of the median round, relative: beyond it the machine is another one
SURE = 2.0  # standard errors or deviations: what is nearer is noise
MIN_SHIFTS = 2  # between repeats, before they say how steady the machine is
CROWDED = 0.01  # slower with all workers busy by more than this: numbers are published with the concurrency


def shift(now: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """Log ratio of the median rounds of two summaries of plain decoding; above 0 is slower."""
    return math.log(now["step_s"]["p50"] / before["step_s"]["p50"])


def is_shifted(now: Mapping[str, Any], before: Mapping[str, Any], cv: float | None) -> bool:
    """Whether two sentinels differ by more than SHIFT, and by more than their noise: their rounds', that of earlier ones."""
    error = math.hypot(_relative_error(now), _relative_error(before))
    return abs(shift(now, before)) > max(math.log1p(SHIFT), SURE * error, SURE * math.sqrt(2) * (cv or 0.0))


def _relative_error(summary: Mapping[str, Any]) -> float:
    step = summary["step_s"]
    return float(step["sd"] / step["mean"] / math.sqrt(summary["num_rounds"]))


def variation(sentinels: Iterable[Measurement]) -> float | None:
    """Coefficient of variation of plain decoding repeated minutes apart; None with fewer than three repeats of a worker.

    From the differences of neighbours in time, so that a machine which changed once and stayed so does not count as unsteady.
    """
    by_worker: dict[tuple[str, str, Cell], list[float]] = defaultdict(list)
    for m in sentinels:
        if _is_good(m) and "shift" in m.summary:
            by_worker[m.run, m.worker, m.cell].append(m.summary["shift"])
    shifts = [s for several in by_worker.values() if len(several) >= MIN_SHIFTS for s in several]
    return math.sqrt(sum(s * s for s in shifts) / len(shifts) / 2) if shifts else None


def _is_good(record: Measurement) -> bool:
    return record.kind == KIND and record.status == "ok" and not record.summary.get("is_drift")


def standing(records: Sequence[Measurement]) -> list[Measurement]:
    """The records that no sentinel has re-opened."""
    gone = {m.reopens for m in records if m.reopens}
    return [m for m in records if m.env.get(KIND) not in gone]


@dataclass(frozen=True, slots=True)
class Steadiness:
    """Of the machine while a cell was measured.

    repeats  how often the workers that measured it did so with plain decoding of one cell
    cv       coefficient of variation over these, None where they are too few
    drift    the largest shift (log) that its blocks were measured across without being measured again
    """

    repeats: int = 0
    cv: float | None = None
    drift: float = 0.0

    @property
    def least_speedup(self) -> float:
        """The smallest speed-up that may be published from such a machine: one that it cannot pretend by itself."""
        return 1.0 + max(SURE * (self.cv or 0.0), math.expm1(self.drift))

    def to_dict(self) -> dict[str, Any]:
        """What a row of a policy says of it; nothing where nothing is known."""
        if self.cv is None and not self.drift:
            return {}
        found: dict[str, Any] = {"repeats": self.repeats, "least_speedup": self.least_speedup}
        found |= {"cv": self.cv} if self.cv is not None else {}
        return {KIND: found | ({"drift": self.drift} if self.drift else {})}


def steadiness(blocks: Iterable[Measurement], records: Iterable[Measurement]) -> Steadiness:
    """While these blocks were measured, from all records of the tuning."""
    blocks = tuple(blocks)
    workers = {(m.run, m.worker) for m in blocks}
    mine = [m for m in records if m.kind == KIND and (m.run, m.worker) in workers and m.status in ("ok", "throttled")]
    repeats = 1 + sum("shift" in m.summary for m in mine)
    return Steadiness(repeats, variation(mine), _drift({m.env.get(KIND) for m in blocks}, mine))


def _drift(intervals: Collection[str | None], sentinels: Iterable[Measurement]) -> float:
    flagged = [m for m in sentinels if m.summary.get("is_drift") and m.design.pair_of in intervals]
    return max((abs(m.summary["shift"]) for m in flagged), default=0.0)


def crowding(records: Iterable[Measurement]) -> tuple[int, float]:
    """Workers that measured at once, and by how much (log) that slowed the one that it slowed most; (1, 0) for one worker."""
    found = [m for m in records if m.kind == KIND and m.status == "ok" and "slowdown" in m.summary]
    workers = max((m.env["concurrency"] for m in found), default=1)
    return workers, max((m.summary["slowdown"] for m in found), default=0.0)


def crowding_label(records: Iterable[Measurement]) -> set[str]:
    """What a policy says of numbers that were measured with all workers busy, where that matters."""
    workers, slowdown = crowding(records)
    return {f"{workers} workers at once"} if slowdown > math.log1p(CROWDED) else set()
