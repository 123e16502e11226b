"""Shipped held-out text as prompts of an exact length: the part of the demo corpus that training never saw.

Prose (the Python manual), code (its standard library), revisions (a text followed by an edited copy of itself) and
conversations that grow turn by turn. Not known here: models, engines, views.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Unpack

from ..records import Cell
from .prompts import Sampling, Tokenizer, Tokens, Workload, as_rows

HELD_OUT_KINDS = ("prose", "code", "revision", "conversation")
HELD_OUT = Path(__file__).parents[1] / "demo" / "held_out.jsonl.gz"
CONTINUATION_TOKENS = 64  # of its own document follow every held-out prompt, so that a true continuation exists
OVERLAP_STRIDE = 64  # tokens between the starts of overlapping prompts


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
    if kind not in HELD_OUT_KINDS:
        raise ValueError(f"kind of held-out text must be one of {', '.join(HELD_OUT_KINDS)}, got {kind!r}")
    num_turns = follow_ups if kind == "conversation" else 0
    span = cell.length + num_turns * (CONTINUATION_TOKENS + follow_up_tokens)
    rows, labels = _drawas_rows(kind, span, cell.batch, tokenizer, random.Random(sampling.get("seed", 0)))
    turns = []
    for turn in range(num_turns):
        # the document's own text stands where the reply will be; the follow-up is what came after it
        start = cell.length + turn * (CONTINUATION_TOKENS + follow_up_tokens) + CONTINUATION_TOKENS
        turns.append(as_rows(row[start : start + follow_up_tokens] for row in rows))
    prompts = as_rows(row[: cell.length] for row in rows)
    sampling.setdefault("stop_at_eos", False)
    return Workload(kind, prompts, max_new_tokens, turns=tuple(turns), labels=labels, **sampling)


Excerpts = tuple[Iterator[Tokens], Iterator[Tokens]]  # of one document: disjoint ones, then ones that overlap them


def _drawas_rows(
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
