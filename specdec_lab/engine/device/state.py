"""Everything that changes from round to round, in buffers that never move: what a captured round reads and writes.

A row's text is ids[b, :committed + 1]; its last token is the root, not yet in the cache. Results of a round go into one row
of a log on the device, round `number` into row number % rounds; the host copies the whole log at once every few rounds. Not
known here: what a round does (round.py), who reads the log (readings.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...records import MAX_DEPTH

MOST_EMITTED = MAX_DEPTH + 1  # tokens of a row in one round
CONTEXT, LIVE, LAG, DRAFTED, ACCEPTED, EMITTED, CUT, KNOWN, TOKENS = range(9)  # columns of a row's entry
RANKS = TOKENS + MOST_EMITTED  # behind its tokens
SAME = 16  # numbers: kernels are compiled anew for addresses and strides that are not multiples of 16, so all of them are
ENTRY = -(-(RANKS + MAX_DEPTH) // SAME) * SAME
MOST_MARKS = 2 * MAX_DEPTH + 6  # stamps of a round
DRAFT_ATTENTION, ATTENTION = MOST_MARKS, MOST_MARKS + 1  # their nanoseconds, behind the stamps
TIMES = -(-(MOST_MARKS + 2) // SAME) * SAME
MATCHING = 2  # numbers per row that the look for n-grams adds up in
WINDOW_OF_FULL = (0, 0)  # recent = 0: everything is visible


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The static buffers of one batch; all int64 but where said.

    ids        [B, capacity] tokens
    committed  [B] tokens whose target KV is final, so the position of the root
    live       [B] bool, rows that still emit; the others are computed too and advance no more
    emitted    [B] tokens of this turn
    known      [B] tokens whose KV the draft model has
    number     [1] round
    window     [3] int32: sinks and window of the draft's view, how far back sinks are seen. Values, so never part of a graph
    eos        [E] tokens that end a text
    limit      [1] tokens per turn
    matching   [B, MATCHING] zero between rounds
    log        [rounds, B * ENTRY + TIMES]
    verify_stamps, draft_stamps  [layers, 2] and [MAX_DEPTH, layers, 2]: start and end of attention in every layer
    """

    ids: Tensor
    committed: Tensor
    live: Tensor
    emitted: Tensor
    known: Tensor
    number: Tensor
    window: Tensor
    eos: Tensor
    limit: Tensor
    matching: Tensor
    log: Tensor
    verify_stamps: Tensor
    draft_stamps: Tensor

    @classmethod
    def of(cls, ids: Tensor, eos: Sequence[int], limit: int, rounds: int, layers: int) -> DeviceState:
        """Buffers for the sequences in `ids`; `rounds` is how many the log holds, `layers` the most that a model here has."""
        batch, device = ids.shape[0], ids.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            ids, zeros(batch), zeros(batch, dtype=torch.bool), zeros(batch), zeros(batch), zeros(1),
            zeros(3, dtype=torch.int32), torch.tensor(sorted(eos), dtype=torch.int64, device=device),
            torch.full((1,), limit, dtype=torch.int64, device=device), zeros(batch, MATCHING),
            zeros(rounds, batch * ENTRY + TIMES), zeros(layers, 2), zeros(MAX_DEPTH, layers, 2),
        )

    @property
    def batch(self) -> int:
        """Rows, finished ones included."""
        return self.ids.shape[0]

    @property
    def entries(self) -> Tensor:
        """[rounds, B, ENTRY] the part of the log that is about rows."""
        return self.log[:, : self.batch * ENTRY].view(-1, self.batch, ENTRY)

    @property
    def times(self) -> Tensor:
        """[rounds, TIMES] the part of the log that holds stamps."""
        return self.log[:, self.batch * ENTRY :]

    @property
    def roots(self) -> Tensor:
        """[B, 1] the last token of every row."""
        return self.ids.gather(1, self.committed[:, None])

    def put(self, committed: Sequence[int], live: Sequence[bool], emitted: Sequence[int], known: Sequence[int]) -> None:
        """Take over what the host knows. Between rounds only."""
        for buffer, values in (
            (self.committed, committed), (self.live, live), (self.emitted, emitted), (self.known, known),
        ):  # fmt: skip
            buffer.copy_(torch.tensor(list(values), dtype=buffer.dtype))

    def put_window(self, sink: int, recent: int) -> None:
        """Draft through another window from the next round on; (0, 0) is everything."""
        far = 1 << 30
        self.window.copy_(torch.tensor([sink, recent, far], dtype=torch.int32))

    def counters(self) -> tuple[Tensor, ...]:
        """The buffers that a round advances, to be saved and restored around a rehearsal."""
        return self.committed, self.live, self.emitted, self.known, self.number
