"""llama.cpp as a peer: plain decoding, a draft model, or lookup of n-grams, each over any number of rows.

    python llama_cpp_worker.py --model target.gguf [--draft draft.gguf] --threads N [--mode plain|draft|lookup]

Speculation is the loop of llama.cpp's own simple example over the C interface: draft greedily, evaluate the last token and
the draft in one llama_decode, keep the longest prefix that the target would have chosen. What is faster on the prompts at
hand (layout of the KV, length of the draft, …) is tried when they are read, and said in the settings.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from llama_api import Context, Library, Model
from probing import seconds_per_step
from protocol import CannotRun, Decoded, run
from speculation import Places, Row, Tally

UNIFIED_TOKENS = 16_384  # in one KV every row attends over all rows' tokens: beyond this, trying it costs more than it may win
# llama.cpp's default length of a draft is first: the layout of the KV is chosen with it
DRAFT_LENGTHS, LOOKUP_LENGTHS, SHORTEST_NGRAMS = (3, 1, 2, 4, 6, 8), (4, 2, 6, 10), (1, 2)


@dataclass(frozen=True)
class Knobs:
    """What is tried: draft_length for both kinds of speculation, draft_threads for a model, shortest_ngram for lookup."""

    unified_kv: bool
    draft_length: int = 0
    draft_threads: int = 0
    shortest_ngram: int = 0


@dataclass
class Session:
    """Prompts in the KV of the target, and of the draft model or the tables if there are any."""

    prompts: list[list[int]]
    target: Context
    draft: Context | None = None
    places: list[Places] = field(default_factory=list)

    def read_prompts(self) -> float:
        """Seconds of reading all but each prompt's last token."""
        began = time.perf_counter()
        for row, prompt in enumerate(self.prompts):
            for context in self.contexts():
                context.read(row, prompt[:-1])
        for places, prompt in zip(self.places, self.prompts, strict=False):
            places.read_prompt(prompt)
        return time.perf_counter() - began

    def rewind(self) -> None:
        """Back to the end of the prompts, their last token still to be evaluated."""
        for row, prompt in enumerate(self.prompts):
            for context in self.contexts():
                context.keep(row, len(prompt) - 1)
        for places, prompt in zip(self.places, self.prompts, strict=False):
            places.rewind(len(prompt))

    def contexts(self) -> list[Context]:
        return [self.target] if self.draft is None else [self.target, self.draft]

    def close(self) -> None:
        for context in self.contexts():
            context.close()


class ModelDrafter:
    """Drafts with a second model, all rows in one evaluation for each drafted token."""

    def __init__(self, context: Context, prompts: Sequence[Sequence[int]]) -> None:
        self._context = context
        self._read = [len(prompt) - 1 for prompt in prompts]  # tokens of each row in the draft's KV

    def propose(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[int]]:
        """Up to lengths[i] tokens for rows[i]."""
        drafts: list[list[int]] = [[] for _ in rows]
        for done in range(max(lengths)):
            asked = [i for i, length in enumerate(lengths) if length > done]
            pieces = []
            for i in asked:
                row, read = rows[i], self._read[rows[i].id]
                tokens = drafts[i][-1:] if done else row.tokens[read:]
                pieces.append((row.id, read, tokens))
                self._read[row.id] += len(tokens)
            for i, token in zip(asked, self._context.next_tokens(pieces), strict=True):
                drafts[i].append(token)
        return drafts

    def settle(self, row: Row) -> None:
        """Drop what was drafted and did not stand."""
        if self._read[row.id] > len(row.tokens) - 1:
            self._read[row.id] = len(row.tokens) - 1
            self._context.keep(row.id, self._read[row.id])


class LookupDrafter:
    """Drafts what followed the same n-gram before in the row's own text."""

    def __init__(self, places: Sequence[Places], shortest: int) -> None:
        self._places, self._shortest = places, shortest

    def propose(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[list[int]]:
        """Up to lengths[i] tokens for rows[i]."""
        shortest = self._shortest
        return [self._places[row.id].propose(row.tokens, n, shortest) for row, n in zip(rows, lengths, strict=True)]

    def settle(self, row: Row) -> None:
        """Nothing was kept."""


class LlamaCpp:
    """What the protocol asks of an engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._library = Library()
        self._target = Model(self._library, options.model)
        self._draft = Model(self._library, options.draft) if options.draft else None
        self._mode, self._threads = options.mode, options.threads
        self.name = f"llama.cpp/{self._mode}"
        self.vocab, self.positions = self._target.vocab, self._target.positions
        self.max_batch = self._library.api.llama_max_parallel_sequences()
        if self._draft and self._draft.vocab != self.vocab:
            raise CannotRun(f"the draft model has {self._draft.vocab} tokens, the target {self.vocab}; they must be the same")
        self._session: Session | None = None
        self._knobs: Knobs | None = None
        self._tried: list[dict[str, Any]] = []
        self._new_tokens = 0

    def settings(self) -> dict[str, Any]:
        """How it runs; knobs and tried are of the prompts that were prepared last."""
        return {
            "engine": "llama.cpp", "versions": self._library.facts() | {"python": platform.python_version()},
            "mode": self._mode, "threads": self._threads, "dtype": "float32", "kv_dtype": "float32",
            "attention": "without flash attention, which would round the float32 KV to float16 at every step",
            "weight_bytes_per_parameter": self._target.bytes_per_parameter(),
            "choice": "argmax by numpy over the logits of the positions that need them",
            "timing": "wall time from before the first llama_decode after the prompts to after the last choice",
            "knobs": asdict(self._knobs) if self._knobs else None, "tried": self._tried,
        }  # fmt: skip

    def prepare(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Read the prompts in every layout of the KV worth trying, keep the fastest, then find the fastest draft in it."""
        self._release()
        self._new_tokens, self._tried = new_tokens, []
        unified = self._fastest_layout(prompts)
        self._session = self._open(prompts, unified)
        prefill_s = self._session.read_prompts()
        self._knobs = self._fastest_draft(self._session, unified)
        return prefill_s

    def decode(self) -> Decoded:
        assert self._session is not None, "the protocol prepares first"
        assert self._knobs is not None, "chosen when prepared"
        return continued(self._session, self._knobs, self._new_tokens)

    def close(self) -> None:
        self._release()
        for model in (self._target, self._draft):
            if model is not None:
                model.close()

    def _release(self) -> None:
        if self._session:
            self._session.close()
        self._session = self._knobs = None

    def _open(self, prompts: list[list[int]], unified: bool) -> Session:
        rows, tokens = len(prompts), max(map(len, prompts)) + self._new_tokens
        target = Context(self._target, rows, tokens, self._threads, unified)
        draft = Context(self._draft, rows, tokens, self._threads, unified) if self._draft else None
        return Session(prompts, target, draft, [Places() for _ in prompts] if self._mode == "lookup" else [])

    def _fastest_layout(self, prompts: list[list[int]]) -> bool:
        tokens = sum(map(len, prompts)) + self._new_tokens * len(prompts)
        if not is_unified_worth_trying(len(prompts), tokens):
            return False
        tried = []
        for unified in (False, True):
            session = self._open(prompts, unified)
            session.read_prompts()
            tried.append((self._probe(session, self._knobs_to_try(unified)[0]), unified))
            session.close()
        return min(tried)[1]

    def _fastest_draft(self, session: Session, unified: bool) -> Knobs:
        """What was fastest at the start of this very continuation."""
        knobs = self._knobs_to_try(unified)
        if len(knobs) == 1:
            return knobs[0]
        best = min(((self._probe(session, k), k) for k in knobs), key=_seconds)
        if self._mode == "draft" and self._threads > 1:
            single = replace(best[1], draft_threads=1)
            best = min(best, (self._probe(session, single), single), key=_seconds)
        return best[1]

    def _knobs_to_try(self, unified: bool) -> list[Knobs]:
        if self._mode == "plain":
            return [Knobs(unified)]
        if self._mode == "draft":
            return [Knobs(unified, length, draft_threads=self._threads) for length in DRAFT_LENGTHS]
        return [Knobs(unified, length, shortest_ngram=n) for length in LOOKUP_LENGTHS for n in SHORTEST_NGRAMS]

    def _probe(self, session: Session, knobs: Knobs) -> float:
        step_s: float = seconds_per_step(lambda tokens: continued(session, knobs, tokens).seconds, self._new_tokens)
        self._tried.append(asdict(knobs) | {"seconds_per_step": step_s})
        return step_s


def _seconds(tried: tuple[float, Any]) -> float:
    return tried[0]


def is_unified_worth_trying(rows: int, tokens: int) -> bool:
    """Whether one KV may be faster for so many rows with so many tokens together; a single row is laid out alike either way."""
    return rows > 1 and tokens <= UNIFIED_TOKENS


def continued(session: Session, knobs: Knobs, new_tokens: int) -> Decoded:
    """So many tokens after the prompts."""
    session.rewind()
    before = [context.seconds for context in session.contexts()]
    decode = plainly if knobs.draft_length == 0 else speculatively
    decoded = decode(session, knobs, new_tokens)
    inside = sum(c.seconds - then for c, then in zip(session.contexts(), before, strict=True))
    return replace(decoded, extra=decoded.extra | {"library_s": inside})


def plainly(session: Session, knobs: Knobs, new_tokens: int) -> Decoded:
    """One llama_decode of all rows for each token."""
    last, positions = [p[-1] for p in session.prompts], [len(p) - 1 for p in session.prompts]
    began = time.perf_counter()
    chosen = session.target.continue_rows(last, positions, new_tokens)
    seconds = time.perf_counter() - began
    return Decoded(np.transpose(chosen).tolist(), seconds, {"rounds": new_tokens})


def speculatively(session: Session, knobs: Knobs, new_tokens: int) -> Decoded:
    """Rounds of drafting and one llama_decode that judges the drafts of all rows."""
    rows = [Row(i, list(prompt), len(prompt) + new_tokens) for i, prompt in enumerate(session.prompts)]
    drafter = _drafter(session, knobs)
    tally, open_rows = Tally(), rows
    began = time.perf_counter()
    while open_rows:
        # the round itself adds one token, so a draft of all that remains would be one too many
        drafts = drafter.propose(open_rows, [min(knobs.draft_length, row.remaining - 1) for row in open_rows])
        judge(session.target, open_rows, drafts, tally, drafter.settle)
        open_rows = [row for row in open_rows if row.remaining]
    seconds = time.perf_counter() - began
    return Decoded([row.tokens[-new_tokens:] for row in rows], seconds, tally.extra())


def judge(
    target: Context, rows: Sequence[Row], drafts: Sequence[list[int]], tally: Tally, settle: Callable[[Row], None]
) -> None:
    """Evaluate all drafts at once; every row keeps what the target would have chosen, and one token more."""
    pieces = [(row.id, len(row.tokens) - 1, [row.tokens[-1], *draft]) for row, draft in zip(rows, drafts, strict=True)]
    tally.rounds += 1
    for row, draft, choices in zip(rows, drafts, target.all_next_tokens(pieces), strict=True):
        if tally.settle(row, draft, choices) < len(draft):
            target.keep(row.id, len(row.tokens) - 1)
        settle(row)


def _drafter(session: Session, knobs: Knobs) -> ModelDrafter | LookupDrafter:
    if session.draft is None:
        return LookupDrafter(session.places, knobs.shortest_ngram)
    session.draft.set_threads(knobs.draft_threads)
    return ModelDrafter(session.draft, session.prompts)


if __name__ == "__main__":
    run(LlamaCpp, __doc__.split("\n")[0] if __doc__ else "")
