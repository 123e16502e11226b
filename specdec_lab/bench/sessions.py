"""Open sessions by cell: prompts of the cell's length, read into the caches once and rewound for every run.

Not known here: what is measured in a session, and who decides on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..engine.cache import CacheTooLarge, available_bytes, check_fits
from ..records import Cell
from ..stream import Stream
from ..workload import ANSWER_TOKENS, NEEDLE, Sampling, Tokenizer, Workload, make, random_context, why_not

if TYPE_CHECKING:
    from ..engine.loop import Engine, OpenSession
    from ..engine.models.loading import ModelPair

MAX_NEW_TOKENS = 512
RANDOM = "random"
MIN_NEW_TOKENS = 128  # also where that leaves the trained length, which the run then says in its labels
KEPT_TEXTS = 256


class Sessions:
    """Streams of any cell of one workload; what does not fit beside an open session takes its place.

    workload  a kind of workload.KINDS (needle is for the needle model), "random" (ids and KV of chance, for timing only), or a
              function from cell to Workload
    """

    def __init__(
        self, engine: Engine, workload: str | Callable[[Cell], Workload] = "prose", *, max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling | None = None,
    ) -> None:
        self.engine = engine
        self._make = workload if callable(workload) else _held_out(engine.pair, workload, max_new_tokens, sampling or {})
        self._workloads: dict[Cell, Workload] = {}
        self._open: dict[Cell, OpenSession] = {}

    def workload(self, cell: Cell) -> Workload:
        """The prompts of a cell, always the same ones."""
        if cell not in self._workloads:
            self._workloads[cell] = self._make(cell)
        return self._workloads[cell]

    def open(self, cell: Cell) -> OpenSession:
        """The session of a cell; CacheTooLarge when it does not fit even alone."""
        if cell not in self._open:
            self._check_prompts_fit(cell)
            workload = self.workload(cell)
            try:
                self._open[cell] = self.engine.open(workload)
            except CacheTooLarge:
                if not self._open:
                    raise
                self._open.clear()
                self._open[cell] = self.engine.open(workload)
        return self._open[cell]

    def _check_prompts_fit(self, cell: Cell) -> None:
        """Refuse what cannot fit before its text is made: a batch of millions would take minutes to draw."""
        check_fits(self.engine.pair.target, cell.batch, cell.length)

    def _kv_bytes(self, cell: Cell, tokens: int) -> int:
        """KV of the target, with `tokens` per row."""
        target = self.engine.pair.target
        return cell.batch * tokens * target.shape.kv_bytes_per_token(target.kv_dtype.itemsize)

    def _free_bytes(self) -> float:
        free = available_bytes(self.engine.pair.target.device)
        return math.inf if free is None else free

    def steps(self, cell: Cell, config: Any, *, block: int | None = None) -> Stream:
        """A run of `config` from the end of the cell's prompts. Runs of one cell go one after another."""
        return self.open(cell).steps(config, block=block)

    def __call__(self, cell: Cell, config: Any) -> Stream:
        """What a tuner calls: measure(cell, config)."""
        return self.steps(cell, config)

    def forget(self, cell: Cell) -> None:
        """Free the caches of a cell."""
        self._open.pop(cell, None)

    def why_not(self, cell: Cell) -> str | None:
        """Why this cell cannot run, with the bytes where it is memory; nothing is allocated."""
        target = self.engine.pair.target
        if cell.length > target.max_length:
            return f"{target.name} has {target.max_length} positions, the cell asks for {cell.length} tokens"
        needed = self._kv_bytes(cell, cell.length)  # the text is made only for what may fit
        try:
            if needed <= self._free_bytes():
                needed = self._kv_bytes(cell, self.workload(cell).max_tokens)
        except ValueError as error:  # there is no such text
            return str(error)
        # without the free bytes, which change: a plan that is made again must say the same
        return None if needed <= self._free_bytes() else f"its KV needs {needed:,} bytes, more than {target.device} has free"


def _held_out(
    pair: ModelPair, kind: str, max_new_tokens: int, sampling: Sampling
) -> Callable[[Cell], Workload]:
    if kind == RANDOM:
        return lambda cell: random_context(cell, pair.target.shape.vocab, max_new_tokens=max_new_tokens, **sampling)
    if reason := why_not(kind, pair.tokenizer, pair.target.shape.vocab, pair.name):
        raise ValueError(reason)
    tokenizer = None if pair.tokenizer is None else _Remembering(pair.tokenizer)
    limit = pair.target.max_length
    if kind == NEEDLE:  # what follows a value is filler, which every draft foresees
        max_new_tokens = min(max_new_tokens, ANSWER_TOKENS)

    def made(cell: Cell) -> Workload:
        new_tokens = min(max_new_tokens, max(MIN_NEW_TOKENS, limit - cell.length))
        return make(kind, cell, tokenizer, max_new_tokens=new_tokens, **sampling)

    return made


class _Remembering:
    """A tokenizer that encodes a document once: every cell cuts its prompts from the same ones."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = lru_cache(maxsize=KEPT_TEXTS)(tokenizer.encode)
