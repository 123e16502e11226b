"""Retrieval: keys and values hidden far back in held-out prose, and a question whose right answer is a long copy of one.

A draft that sees a window or a summary of the context cannot see the value, so this is where such drafts show what they
gave up. Whether the model itself retrieves is a question of its own: `retrieved_share` of what it made against the answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Unpack, cast

from ..records import Cell
from .held_out import encode_part, held_out_text, read_held_out
from .prompts import Sampling, Tokenizer, Tokens, Workload

NEEDLE = "needle"
KEY_TOKENS = 4
MOST_NEEDLES = 4
# where needles may lie, as shares of the context: beyond any sink, and several windows away from the question
SHALLOWEST, DEEPEST = 0.05, 0.7
POOL_CHARACTERS = 20_000  # of every held-out document, whose tokens may become keys and values


def needles(
    cell: Cell, tokenizer: Tokenizer, *, max_new_tokens: int = 64, num_needles: int | None = None,
    depths: Sequence[float] | None = None, **sampling: Unpack[Sampling],
) -> Workload:
    """Prose of exactly `cell.length` tokens that hides needles and ends with the key of one; its value is the answer.

    A needle is a key of 4 and a value of `max_new_tokens` tokens, all different and found nowhere else in the prompt: what
    follows a key or a part of a value is never in doubt. Which needle is asked, and where they lie, is drawn with the seed.

    num_needles  as many as half of the prompt holds, at most 4, when None
    depths       shares of the context at which the needles begin, one per needle, in 0.05..0.7; drawn when None
    """
    rng = random.Random(sampling.get("seed", 0))
    size = KEY_TOKENS + max_new_tokens
    count = num_needles or max(1, min(MOST_NEEDLES, (cell.length - KEY_TOKENS) // (2 * size)))
    filler = cell.length - count * size - KEY_TOKENS
    _check(cell, filler, count * size, count, depths)
    prose = held_out_text("prose", Cell(cell.batch, filler), tokenizer, **sampling)
    prompts, answers = [], []
    for text in prose.prompts:
        found = _draw_needles(text, tokenizer, count, max_new_tokens, rng)
        places = depths or [rng.uniform(SHALLOWEST, DEEPEST) for _ in found]
        asked = rng.choice(found)
        prompts.append(_hide(text, found, places) + asked[:KEY_TOKENS])
        answers.append(asked[KEY_TOKENS:])
    sampling.setdefault("stop_at_eos", False)
    return Workload(NEEDLE, tuple(prompts), max_new_tokens, answers=tuple(answers), labels=prose.labels, **sampling)


def asked_later(workload: Workload) -> Workload:
    """A conversation from a needle workload: the first turn continues its text, the question comes in the second.

    What was tuned on ordinary text meets retrieval in the middle of a run. The answers are those of the second turn.
    """
    if not workload.answers or workload.turns:
        raise ValueError(f"workload {workload.name!r} asks for no needle in its only turn")
    texts = tuple(prompt[:-KEY_TOKENS] for prompt in workload.prompts)
    keys = tuple(prompt[-KEY_TOKENS:] for prompt in workload.prompts)
    return replace(workload, prompts=texts, turns=(keys,))


def retrieved_share(workload: Workload, made: Sequence[Sequence[int]]) -> float:
    """Share of the answers' tokens that stand where they belong in `made`, the new tokens of every row."""
    if not workload.answers:
        raise ValueError(f"workload {workload.name!r} knows no answers; only needle workloads do")
    pairs = [
        (place < len(row) and row[place] == token)
        for answer, row in zip(workload.answers, made, strict=True) for place, token in enumerate(answer)
    ]
    return sum(pairs) / len(pairs)


def _check(cell: Cell, filler: int, hidden: int, count: int, depths: Sequence[float] | None) -> None:
    if filler < hidden:
        raise ValueError(
            f"a needle prompt of {cell.length} tokens cannot hide {hidden} tokens of needles: half of it must be ordinary "
            f"text. Ask for longer prompts or fewer new tokens."
        )
    if depths is not None and (len(depths) != count or not all(SHALLOWEST <= d <= DEEPEST for d in depths)):
        raise ValueError(f"depths must be {count} shares in {SHALLOWEST}..{DEEPEST}, one per needle, got {list(depths)}")


@lru_cache(maxsize=4)
def _known_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that ordinary text is made of, ascending: special ones, which a model never copies, are not among them."""
    specials = tuple(tokenizer.encode(""))
    texts = (d.text[:POOL_CHARACTERS] for d in read_held_out() if d.source != "revision")
    return tuple(sorted({t for text in texts for t in encode_part(tokenizer, text, specials)} - set(specials)))


def _draw_needles(text: Tokens, tokenizer: Tokenizer, count: int, value: int, rng: random.Random) -> list[Tokens]:
    used, hashable = set(text), cast(Any, tokenizer)
    free = [t for t in _known_tokens(hashable) if t not in used]
    size = KEY_TOKENS + value
    if len(free) < count * size:
        raise ValueError(
            f"{count} needles of {size} tokens need {count * size} tokens that the text around them does not use; this "
            f"tokenizer has {len(free)}. Use fewer needles or fewer new tokens."
        )
    drawn = rng.sample(free, count * size)
    return [tuple(drawn[i * size : (i + 1) * size]) for i in range(count)]


def _hide(text: Tokens, hidden: Sequence[Tokens], depths: Sequence[float]) -> Tokens:
    """The text with every needle put in at its share of the whole."""
    whole: Tokens = ()
    done = 0
    for depth, needle in sorted(zip(depths, hidden, strict=True)):
        cut = max(done, min(len(text), round(depth * len(text))))
        whole += text[done:cut] + needle
        done = cut
    return whole + text[done:]
