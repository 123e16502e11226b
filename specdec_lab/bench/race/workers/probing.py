"""A short timed trial, by which a worker chooses among the settings of its engine on the prompts at hand."""

from __future__ import annotations

from collections.abc import Callable

TOKENS, RUNS, ENOUGH_S = 48, 3, 2.0


def seconds_per_step(decode_s: Callable[[int], float], new_tokens: int) -> float:
    """The best of a few short decodes, for each token of a row; fewer decodes where they are long.

    decode_s  seconds of decoding so many tokens of every row
    """
    tokens = min(new_tokens, TOKENS)
    spent: list[float] = []
    while len(spent) < RUNS and sum(spent) < ENOUGH_S:
        spent.append(decode_s(tokens))
    return min(spent) / tokens
