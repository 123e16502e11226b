"""The key of tuning, and the token and sequence counts that users type."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ParseError


def _count(text: str, what: str) -> int:
    """A token count: 512, 4k or 4K (1024 each)."""
    match = re.fullmatch(r"(\d+)([kK]?)", text)
    if match is None:
        raise ParseError(f"{what} must be a whole number such as 512 or 4k, got {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


def parse_count(text: str) -> int:
    """A positive token or sequence count as typed by a user: `512`, `4k` (= 4096)."""
    value = _count(text.strip(), "a count")
    if value < 1:
        raise ParseError(f"a count must be at least 1, got {text!r}")
    return value


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """The key of tuning: sequences in the batch, tokens of context each. Spelled `8x4096`."""

    batch: int
    length: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"Cell needs a batch and a length of at least 1, got {self.batch}x{self.length}")

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read `8x4096` or `8x4k`."""
        parts = text.strip().lower().split("x")
        if len(parts) != 2:
            raise ParseError(f"cell {text!r} is not of the form BATCHxLENGTH, for example 8x4096 or 8x4k")
        try:
            return cls(_count(parts[0], "the batch"), _count(parts[1], "the length"))
        except ValueError as error:
            raise ParseError(f"cell {text!r}: {error}") from None
