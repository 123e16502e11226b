"""A tiny pair that reads text: one token per letter, so that prompts of an exact length are easy to make and to check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import specdec_lab as sd
import tiny
from specdec_lab.workload import Workload


class Letters:
    """Token ids 1 to 60 for characters; 0 stays the end of text."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(c) % 60 for c in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(59 + t) for t in tokens)


@cache
def pair() -> sd.ModelPair:
    """A random target and a draft that agrees with it often: the same weights."""
    return replace(sd.load(tiny.model(), tiny.model()), tokenizer=Letters(), name="tiny")


def loader(**changes: Any) -> Callable[..., sd.ModelPair]:
    """What is injected as `load`: gives the tiny pair for any name but that of a folder."""

    def load(model: Any = "demo", draft: Any = None, **options: Any) -> sd.ModelPair:
        return sd.load(model, draft, **options) if model.startswith("./") else replace(pair(), **changes)

    return load


def random_text(max_new_tokens: int = 200) -> Callable[[sd.Cell], Workload]:
    """Prompts of random tokens for every cell; no tokenizer and no shipped text is involved."""

    def make(cell: sd.Cell) -> Workload:
        rows = tuple(map(tuple, tiny.prompts([cell.length] * cell.batch)))
        return Workload("random", rows, max_new_tokens, stop_at_eos=False)

    return make
