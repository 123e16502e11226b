"""A model with its cache for one batch: every forward of a run goes through here, on the thread count that suits it.

Not known here: who asks, what is accepted.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec_kernels.decoder.cpu import Drafted, Draw

from ..records import KvView
from .attention import AttentionBackend, Reads, chain_order, chain_reads
from .batch import Batch, Forward, count_forward
from .cache import KvCache
from .clocks import Clock, CoarseClock, Phase
from .models.runner import Runner, Scores
from .threads import Threads

PREFILL_CHUNK = 512  # tokens of each row per forward
TARGET, DRAFT = (Phase.LINEAR, Phase.ATTENTION), (Phase.DRAFT_LINEAR, Phase.DRAFT_ATTENTION)
_UNHEARD = CoarseClock()  # forwards that only measure thread counts are booked nowhere


@dataclass(slots=True)
class Network:
    """A runner, its cache and how to run it.

    skips_finished  finished rows cost nothing: where the whole forward is one compiled call
    used_threads    of the latest forward of a round; 0 where torch's threads do not run it
    index           what SnapKV views list now, see Reads.index
    """

    runner: Runner
    cache: KvCache
    backend: AttentionBackend
    clock: Clock
    threads: Threads
    skips_finished: bool = False
    used_threads: int = 0
    index: Tensor | None = None

    def __post_init__(self) -> None:
        self.skips_finished = self.runner.why_not_compiled(self.backend) is None

    def rows(self, batch: Batch) -> Tensor | None:
        """[R] the rows to compute, or None for all."""
        return batch.live_rows if self.skips_finished else None

    def score(self, tokens: Tensor, reads: Reads, last: int, phases: tuple[Phase, Phase]) -> Scores:
        """One forward of a round: tokens [B, T] at `reads`; the `last` queries are scored."""
        reads = self._with_lists(reads)
        keep = chain_order(tokens.shape[1], tokens.device)[tokens.shape[1] - last :]
        kind = (_width_class(tokens.shape[1], reads), *self._kind(reads))

        if self.runner.device.type != "cpu":
            self.clock.forward(*phases)
            return self.runner.forward(tokens, reads, self.cache, self.backend, self.clock, keep)

        def forward(clock: Clock) -> Scores:
            return self.runner.forward(tokens, reads, self.cache, self.backend, clock, keep)

        self.used_threads = self.threads.use(kind, lambda: forward(_UNHEARD), self.clock.pause, self.clock.resume)
        self.clock.forward(*phases)
        start = time.perf_counter()
        scores = forward(self.clock)
        self.threads.took(kind, time.perf_counter() - start)
        return scores

    def draft(self, tokens: Tensor, reads: Reads, children: tuple[int, ...], draw: Draw) -> Drafted | None:
        """A chain or tree after tokens [B, lag + 1] in one call; None where it must be drafted level by level. See Runner."""
        if not self.skips_finished:
            return None
        reads = self._with_lists(reads)
        kind = ("draft", children, draw.temperature > 0, *self._kind(reads))

        def draft(clock: Clock) -> Drafted | None:
            return self.runner.draft(tokens, reads, self.cache, self.backend, clock, children, draw)

        self.used_threads = self.threads.use(kind, lambda: draft(_UNHEARD), self.clock.pause, self.clock.resume)
        self.clock.forward(*DRAFT)
        start = time.perf_counter()
        drafted = draft(self.clock)
        self.threads.took(kind, time.perf_counter() - start)
        return drafted

    def _with_lists(self, reads: Reads) -> Reads:
        """Reads through a SnapKV view, with what it lists."""
        if reads.view.kind != "snapkv":
            return reads
        assert self.index is not None  # whoever drafts through such a view chooses first
        return replace(reads, index=self.index)

    def _kind(self, reads: Reads) -> tuple[Hashable, ...]:
        """What a thread count was measured for."""
        rows = reads.committed.shape[0] if reads.rows is None else reads.rows.shape[0]
        return self.runner.fingerprint, self.backend.name, rows, str(reads.view), reads.longest.bit_length()

    def read(
        self, batch: Batch, known: list[int], view: KvView, phases: tuple[Phase, Phase]
    ) -> tuple[list[int], tuple[Forward, ...]]:
        """Read every row's text between known[b] and its root into the cache, in chunks, attending through `view`.

        Rows that lag less than others are padded; padding goes to the scratch slot.
        returns  the new known lengths, and the forwards made
        """
        cache, goal, forwards = self.cache, [n - 1 for n in batch.host_lengths], []
        device = cache.committed.device
        while known != goal:
            lags = [g - k for g, k in zip(goal, known, strict=True)]
            # a finished row near the end of the cache is padded too, and must not be padded beyond it
            width = min(max(lags), PREFILL_CHUNK, cache.capacity - max(known))
            cache.committed = torch.tensor(known, device=device)
            takes = torch.tensor([min(lag, width) for lag in lags], device=device)
            order = torch.arange(width, device=device)
            at = (cache.committed[:, None] + order).clamp(max=batch.ids.shape[1] - 1)
            reads = chain_reads(cache.committed, width, view, max(known), min(known) == max(known))
            self.clock.forward(*phases)
            self.runner.forward(
                batch.ids.gather(1, at), reads, cache, self.backend, self.clock, None, order >= takes[:, None]
            )
            self.clock.enter(Phase.HOST)
            forwards.append(count_forward(known, width, view))
            known = [k + min(lag, width) for k, lag in zip(known, lags, strict=True)]
        cache.committed = torch.tensor(goal, device=device)
        return known, tuple(forwards)


def _width_class(queries: int, reads: Reads) -> int:
    """Forwards of one class share a thread count: one token, a chain's few, a tree's by powers of two."""
    return min(queries, 2) if reads.causal else 1 + queries.bit_length()
