"""What a policy at work did during a run, and why: when it fell back, and when it tried a draft again.

Data first, words and HTML from it. Knows records only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from ..records import Run

MAX_NOTES = 40


@dataclass(frozen=True, slots=True)
class Note:
    """One change of mind, before the round of this index among the rounds of its run."""

    cell: str
    round: int
    words: str

    def __str__(self) -> str:
        return f"{self.cell}, round {self.round:,}: {self.words}"


def policy_notes(runs: Iterable[Run]) -> tuple[Note, ...]:
    """Every note of the runs, in order."""
    return tuple(
        Note(str(run.header.cell), index, step.note) for run in runs for index, step in enumerate(run.rounds) if step.note
    )


def notes_html(notes: tuple[Note, ...]) -> str:
    """A list without style sheets; empty for no notes."""
    if not notes:
        return ""
    items = "".join(f"<li>{escape(str(note))}</li>" for note in notes[:MAX_NOTES])
    more = f"<li>and {len(notes) - MAX_NOTES} more</li>" if len(notes) > MAX_NOTES else ""
    return f"<p><b>What the policy did</b></p><ul>{items}{more}</ul>"


def notes_text(notes: tuple[Note, ...]) -> str:
    """The same as lines; empty for no notes."""
    lines = [f"  {note}" for note in notes[:MAX_NOTES]]
    more = [f"  and {len(notes) - MAX_NOTES} more"] if len(notes) > MAX_NOTES else []
    return "\n".join(["what the policy did:", *lines, *more]) if lines else ""
