"""The sequences of a run, and reading their committed text into a model's cache.

Not known here: who drafts, what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import KvView
from .attention import AttentionBackend, chain_reads
from .cache import KvCache
from .clocks import Clock, Phase
from .models.runner import Runner
from .sampling import Noise, Processor

PREFILL_CHUNK = 512  # tokens of each row per forward


@dataclass(slots=True)
class Batch:
    """The sequences of a run. Row b's text is ids[b, :lengths[b]]; its last token is the root, not yet in the cache.

    ids      [B, capacity] int64; lengths [B] int64; live [B] bool
    host_lengths, host_live  the same on the host, to plan without reading the device
    """

    ids: Tensor
    lengths: Tensor
    host_lengths: list[int]
    host_live: list[bool]
    noise: Noise
    processor: Processor
    verifier: str

    @property
    def roots(self) -> Tensor:
        """[B] the last emitted tokens."""
        return self.ids.gather(1, self.lengths[:, None] - 1)[:, 0]

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
    """What one forward read and computed over all rows, exactly: integers, from the lengths that it used.

    queries  tokens per row, padding included
    keys     KV rows per head, each counted once however many queries read it
    pairs    query-key pairs
    """

    queries: int
    keys: int
    pairs: int


def count_forward(committed: list[int], queries: int, view: KvView, before: int = 0) -> Forward:
    """The counts of a forward of `queries` chained tokens per row, `before` drafted ones of the round already appended."""
    keys = pairs = 0
    most = view.max_tokens
    for length in committed:
        first = length + before  # position of the first query
        whole = queries if most is None else min(max(most - first, 0), queries)  # queries that see all before them
        pairs += whole * first + whole * (whole + 1) // 2 + (queries - whole) * (most or 0)
        seen = first + queries
        keys += seen if most is None else min(seen, most + queries - 1)
    return Forward(queries, keys, pairs)


def read_committed(
    runner: Runner, cache: KvCache, backend: AttentionBackend, batch: Batch, known: list[int], view: KvView, clock: Clock,
    phases: tuple[Phase, Phase],
) -> tuple[list[int], tuple[Forward, ...]]:
    """Read every row's text between known[b] and its root into `cache`, in chunks, attending through `view`.

    Rows that lag less than others are padded; padding goes to the scratch slot.
    returns  the new known lengths, and the forwards made
    """
    goal = [n - 1 for n in batch.host_lengths]
    device, forwards = cache.committed.device, []
    while known != goal:
        lags = [g - k for g, k in zip(goal, known, strict=True)]
        # a finished row near the end of the cache is padded too, and must not be padded beyond it
        width = min(max(lags), PREFILL_CHUNK, cache.capacity - max(known))
        cache.committed = torch.tensor(known, device=device)
        takes = torch.tensor([min(lag, width) for lag in lags], device=device)
        order = torch.arange(width, device=device)
        at = (cache.committed[:, None] + order).clamp(max=batch.ids.shape[1] - 1)
        reads = chain_reads(cache.committed, width, view, max(known), min(known) == max(known))
        clock.forward(*phases)
        runner.forward(batch.ids.gather(1, at), reads, cache, backend, clock, None, order >= takes[:, None])
        clock.enter(Phase.HOST)
        forwards.append(count_forward(known, width, view))
        known = [k + min(lag, width) for k, lag in zip(known, lags, strict=True)]
    cache.committed = torch.tensor(goal, device=device)
    return known, tuple(forwards)
