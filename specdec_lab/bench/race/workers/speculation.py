"""Greedy speculative decoding as arithmetic on token lists: which draft tokens stand, and what a text suggests to copy.

Standard library only. Not known here: models, and how tokens are evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST_NGRAM = 3


@dataclass
class Row:
    """One sequence while it grows."""

    id: int
    tokens: list[int]  # prompt and new ones
    end: int  # where it is done

    @property
    def remaining(self) -> int:
        return self.end - len(self.tokens)


@dataclass
class Tally:
    """What the rounds of one decode did, over all rows."""

    rounds: int = 0  # forwards of the target, each over all rows that were not done
    row_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0

    def extra(self) -> dict[str, float]:
        """Counts, and tokens per target forward of a row."""
        return {
            "rounds": self.rounds, "drafted": self.drafted, "accepted": self.accepted,
            "tokens_per_round": self.emitted / max(self.row_rounds, 1),
        }  # fmt: skip

    def settle(self, row: Row, draft: Sequence[int], choices: Sequence[int]) -> int:
        """Append to the row what stands; how many of the draft's tokens that kept.

        choices  what the target says after the row's last token and after each token of the draft
        """
        kept = equal_prefix(draft, choices)
        row.tokens += choices[: kept + 1]
        self.row_rounds += 1
        self.drafted += len(draft)
        self.accepted += kept
        self.emitted += kept + 1
        return kept


def equal_prefix(draft: Sequence[int], choices: Sequence[int]) -> int:
    """How many tokens of the draft the target would have chosen itself, up to the first that it would not."""
    for place, (drafted, chosen) in enumerate(zip(draft, choices, strict=False)):
        if drafted != chosen:
            return place
    return len(draft)


@dataclass
class Places:
    """Where each n-gram of a text last went on: its tokens -> the place after them."""

    of_prompt: dict[tuple[int, ...], int] = field(default_factory=dict)
    of_new: dict[tuple[int, ...], int] = field(default_factory=dict)
    seen: int = 0  # places after which the text has gone on

    def read_prompt(self, tokens: Sequence[int]) -> None:
        """Take in the prompt, once."""
        self._read(tokens, self.of_prompt)

    def rewind(self, prompt_tokens: int) -> None:
        """Forget what was read after the prompt."""
        self.of_new.clear()
        self.seen = prompt_tokens - 1

    def propose(self, tokens: Sequence[int], length: int, shortest: int) -> list[int]:
        """What followed the latest earlier place that ends like `tokens`, the longest n-gram first; nothing where none is."""
        self._read(tokens, self.of_new)
        if length < 1:
            return []
        for size in range(LONGEST_NGRAM, shortest - 1, -1):
            ngram = tuple(tokens[-size:])
            place = self.of_new.get(ngram) or self.of_prompt.get(ngram)
            if place is not None:
                return list(tokens[place : place + length])
        return []

    def _read(self, tokens: Sequence[int], table: dict[tuple[int, ...], int]) -> None:
        for place in range(self.seen + 1, len(tokens)):
            for size in range(1, min(LONGEST_NGRAM, place) + 1):
                table[tuple(tokens[place - size : place])] = place
        self.seen = max(self.seen, len(tokens) - 1)
