"""Which tuning database is used, and how two of them become one.

Search order: the path given by the user, `./tuning_db` of the project, the user's folder, the copy shipped with the
package. New lines go to the first of these that exists, never to the shipped copy.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .db import Measurement, append_lines, fingerprint_line, fingerprint_mark, read_file

SHIPPED = Path(__file__).resolve().parent.parent / "_tuning_db"


@dataclass(frozen=True, slots=True)
class Location:
    """A database folder and why it was chosen."""

    path: Path
    why: str
    writable: bool = True


def user_folder() -> Path:
    """The user's own database."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "specdec_lab" / "tuning_db"


def locations(explicit: str | os.PathLike[str] | None = None, project: Path | None = None) -> tuple[Location, ...]:
    """All places that are searched, in order; the first that holds an answer answers."""
    if explicit is not None:
        return (Location(Path(explicit), "given by --db"),)
    return (
        Location((project or Path.cwd()) / "tuning_db", "the project's folder"),
        Location(user_folder(), "the user's folder"),
        Location(SHIPPED, "shipped with the package, read only", writable=False),
    )


def find_database(explicit: str | os.PathLike[str] | None = None, project: Path | None = None) -> Location:
    """Where new measurements go: the first writable place that exists, else the first, which will be made."""
    places = [place for place in locations(explicit, project) if place.writable]
    return next((place for place in places if place.path.is_dir()), places[0])


def describe(explicit: str | os.PathLike[str] | None = None, project: Path | None = None) -> str:
    """The search order in words, with what exists and where new lines go."""
    chosen = find_database(explicit, project)
    lines = []
    for place in locations(explicit, project):
        state = "exists" if place.path.is_dir() else "absent"
        lines.append(f"{place.path} ({place.why}): {state}" + (", new lines go here" if place == chosen else ""))
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did. `conflicts` are ids that both sides hold with different content; ours stayed."""

    added: int
    known: int
    conflicts: tuple[str, ...]
    skipped: Mapping[str, int]


def merge(*sources: Path, into: Path) -> Merged:
    """Add to the database `into` every measurement of the `sources` whose id it does not hold: set union by id.

    Nothing is rewritten, lines that are not ours are counted and not copied, and merging again adds nothing. What is new is
    written in one order, whatever the order of the sources and of their lines: equal measurements, equal files.
    """
    added = known = 0
    conflicts: list[str] = []
    skipped: Counter[str] = Counter()
    for name in sorted({path.relative_to(source) for source in sources for path in source.glob("*/*.jsonl")}):
        target = into / name
        have = {m.id: m for m in read_file(target).measurements} if target.exists() else {}
        new: dict[str, Measurement] = {}
        marks: dict[str, str] = {}
        for path in (source / name for source in sources if (source / name).exists()):
            theirs = read_file(path)
            skipped.update(theirs.skipped)
            marks |= {fingerprint_mark(fp): fingerprint_line(data) for fp, data in theirs.fingerprints.items()}
            for m in theirs.measurements:
                ours = have.get(m.id) or new.setdefault(m.id, m)
                known += ours is not m
                conflicts += [m.id] if ours.line() != m.line() else []
        added += len(new)
        if new:
            append_lines(target, [m.line() for m in sorted(new.values(), key=_place)], dict(sorted(marks.items())))
    return Merged(added, known, tuple(conflicts), dict(skipped))


def _place(measurement: Measurement) -> tuple[object, ...]:
    """Where a line belongs among those that are written with it."""
    return measurement.cell, measurement.kind, measurement.config, measurement.design.block, measurement.id
