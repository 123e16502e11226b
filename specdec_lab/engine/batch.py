"""The sequences of a run, and exact counts of what forwards over them read and compute.

Not known here: models, who drafts, what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_kernels.decoder.cpu import Draw

from ..records import KvView
from .attention import chain_order
from .sampling import Noise, Processor, Purpose


@dataclass(slots=True)
class Batch:
    """The sequences of a run. Row b's text is ids[b, :lengths[b]]; its last token is the root, not yet in the cache.

    ids        [B, capacity] int64; lengths [B] int64
    live_rows  [R] int32 rows that still emit, None while all do
    host_lengths, host_live  the same on the host, to plan without reading the device
    """

    ids: Tensor
    lengths: Tensor
    host_lengths: list[int]
    host_live: list[bool]
    noise: Noise
    processor: Processor
    verifier: str
    live_rows: Tensor | None = None

    def set_live(self, live: list[bool]) -> None:
        """Which rows still emit."""
        self.host_live = live
        rows = [row for row, is_live in enumerate(live) if is_live]
        self.live_rows = None if len(rows) == len(live) else torch.tensor(rows, dtype=torch.int32, device=self.ids.device)

    def draft_draw(self) -> Draw | None:
        """How drafted tokens are chosen, if a kernel can do it."""
        p = self.processor
        if p.why_not_compiled() is not None:
            return None
        coupled = self.verifier == "coupled"
        purpose = Purpose.TARGET if coupled else Purpose.DRAFT
        return Draw(p.temperature, self.noise.sequences, self.noise.seed, int(purpose), coupled)

    def last_tokens(self, count: int) -> Tensor:
        """[B, count] the end of every row's text; its last token is the root."""
        at = self.lengths[:, None] - 1
        return self.ids.gather(1, at if count == 1 else at + torch.arange(1 - count, 1, device=at.device))

    def write(self, tokens: Tensor) -> None:
        """Put tokens [B, N] behind every row's text; which of them count is for the caller to say."""
        at = self.lengths[:, None] + chain_order(tokens.shape[1], tokens.device)
        self.ids.scatter_(1, at, tokens)

    def lengths_of(self, rows: Tensor | None) -> list[int]:
        """Lengths of the rows that are computed: all, or those that still emit."""
        if rows is None:
            return self.host_lengths
        return [length for length, live in zip(self.host_lengths, self.host_live, strict=True) if live]

    @property
    def longest_committed(self) -> int:
        """Longest committed KV over the rows."""
        return max(self.host_lengths) - 1

    @property
    def uniform(self) -> bool:
        """Whether all rows have one length."""
        return min(self.host_lengths) == max(self.host_lengths)


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward read and computed, exactly: integers, from the lengths that it used.

    rows     sequences that were computed
    queries  tokens per row, padding included
    keys     KV rows per head, each counted once however many queries read it
    pairs    query-key pairs
    scored_keys, scored_pairs  the same beside attention where keys are only scored and their values stay unread
    """

    rows: int
    queries: int
    keys: int
    pairs: int
    scored_keys: int = 0
    scored_pairs: int = 0


def count_forward(committed: list[int], queries: int, view: KvView, before: int = 0) -> Forward:
    """The counts of a forward of `queries` chained tokens per row, `before` drafted ones of the round already appended."""
    keys = pairs = 0
    most = view.recent if view.kind == "snapkv" else view.max_tokens
    for length in committed:
        first = length + before  # position of the first query
        if view.kind == "snapkv":  # what is listed before its window, every query reads
            listed = min(view.budget, max(first - view.recent + 1, 0), length)
            keys, pairs = keys + listed, pairs + queries * listed
        whole = queries if most is None else min(max(most - first, 0), queries)  # queries that see all before them
        pairs += whole * first + whole * (whole + 1) // 2 + (queries - whole) * (most or 0)
        seen = first + queries
        keys += seen if most is None else min(seen, most + queries - 1)
    return Forward(len(committed), queries, keys, pairs)
