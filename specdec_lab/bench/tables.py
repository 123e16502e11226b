"""Rows of texts, the head first, as a table for a terminal or for a README. Knows nothing of what the texts say."""

from __future__ import annotations

from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def widths(rows: Rows) -> list[int]:
    """Of the widest text of each column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def aligned(rows: Rows, numbers: Collection[int] = ()) -> list[str]:
    """Lines of equal columns; those counted in `numbers`, from 0, are aligned right."""
    columns = list(enumerate(widths(rows)))
    return [
        "  ".join(row[i].rjust(width) if i in numbers else row[i].ljust(width) for i, width in columns).rstrip() for row in rows
    ]


def github(rows: Rows, numbers: Collection[int] = ()) -> list[str]:
    """Lines of a GitHub table, with the same columns aligned right."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    rule = " | ".join("--:" if i in numbers else "---" for i in range(len(rows[0])))
    return [head, f"| {rule} |", *body]
