"""Where prompts come from: the user's text or file, or shipped held-out text of an exact length.

A workload is prompts as tokens together with how to continue them. The shipped text is the part of the demo corpus that
training never saw: prose (the Python manual), code (its standard library), revisions (a text followed by an edited copy
of itself) and conversations that grow turn by turn. Not known here: models, engines, views.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Protocol, TypedDict, Unpack

from ..records import Cell

VERIFIERS = ("rejection", "coupled")
KINDS = ("prose", "code", "revision", "conversation")
HELD_OUT = Path(__file__).parents[1] / "demo" / "held_out.jsonl.gz"
CONTINUATION_TOKENS = 64  # of its own document follow every held-out prompt, so that a true continuation exists
OVERLAP_STRIDE = 64  # tokens between the starts of overlapping prompts

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


def _rows(rows: Iterable[Iterable[int]]) -> tuple[Tokens, ...]:
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", _rows(self.prompts))
        object.__setattr__(self, "turns", tuple(_rows(turn) for turn in self.turns))
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
    return Workload(name, _rows(prompts), max_new_tokens, **sampling)


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


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """One document of the shipped held-out text.

    source               "manual", "code", or "revision": an original, an empty line, and an edited copy of it
    original_characters  length of the original of a revision, else None
    """

    source: str
    name: str
    sha256: str
    text: str
    original_characters: int | None = None


def read_held_out(path: Path = HELD_OUT) -> list[HeldOutText]:
    """Every shipped held-out document, in file order."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing from this installation; reinstall specdec_lab, or give your own text")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [HeldOutText(**json.loads(line)) for line in lines]


def held_out(
    kind: str, cell: Cell, tokenizer: Tokenizer, *, max_new_tokens: int = 128, follow_ups: int = 3,
    follow_up_tokens: int = 64, **sampling: Unpack[Sampling],
) -> Workload:
    """Real text that the demo pair was not trained on, every prompt exactly `cell.length` tokens long.

    kind      prose (the Python manual), code (its standard library), revision (a text, then part of an edited copy of
              it) or conversation (prose; `follow_ups` turns of `follow_up_tokens` tokens come after the first reply)
    sampling  seed (0) also decides which places are drawn; stop_at_eos is False unless given: a load has a fixed length

    Rows are different places, in different documents as far as there are any, and at least 64 tokens of the document
    follow each. Where that is impossible the workload says so in its labels: "joined documents" (none is long enough),
    "overlapping prompts", "repeated prompts".
    """
    if kind not in KINDS:
        raise ValueError(f"kind of held-out text must be one of {', '.join(KINDS)}, got {kind!r}")
    num_turns = follow_ups if kind == "conversation" else 0
    span = cell.length + num_turns * (CONTINUATION_TOKENS + follow_up_tokens)
    rows, labels = _draw_rows(kind, span, cell.batch, tokenizer, random.Random(sampling.get("seed", 0)))
    turns = []
    for turn in range(num_turns):
        # the document's own text stands where the reply will be; the follow-up is what came after it
        start = cell.length + turn * (CONTINUATION_TOKENS + follow_up_tokens) + CONTINUATION_TOKENS
        turns.append(_rows(row[start : start + follow_up_tokens] for row in rows))
    prompts = _rows(row[: cell.length] for row in rows)
    sampling.setdefault("stop_at_eos", False)
    return Workload(kind, prompts, max_new_tokens, turns=tuple(turns), labels=labels, **sampling)


Excerpts = tuple[Iterator[Tokens], Iterator[Tokens]]  # of one document: disjoint ones, then ones that overlap them


def _draw_rows(
    kind: str, span: int, batch: int, tokenizer: Tokenizer, rng: random.Random
) -> tuple[list[Tokens], tuple[str, ...]]:
    source = {"prose": "manual", "conversation": "manual"}.get(kind, kind)
    documents = [d for d in read_held_out() if d.source == source]
    rng.shuffle(documents)
    specials = tuple(tokenizer.encode(""))  # what the tokenizer puts before every text, for example a BOS
    length = span - len(specials)
    if length < 1:
        raise ValueError(f"a prompt of {span} tokens leaves no room for text beside {len(specials)} special tokens")
    labels: tuple[str, ...] = ()
    if kind == "revision":
        excerpts = [_revision_excerpts(d, length, tokenizer, specials, rng) for d in documents]
        rows, labels = _pick(excerpts, batch)
    else:
        tokens = [_encode(tokenizer, d.text, specials) for d in documents]
        if not any(len(t) >= length + CONTINUATION_TOKENS for t in tokens):
            tokens, labels = [tuple(token for t in tokens for token in t)], ("joined documents",)
        rows, more = _pick([_excerpts(t, length, rng) for t in tokens], batch)
        labels += more
    if not rows:
        raise ValueError(
            f"the shipped {kind} text holds no prompt of {span} tokens; ask for at most 8192, or give your own text"
        )
    return [specials + row for row in rows], labels


def _encode(tokenizer: Tokenizer, text: str, specials: Tokens) -> Tokens:
    tokens = tuple(tokenizer.encode(text))
    return tokens[len(specials) :] if specials and tokens[: len(specials)] == specials else tokens


def _excerpts(document: Tokens, length: int, rng: random.Random) -> Excerpts:
    """Excerpts of `length` tokens that leave a continuation, in random order."""
    room = len(document) - CONTINUATION_TOKENS
    count = max(0, room // length)
    phase = rng.randrange(room - count * length + 1) if count else 0
    disjoint = [phase + i * length for i in range(count)]
    overlapping = sorted(set(range(0, room - length + 1, OVERLAP_STRIDE)) - set(disjoint))
    rng.shuffle(disjoint)
    rng.shuffle(overlapping)
    return (document[s : s + length] for s in disjoint), (document[s : s + length] for s in overlapping)


def _pick(documents: list[Excerpts], batch: int) -> tuple[list[Tokens], tuple[str, ...]]:
    """`batch` excerpts, one document after the other; labels say what had to be given up."""
    rows = list(islice(_one_by_one([disjoint for disjoint, _ in documents]), batch))
    labels: tuple[str, ...] = ()
    if len(rows) < batch:
        more = list(islice(_one_by_one([overlapping for _, overlapping in documents]), batch - len(rows)))
        rows += more
        labels = ("overlapping prompts",) if more else ()
    if 0 < len(rows) < batch:
        rows = list(islice(cycle(rows), batch))
        labels += ("repeated prompts",)
    return rows, labels


def _one_by_one(sources: Iterable[Iterator[Tokens]]) -> Iterator[Tokens]:
    """The first of each source, then the second of each, and so on."""
    waiting = deque(sources)
    while waiting:
        source = waiting.popleft()
        if (tokens := next(source, None)) is not None:
            yield tokens
            waiting.append(source)


def _shared_places(original: str, edited: str) -> list[tuple[int, int]]:
    """Where the two texts agree: offsets of paragraph pairs that occur exactly once in each."""
    places, offset = [], 0
    for paragraph, following in pairwise(original.split("\n\n")):
        pair = f"{paragraph}\n\n{following}"
        if original.count(pair) == 1 == edited.count(pair):
            places.append((offset, edited.index(pair)))
        offset += len(paragraph) + 2
    return places


def _revision_excerpts(
    document: HeldOutText, length: int, tokenizer: Tokenizer, specials: Tokens, rng: random.Random
) -> Excerpts:
    """Part of the original, an empty line, and the same part of the edited copy, cut well before its end."""
    original = document.text[: document.original_characters]
    edited = document.text[len(original) + 2 :]
    gap = _encode(tokenizer, "\n\n", specials)
    num_original = math.ceil(length * rng.uniform(0.52, 0.62))
    num_edited = length - num_original - len(gap)
    characters_per_token = len(original) / len(_encode(tokenizer, original, specials))

    def cut(places: list[tuple[int, int]]) -> Iterator[Tokens]:
        rng.shuffle(places)
        for start, edited_start in places:
            # encode twice what is expected to be needed, not the rest of the text
            end = math.ceil(2 * characters_per_token * (length + CONTINUATION_TOKENS))
            first = _encode(tokenizer, original[start : start + end], specials)[:num_original]
            second = _encode(tokenizer, edited[edited_start : edited_start + end], specials)
            if len(first) == num_original and len(second) >= num_edited + CONTINUATION_TOKENS:
                yield first + gap + second[:num_edited]

    disjoint: list[tuple[int, int]] = []
    overlapping: list[tuple[int, int]] = []
    for place in _shared_places(original, edited):
        is_free = not disjoint or place[0] >= disjoint[-1][0] + num_original * characters_per_token
        (disjoint if is_free else overlapping).append(place)
    return cut(disjoint), cut(overlapping)
