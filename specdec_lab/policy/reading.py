"""Read plain JSON data field by field, and say exactly where it is not what it should be.

Knows the standard library only. The same rules as schema.json, written so that a server needs no schema library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import ParseError, SpecConfig


class PolicyError(ValueError):
    """A policy that cannot be used: where (file and field), what is wrong, why, and what to do next."""

    def __init__(self, where: str, what: str, next_step: str, path: Path | None = None) -> None:
        self.where, self.what, self.next_step, self.path = where, what, next_step, path
        place = ", ".join(str(part) for part in (path, where) if part)
        super().__init__(f"policy {place}: {what}. {next_step}" if place else f"policy: {what}. {next_step}")

    def in_file(self, path: Path) -> PolicyError:
        """The same error, naming the file."""
        return PolicyError(self.where, self.what, self.next_step, path)


NEXT = "Write it again with `specdec-lab tune`, or correct this field"


def wrong(where: str, what: str) -> PolicyError:
    """The error of a field that breaks the schema."""
    return PolicyError(where, what, NEXT)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise wrong(where, f"must be an object, got {value!r}")
    return value


def array(value: Any, where: str) -> Sequence[Any]:
    """A JSON array."""
    if not isinstance(value, list | tuple):
        raise wrong(where, f"must be an array, got {value!r}")
    return value


def text(value: Any, where: str, pattern: str = r"(?s).*") -> str:
    """A string that matches `pattern` as a whole."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise wrong(where, f"must be a string{'' if pattern == '(?s).*' else f' like {pattern}'}, got {value!r}")
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    """An array of strings."""
    return tuple(text(item, f"{where}[{i}]") for i, item in enumerate(array(value, where)))


def one_of(value: Any, where: str, allowed: Collection[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise wrong(where, f"must be one of {', '.join(allowed)}, got {value!r}")
    return value


def number(value: Any, where: str, least: float = -math.inf) -> float:
    """A finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise wrong(where, f"must be a finite number{'' if least == -math.inf else f' >= {least:g}'}, got {value!r}")
    return float(value)


def positive(value: Any, where: str) -> float:
    """A number above 0."""
    if number(value, where) <= 0:
        raise wrong(where, f"must be above 0, got {value!r}")
    return float(value)


def whole(value: Any, where: str, least: int) -> int:
    """A whole number of at least `least`."""
    if number(value, where, least) != int(value):
        raise wrong(where, f"must be a whole number, got {value!r}")
    return int(value)


def interval(value: Any, where: str) -> tuple[float, float]:
    """Two numbers, the lower one first."""
    ends = [number(end, f"{where}[{i}]") for i, end in enumerate(array(value, where))]
    if len(ends) != 2 or ends[0] > ends[1]:
        raise wrong(where, f"must be [low, high], got {value!r}")
    return ends[0], ends[1]


def config(value: Any, where: str) -> str:
    """The canonical spelling of a configuration; no aliases, so that equal configurations are equal texts."""
    spelling = text(value, where)
    try:
        canonical = str(SpecConfig.parse(spelling))
    except ParseError as error:
        raise wrong(where, str(error)) from None
    if canonical != spelling:
        raise wrong(where, f"must be spelled {canonical!r}, got {spelling!r}")
    return spelling


def only(data: Mapping[str, Any], where: str, required: Collection[str], optional: Collection[str] = ()) -> None:
    """That `data` has all `required` keys and no others but `optional` ones."""
    need(data, where, required)
    if unknown := sorted(data.keys() - {*required, *optional}):
        raise wrong(where, f"has keys that this version does not know: {', '.join(unknown)}")


def need(data: Mapping[str, Any], where: str, required: Collection[str]) -> None:
    """That `data` has all `required` keys."""
    if missing := [key for key in required if key not in data]:
        raise wrong(where, f"lacks {', '.join(missing)}")
