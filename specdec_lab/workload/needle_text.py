"""The language of the needle model: easy filler, and needles to be found again far away.

A needle is `MARK key value... CLOSE`, its symbols drawn without repetition over one text, so that each symbol has one
successor there. A question names every fourth symbol of a value, as questions share words with what they ask about, and
ends with `MARK key`. Filler is a Markov chain of first order. Not known here: prompts, cells, the model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

END_OF_TEXT, MARK, CLOSE, ASK = 0, 1, 2, 3
FILLER = range(4, 32)
SYMBOLS = range(32, 256)
VOCABULARY = 256
NUM_NEEDLES = 4
VALUE_TOKENS = (32, 48)  # shortest and longest value
LONGEST_NEEDLE = VALUE_TOKENS[1] + 3
NAMED_EVERY = 4  # a question names the fourth symbol of a value, the eighth, and so on
SUCCESSOR_SHARES = (0.75, 0.15, 0.10)

Tokens = tuple[int, ...]


def _successors() -> dict[int, Tokens]:
    """Three successors of every filler token, the likeliest first: part of the language, so its seed is fixed."""
    rng = random.Random("successors")
    return {token: tuple(rng.sample(FILLER, len(SUCCESSOR_SHARES))) for token in FILLER}


SUCCESSORS = _successors()


@dataclass(frozen=True, slots=True)
class Needle:
    """A key and the value that must follow it."""

    key: int
    value: Tokens

    @property
    def text(self) -> Tokens:
        """The needle as it stands in a text."""
        return (MARK, self.key, *self.value, CLOSE)

    @property
    def named(self) -> Tokens:
        """What a question says before the key: symbols of the value, each after ASK."""
        return tuple(token for symbol in self.value[NAMED_EVERY - 1 :: NAMED_EVERY] for token in (ASK, symbol))

    @property
    def question(self) -> Tokens:
        """The end of a prompt that the value must follow."""
        return (*self.named, MARK, self.key)


def draw_needles(rng: random.Random, count: int = NUM_NEEDLES) -> tuple[Needle, ...]:
    """`count` needles that share no symbol."""
    symbols = rng.sample(SYMBOLS, len(SYMBOLS))
    needles = []
    for _ in range(count):
        length = rng.randint(*VALUE_TOKENS)
        needles.append(Needle(symbols.pop(), tuple(symbols.pop() for _ in range(length))))
    return tuple(needles)


def with_longest_value(needles: Sequence[Needle], which: int, rng: random.Random) -> Needle:
    """That needle, its value made as long as values get with symbols that no needle uses."""
    needle = needles[which]
    used = {symbol for n in needles for symbol in (n.key, *n.value)}
    free = [symbol for symbol in SYMBOLS if symbol not in used]
    return Needle(needle.key, (*needle.value, *rng.sample(free, VALUE_TOKENS[1] - len(needle.value))))


def filler(count: int, rng: random.Random) -> list[int]:
    """`count` tokens of the chain, from a random start."""
    token = rng.choice(FILLER)
    tokens = []
    for _ in range(count):
        tokens.append(token)
        token = rng.choices(SUCCESSORS[token], SUCCESSOR_SHARES)[0]
    return tokens


def scatter(pieces: list[Tokens], length: int, rng: random.Random) -> list[int]:
    """`length` tokens that hold the pieces in their order at random depths, with filler between them."""
    room = length - sum(len(p) for p in pieces)
    if room < 0:
        raise ValueError(f"{len(pieces)} pieces of {length - room} tokens do not fit in {length} tokens; use a longer text")
    cuts = sorted(rng.randint(0, room) for _ in pieces)
    tokens: list[int] = []
    for start, end, piece in zip([0, *cuts], [*cuts, room], [*pieces, ()], strict=True):
        tokens += filler(end - start, rng)
        tokens += piece
    return tokens
