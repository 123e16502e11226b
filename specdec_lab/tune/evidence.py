"""What a policy was made from, and whether it still follows from that.

An ordinary policy names the bytes of files as they were; later lines do not matter. That of shards names results, because the
same results lie in another order, with other times and places, wherever they were measured and merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..policy import Policy, canonical
from .assemble import assemble, belongs, states_of
from .db import Measurement, read_file
from .sentinel import KIND as SENTINEL

SHARD = "cells_shard"  # of a policy's header: its evidence is results


def collect(paths: Sequence[Path], header: Mapping[str, Any]) -> tuple[list[Measurement], list[dict[str, Any]]]:
    """The records of these files, and the `evidence` of a policy that is made from them as they are now."""
    contents = {path.name: read_file(path) for path in paths}
    records = [record for c in contents.values() for record in c.measurements]
    if SHARD in header:
        by_file = {name: results(c.measurements, header) for name, c in contents.items()}
        return records, [{"file": name, **found} for name, found in sorted(by_file.items()) if found["records"]]
    return records, [{"file": name, "sha256": c.sha256, "bytes": c.num_bytes} for name, c in contents.items()]


def results(records: Sequence[Measurement], header: Mapping[str, Any]) -> dict[str, Any]:
    """How many results of a tuning are among these records, and their sha256: ids, states and summaries, sorted.

    Without what only minds the machine, of which every process has its own.
    """
    ours = [m for m in records if belongs(m, header) and (m.kind != SENTINEL or not m.design.block)]
    lines = sorted(json.dumps([m.id, m.status, json.loads(m.line()).get("summary")], sort_keys=True) for m in ours)
    return {"records": len(ours), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def verify(path: Path | str, folder: Path | str | None = None) -> tuple[str, ...]:
    """Rebuild a policy file from the evidence that it names, and say what differs; nothing when it is the same bytes.

    folder  that holds the evidence; the policy's own when None
    """
    path = Path(path)
    policy = Policy.load(path)
    problems: list[str] = []
    records: list[Measurement] = []
    for item in policy.header["evidence"]:
        contents = read_file(Path(folder or path.parent) / item["file"], item.get("bytes"))
        records += contents.measurements
        if "records" in item:
            now = results(contents.measurements, policy.header)
            if now["sha256"] != item["sha256"]:
                problems.append(f"{item['file']}: {now['records']} results of this tuning, not the {item['records']} that the "
                                "policy was made from; db merge --out makes it again")  # fmt: skip
        elif contents.sha256 != item["sha256"]:
            problems.append(f"{item['file']}: the first {item.get('bytes')} bytes are not those that the policy was made from")
    rebuilt = assemble(policy.header, policy.rules, states_of(policy), records, allow_forced=True)
    if rebuilt.dumps() != path.read_text(encoding="utf-8"):
        rows = zip(policy.table, rebuilt.table, strict=True)
        changed = [str(old.cell) for old, new in rows if canonical(old.to_dict()) != canonical(new.to_dict())]
        problems.append(f"rebuilding gives other bytes: cells {', '.join(changed) or 'none, but the portfolio'} differ")
    return tuple(problems)
