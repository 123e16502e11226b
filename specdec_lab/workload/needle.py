"""The retrieval workload: prompts whose continuation stands far back in them, in the language of the needle model.

Not known here: the model, engines, views.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Unpack

from ..records import Cell
from . import needle_text as language
from .prompts import Sampling, Tokens, Workload

NEEDLE = "needle"
SHORTEST_PROMPT = 512
ANSWER_TOKENS = language.VALUE_TOKENS[1]


def needle_prompts(cell: Cell, *, max_new_tokens: int = ANSWER_TOKENS, **sampling: Unpack[Sampling]) -> Workload:
    """Prompts of exactly `cell.length` tokens; each ends with a question about one of the needles in its first half.

    Needles lie at random depths, so at least half of the prompt is between a question and its answer. Every value that is
    asked for has ANSWER_TOKENS tokens. sampling  seed (0) also decides the texts; stop_at_eos is False unless given
    raises ValueError for prompts too short to keep needles out of any window worth having
    """
    if cell.length < SHORTEST_PROMPT:
        raise ValueError(f"needle prompts need at least {SHORTEST_PROMPT} tokens to hide {language.NUM_NEEDLES} needles, got "
                         f"{cell.length}; use --cell 1x{SHORTEST_PROMPT} or longer")
    seed = sampling.get("seed", 0)
    prompts = tuple(_prompt(cell.length, random.Random(f"needle {seed} {row}")) for row in range(cell.batch))
    sampling.setdefault("stop_at_eos", False)
    return Workload(NEEDLE, prompts, max_new_tokens, labels=("synthetic text",), **sampling)


def _prompt(length: int, rng: random.Random) -> Tokens:
    needles = list(language.draw_needles(rng))
    asked = rng.randrange(len(needles))
    needles[asked] = language.with_longest_value(needles, asked, rng)
    half = length // 2
    first = language.scatter([n.text for n in needles], half, rng)
    question = needles[asked].question
    return (*first, *language.filler(length - half - len(question), rng), *question)


def answer(prompt: Sequence[int]) -> Tokens:
    """The value that a needle prompt asks for, found in the prompt itself.

    raises ValueError for a prompt that does not end with the marker and the key of a needle in it
    """
    tokens = tuple(prompt)
    for start in range(len(tokens) - 2):
        if tokens[start : start + 2] == tokens[-2:] and tokens[start] == language.MARK:
            end = tokens.index(language.CLOSE, start)
            return tokens[start + 2 : end]
    raise ValueError(f"this prompt ends with {list(tokens[-2:])}, which marks no needle in it; retrieval is scored on prompts "
                     f"of the {NEEDLE} workload only")


def retrieved(workload: Workload, tokens: Iterable[Sequence[int]]) -> list[float]:
    """Per row, the share of the value that was said, position by position, in the new tokens of a run."""
    shares = []
    for prompt, said in zip(workload.prompts, tokens, strict=True):
        value = answer(prompt)
        shares.append(sum(a == b for a, b in zip(value, said, strict=False)) / len(value))
    return shares
