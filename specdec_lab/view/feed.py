"""Steps in, packets out: what the live view is sent, how often, and how it recovers from a lost message.

A delta carries the rounds since the last packet. A keyframe carries everything that the view shows, with the older part
of the run merged to fit. Every packet has a sequence number, so that a reader can tell when one is missing: it waits for
the next keyframe. Knows neither threads, nor clocks, nor widgets.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from ..records import RunHeader, StepRecord
from ..summary import Comparison
from .events import event_words
from .rows import COLUMNS, COUNT, SEGMENT, STEP, Row, at_most, halve, pack, row_of
from .tally import Tally

ROWS_PER_DELTA = 48
RECENT_ROWS = 400  # kept exactly
OLDER_ROWS = 250  # kept merged


@dataclass(frozen=True, slots=True)
class Packet:
    """One message: a small JSON head and packed rows."""

    head: Mapping[str, Any]
    rows: bytes

    def to_bytes(self) -> bytes:
        """Length of the head (4 bytes, little-endian), head padded to a multiple of 4, rows."""
        head = json.dumps(self.head, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 4)
        return len(head).to_bytes(4, "little") + head + self.rows

    @classmethod
    def from_bytes(cls, data: bytes) -> Packet:
        """The inverse of to_bytes."""
        end = 4 + int.from_bytes(data[:4], "little")
        return cls(json.loads(data[4:end]), data[end:])


@dataclass(slots=True)
class Segment:
    """Rounds in a row of one configuration: a block of a profile, a turn of a conversation, a choice of a policy."""

    number: int
    cell: str
    config: str
    block: int | None
    prefill_ms: float = 0.0
    rounds: int = 0
    is_sent: bool = False

    def to_message(self) -> list[Any]:
        """As the front end reads it."""
        return [self.number, self.cell, self.config, self.block, round(self.prefill_ms, 3)]


@dataclass(slots=True)
class Feed:
    """All that a live view knows of its run."""

    run_id: str
    num_steps: int = 0
    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)
    header: RunHeader | None = None
    last_step: StepRecord | None = None
    events: list[str] = field(default_factory=list)  # what happened besides rounds, in words, oldest first
    _recent: deque[Row] = field(default_factory=deque)
    _older: list[Row] = field(default_factory=list)
    _segments: dict[int, Segment] = field(default_factory=dict)
    _num_segments: int = 0
    _segment: Segment | None = None
    _seq: int = 0
    _next_step: int = 0  # first one that no packet has carried

    def add(self, header: RunHeader, step: StepRecord) -> None:
        """Take one step in."""
        segment = self._segment_of(header, step)
        self.header, self.last_step = header, step
        if step.kind == "prefill":
            segment.prefill_ms += step.wall_s * 1e3
            return
        segment.rounds += 1
        self.events += event_words(step)
        self._keep(row_of(step, self.num_steps, segment.number))
        self.num_steps += 1
        self._tally_of(header, step).add(step)

    def _segment_of(self, header: RunHeader, step: StepRecord) -> Segment:
        current = self._segment
        if current is not None and header is self.header and not self._starts_anew(current, step):
            current.config = step.config
            return current
        segment = Segment(self._num_segments, str(header.cell), step.config, header.block)
        self._segments[segment.number] = self._segment = segment
        self._num_segments += 1
        return segment

    @staticmethod
    def _starts_anew(current: Segment, step: StepRecord) -> bool:
        return current.rounds > 0 and (step.kind == "prefill" or step.config != current.config)

    def _tally_of(self, header: RunHeader, step: StepRecord) -> Tally:
        key = (header.workload, str(header.cell), step.config)
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally(*key)
        tally.labels = tuple(dict.fromkeys((*tally.labels, *header.labels)))
        return tally

    def _keep(self, row: Row) -> None:
        self._recent.append(row)
        if len(self._recent) <= RECENT_ROWS:
            return
        self._older.append(self._recent.popleft())
        if len(self._older) > OLDER_ROWS:
            fewer = halve(self._older)
            self._older = fewer if len(fewer) < len(self._older) else self._older[OLDER_ROWS // 2 :]
            self._forget_segments()

    def _forget_segments(self) -> None:
        first = self._older[0][SEGMENT]
        self._segments = {number: s for number, s in self._segments.items() if number >= first}

    def set_speedups(self, comparisons: Iterable[Comparison]) -> None:
        """The paired ratios against plain decoding, as far as blocks are finished."""
        for c in comparisons:
            tally = self.tallies.get((c.workload, str(c.cell), c.config))
            if tally is not None:
                tally.speedup, tally.is_touched = c.speedup, True

    def has_news(self) -> bool:
        """Whether rounds came in since the last packet."""
        return self._next_step < self.num_steps

    def delta(self, meta: Mapping[str, Any] | None = None) -> Packet:
        """The rounds since the last packet, merged if there are too many; with `meta`, changed table rows too."""
        fresh = list(takewhile(lambda row: row[STEP] >= self._next_step, reversed(self._recent)))
        head: dict[str, Any] = {"k": "d", "segs": self._segment_messages(unsent_only=True)}
        if meta is not None:
            touched = [tally for tally in self.tallies.values() if tally.is_touched]
            head |= {"meta": meta, "table": [tally.to_message() for tally in touched]}
            self._mark_sent(touched)
        return self._packet(head, at_most(fresh[::-1], ROWS_PER_DELTA))

    def keyframe(self, meta: Mapping[str, Any]) -> Packet:
        """Everything that the view shows."""
        head = {
            "k": "k",
            "columns": COLUMNS,
            "segs": self._segment_messages(unsent_only=False),
            "meta": meta,
            "table": [tally.to_message() for tally in self.tallies.values()],
        }
        self._mark_sent(list(self.tallies.values()))
        return self._packet(head, [*self._older, *self._recent])

    def _segment_messages(self, *, unsent_only: bool) -> list[list[Any]]:
        chosen = [s for s in self._segments.values() if s.rounds and not (unsent_only and s.is_sent)]
        for segment in chosen:
            segment.is_sent = True
        return [segment.to_message() for segment in chosen]

    @staticmethod
    def _mark_sent(tallies: list[Tally]) -> None:
        for tally in tallies:
            tally.is_touched = False

    def _packet(self, head: dict[str, Any], rows: list[Row]) -> Packet:
        self._seq += 1
        self._next_step = self.num_steps
        first = int(rows[0][STEP]) if rows else self.num_steps
        return Packet({**head, "run": self.run_id, "seq": self._seq, "i0": first, "n": len(rows)}, pack(rows))

    @property
    def num_kept_rounds(self) -> int:
        """Rounds that a keyframe shows, merged ones counted in full."""
        return int(sum(row[COUNT] for row in (*self._older, *self._recent)))
