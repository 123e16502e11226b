"""A workload: prompts as tokens together with how to continue them; made here from the user's text or file.

Not known here: shipped text, models, engines, views.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

from ..records import RANDOM_CONTEXT, Cell

VERIFIERS = ("rejection", "coupled")

Tokens = tuple[int, ...]


class Tokenizer(Protocol):
    """All that a workload asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ...


class Sampling(TypedDict, total=False):
    """The fields of a Workload that say how tokens are drawn."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    verifier: str
    stop_at_eos: bool


def as_rows(rows: Iterable[Iterable[int]]) -> tuple[Tokens, ...]:
    """Rows of tokens as tuples."""
    return tuple(tuple(row) for row in rows)


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts as tokens, and how to continue them. Lists are accepted and kept as tuples.

    name            the key under which acceptance may be pooled: results of different names never are
    max_new_tokens  per turn
    seed            of the counter-based randomness; 0 temperature uses none
    turns           turns[k][row] is appended once every row has finished its reply to turn k: a growing conversation
    sequence_ids    the random stream of each row, 0..batch-1 when None: a row keeps its draws in any batch
    labels          what a reader of the numbers must know about the prompts, for example "repeated prompts"
    context         "read", or "noise": the KV of the prompts is filled with seeded random numbers instead, labelled
                    "random context"; for timing only, see random_context
    """

    name: str
    prompts: tuple[Tokens, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    verifier: str = "rejection"
    stop_at_eos: bool = True
    turns: tuple[tuple[Tokens, ...], ...] = ()
    sequence_ids: Tokens | None = None
    labels: tuple[str, ...] = ()
    context: str = "read"

    def __post_init__(self) -> None:
        if self.context not in ("read", "noise"):
            raise ValueError(f"Workload.context must be read or noise, got {self.context!r}")
        if self.context == "noise" and RANDOM_CONTEXT not in self.labels:
            object.__setattr__(self, "labels", (*self.labels, RANDOM_CONTEXT))
        object.__setattr__(self, "prompts", as_rows(self.prompts))
        object.__setattr__(self, "turns", tuple(as_rows(turn) for turn in self.turns))
        object.__setattr__(self, "labels", tuple(self.labels))
        if self.sequence_ids is not None:
            object.__setattr__(self, "sequence_ids", tuple(self.sequence_ids))
        self._check_text()
        self._check_sampling()

    def _check_text(self) -> None:
        if not self.prompts:
            raise ValueError(f"workload {self.name!r} has no prompts: a batch needs at least 1")
        for where, rows in (("prompt", self.prompts), *((f"turn {k + 1}", t) for k, t in enumerate(self.turns))):
            if len(rows) != len(self.prompts):
                raise ValueError(
                    f"workload {self.name!r}: {where} has {len(rows)} rows for {len(self.prompts)} prompts; "
                    "every row needs its own follow-up"
                )
            for row, tokens in enumerate(rows):
                if not tokens:
                    raise ValueError(f"workload {self.name!r}: {where} of row {row} is empty; give at least 1 token")
                if min(tokens) < 0:
                    raise ValueError(f"workload {self.name!r}: {where} of row {row} holds token id {min(tokens)} < 0")
        if self.sequence_ids is not None:
            self._check_sequence_ids(self.sequence_ids)

    def _check_sequence_ids(self, ids: Tokens) -> None:
        if len(ids) != self.batch:
            raise ValueError(f"workload {self.name!r} has {len(ids)} sequence_ids for {self.batch} prompts")
        if len(set(ids)) != len(ids):
            raise ValueError(
                f"workload {self.name!r}: sequence_ids must differ, got {ids}; equal ids would share their randomness"
            )

    def _check_sampling(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}; 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (keep every token) or more, got {self.top_k}")
        if self.verifier not in VERIFIERS:
            raise ValueError(f"verifier must be one of {', '.join(VERIFIERS)}, got {self.verifier!r}")

    @property
    def batch(self) -> int:
        """Sequences in the batch."""
        return len(self.prompts)

    @property
    def cell(self) -> Cell:
        """The batch, and the mean prompt length of the first turn, rounded."""
        return Cell(self.batch, round(sum(map(len, self.prompts)) / self.batch))

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row when it is done: its prompts, and max_new_tokens for each of its turns."""
        longest = max(sum(map(len, row)) for row in zip(self.prompts, *self.turns, strict=True))
        return longest + self.max_new_tokens * (1 + len(self.turns))


def from_text(
    texts: str | Sequence[str], tokenizer: Tokenizer, *, max_new_tokens: int = 128, name: str = "text",
    **sampling: Unpack[Sampling],
) -> Workload:
    """One prompt per text."""
    rows = [texts] if isinstance(texts, str) else list(texts)
    prompts = [tokenizer.encode(text) for text in rows]
    return Workload(name, as_rows(prompts), max_new_tokens, **sampling)


def from_file(
    path: str | Path, tokenizer: Tokenizer, *, max_new_tokens: int = 128, name: str | None = None,
    **sampling: Unpack[Sampling],
) -> Workload:
    """One prompt from a UTF-8 text file, or one per line of a .jsonl file of {"text": "..."} objects."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read prompts from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is not; convert it first") from error
    texts = _jsonl_texts(text, path) if path.suffix == ".jsonl" else [text]
    if not any(texts):
        raise ValueError(f"{path} is empty: there is nothing to continue")
    return from_text(texts, tokenizer, max_new_tokens=max_new_tokens, name=name or path.stem, **sampling)


def _jsonl_texts(text: str, path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would cut at U+2028 within a text
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"]:
            raise ValueError(f'{path}, line {number} is not an object with a non-empty "text": {line[:60]}')
        texts.append(entry["text"])
    return texts


def random_context(cell: Cell, vocabulary: int, *, max_new_tokens: int = 128, **sampling: Unpack[Sampling]) -> Workload:
    """Prompts of random ids whose KV is filled with noise instead of being read: for timing a shape at a length at once.

    Labelled "random context"; what is generated and accepted means nothing. stop_at_eos is False unless given.
    """
    rng = random.Random(sampling.get("seed", 0))
    sampling.setdefault("stop_at_eos", False)
    prompts = as_rows(rng.choices(range(vocabulary), k=cell.length) for _ in range(cell.batch))
    return Workload("random", prompts, max_new_tokens, context="noise", **sampling)
