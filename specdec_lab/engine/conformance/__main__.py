"""`python -m specdec_lab.engine.conformance [NAME ...]`: check back ends of ours by name, or others as package.module:Class."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ..attention import AttentionBackend
from ..backends import BACKENDS
from .judging import check
from .report import NOTHING_RAN, RED, Report

EXIT_RED, EXIT_MISTAKE = 1, 2


def main(names: Sequence[str], say: Callable[[str], None] = print) -> int:
    """Print the report of every back end named (default: all of ours); 0 unless one is red, or was named and ran nothing."""
    reports: list[Report] = []
    for name in names or BACKENDS:
        try:
            backend = find(name)
        except ValueError as mistake:
            say(str(mistake))
            return EXIT_MISTAKE
        reports.append(check(backend))
        say(str(reports[-1]))
    bad = (RED, NOTHING_RAN) if names else (RED,)
    return EXIT_RED if any(report.verdict in bad for report in reports) else 0


def find(name: str) -> AttentionBackend:
    """A back end of ours, or a new `package.module:Class`."""
    if name in BACKENDS:
        return BACKENDS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"there is no back end {name!r}; known: {', '.join(BACKENDS)}. Name others as package.module:Class")
    try:
        made: AttentionBackend = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from None
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
