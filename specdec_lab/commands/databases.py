"""`db`: which database, what it holds, joining databases and the policies of shards, verifying a policy."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import machine
from ..bench.tables import aligned
from .files import writable_file, writable_folder
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import OK, RED, Outcome, Words
from .policies import policy_words

if TYPE_CHECKING:
    from ..policy import Policy
    from ..tune import Merged

RECORDS, POLICY = "tuning_db", "policy.json"  # in the run folder of a shard


def db(lab: Lab, args: Namespace) -> Outcome:
    """One action on tuning databases; no engine is loaded."""
    if args.action != "merge" and (args.into or args.out):
        raise UserMistake(f"--into and --out belong to db merge, not to db {args.action}")
    if args.action in ("which", "ls") and args.sources:
        raise UserMistake(f"db {args.action} takes no paths, got {' '.join(args.sources)}; name a database with --db")
    with asked():
        return {"which": _which, "ls": _ls, "merge": _merge, "verify": _verify}[args.action](args)


def _which(args: Namespace) -> Outcome:
    from ..tune import describe, find_database

    words, place = describe(args.db), find_database(args.db)
    return Outcome(Words(words), words, {"path": str(place.path), "why": place.why})


def _ls(args: Namespace) -> Outcome:
    from ..tune import find_database, read_file

    root = find_database(args.db).path
    rows: list[tuple[str, ...]] = [("file", "records", "ok", "cells", "workloads", "skipped")]
    data: list[dict[str, object]] = []
    for path in sorted(root.glob("*/*.jsonl")):
        found = read_file(path)
        if not found.measurements:
            continue
        good = sum(m.status == "ok" for m in found.measurements)
        cells, loads = {str(m.cell) for m in found.measurements}, sorted({m.workload for m in found.measurements})
        skipped = ", ".join(f"{number} {why}" for why, number in found.skipped.items())
        counts = (f"{len(found.measurements):,}", f"{good:,}", str(len(cells)))
        rows.append((str(path.relative_to(root)), *counts, ", ".join(loads), skipped))
        data.append({"file": str(path), "records": len(found.measurements), "ok": good, "cells": len(cells), "workloads": loads,
                     "skipped": dict(found.skipped)})  # fmt: skip
    words = "\n".join(aligned(rows)) if data else f"no measurements in {root}; tune makes some"
    return Outcome(Words(words), words, data)


def _merge(args: Namespace) -> Outcome:
    """Records first; then the policy of the shards, if it was asked for."""
    from ..tune import find_database, merge

    if not args.sources:
        raise UserMistake("db merge needs databases or run folders of shards, for example: db merge other/tuning_db")
    out = writable_file(args.out, ".json") if args.out else None
    sources = [Path(source) for source in args.sources]
    records = [place for source in sources if (place := _records(source)) is not None]
    into = writable_folder(args.into or find_database(args.db).path)
    done = merge(*records, into=into)
    words, data = [_merged_words(done, into)], {**_merged_data(done), "into": str(into)}
    if out is not None:
        policy = _joined(sources, into)
        policy.save(out)
        words += ["", policy_words(policy), "", f"policy: {out}", *_next_pass(policy, into)]
        data |= {"policy": policy.to_dict(), "paths": {"policy": str(out)}}
    return Outcome(Words("\n".join(words)), "\n".join(words), data, RED if done.conflicts else OK)


def _records(source: Path) -> Path | None:
    """The database of a source; None for a run folder whose records are elsewhere."""
    if not source.is_dir():
        raise UserMistake(f"{source} is no folder; db merge takes databases and run folders of shards")
    if (source / RECORDS).is_dir():
        return source / RECORDS
    if next(source.glob("*/*.jsonl"), None) is not None:
        return source
    if (source / POLICY).exists():
        return None
    raise UserMistake(f"{source} holds neither measurements nor the policy of a shard")


def _joined(sources: list[Path], into: Path) -> Policy:
    from ..policy import Policy
    from ..tune import join
    from ..tune.db import device_folder

    policies = [Policy.load(source / POLICY) for source in sources if (source / POLICY).exists()]
    device = policies[0].header["device"] if policies else ""
    return join(policies, device_folder(into, device), machine.now())


def _next_pass(policy: Policy, into: Path) -> list[str]:
    """What remains to be measured: a winner of one shard in the cells of the others."""
    others = set(policy.portfolio) - {"off"}
    lacking = [str(row.cell) for row in policy.table if row.is_decided and others - set(row.estimates)]
    if not lacking:
        return []
    return [
        f"{len(lacking)} cells lack an estimate of a winner of another shard, so lookup between cells says off needlessly: "
        f"run the shards once more with --db {into}, which measures these, then merge again"
    ]


def _merged_words(done: Merged, into: Path) -> str:
    words = f"{done.added:,} measurements added to {into}, {done.known:,} were there"
    if done.skipped:
        words += f"; lines left out: {', '.join(f'{number} {why}' for why, number in done.skipped.items())}"
    if done.conflicts:
        words += (
            f"\n{len(done.conflicts):,} ids are held twice, with other content ({', '.join(done.conflicts[:3])}, ...); those "
            "that were there stayed. Two tunings of one name were merged: give one another --run, or merge into an empty folder"
        )
    return words


def _merged_data(done: Merged) -> dict[str, object]:
    return {"added": done.added, "known": done.known, "conflicts": list(done.conflicts), "skipped": dict(done.skipped)}


def _verify(args: Namespace) -> Outcome:
    """Rebuild policies from their evidence: in --db, else where the policy lies, else in the database in use."""
    from ..policy import Policy
    from ..tune import find_database, verify
    from ..tune.db import device_folder

    if len(args.sources) != 1:
        raise UserMistake("db verify needs one policy, for example: db verify policy.json")
    path = Path(args.sources[0])
    policy = Policy.load(path)
    beside = all((path.parent / item["file"]).exists() for item in policy.header["evidence"])
    folder = path.parent if beside and not args.db else device_folder(find_database(args.db).path, policy.header["device"])
    problems = verify(path, folder)
    words = "\n".join(problems) or f"{path} is what its evidence in {folder} gives, byte for byte"
    return Outcome(Words(words), words, {"problems": list(problems), "folder": str(folder)}, RED if problems else OK)
