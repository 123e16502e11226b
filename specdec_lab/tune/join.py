"""The policy of a whole tuning from the policies of its shards and their merged records; a pure function of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..policy import Policy, canonical
from .assemble import assemble, labels_of, states_of
from .evidence import SHARD, collect
from .shard import CellShard

OWN = ("created", "labels", "evidence", "workers", SHARD)  # what shards of one tuning may say differently


class ShardsDiffer(ValueError):
    """Policies that are not the shards of one tuning, each once."""


def join(policies: Sequence[Policy], folder: Path, now: str) -> Policy:
    """One policy of all cells, byte for byte that of one process with the same results.

    policies  of every shard, or one of all shards, to be made again from more records
    folder    of the device in the merged database
    now       UTC, ISO 8601: when it is made
    """
    header = dict(_same_header(policies))
    count = _check_complete(policies)
    names = sorted({item["file"] for policy in policies for item in policy.header["evidence"]})
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ShardsDiffer(f"{folder} lacks {', '.join(missing)}, which the shards were made from: merge their records first")
    states = {cell: state for policy in policies for cell, state in states_of(policy).items()}
    header |= {"created": now, SHARD: str(CellShard(0, count))}
    workers = sorted({name for policy in policies for name in policy.header.get("workers", ())})
    header |= {"workers": workers} if workers else {}
    records, header["evidence"] = collect([folder / name for name in names], header)
    interrupted = {label for policy in policies for label in policy.header["labels"] if label == "interrupted"}
    header["labels"] = labels_of(header, states, records, interrupted)
    return assemble(header, policies[0].rules, states, records, allow_forced=True)


def _same_header(policies: Sequence[Policy]) -> Mapping[str, Any]:
    """What all of them say of the tuning; ShardsDiffer names what they do not agree on."""
    if not policies:
        raise ShardsDiffer("no policy of a shard was given; each shard's run folder holds its policy.json")
    headers = [{name: value for name, value in policy.header.items() if name not in OWN} for policy in policies]
    names = dict.fromkeys(name for header in headers for name in header)
    differing = [name for name in names if len({canonical({"": header.get(name)}) for header in headers}) > 1]
    if differing:
        raise ShardsDiffer(f"these are not shards of one tuning: they differ in {', '.join(differing)}")
    return headers[0]


def _check_complete(policies: Sequence[Policy]) -> int:
    """The number of shards."""
    found = [str(policy.header.get(SHARD, "")) for policy in policies]
    if "" in found:
        raise ShardsDiffer("a policy of a whole tuning is complete already; only those of tune --cells-shard i/n are joined")
    shards = [CellShard.parse(text) for text in found]
    count = shards[0].count
    if any(shard.count != count for shard in shards):
        raise ShardsDiffer(f"these are shards of different numbers: {', '.join(found)}")
    if len(shards) == 1 and shards[0].is_whole:
        return count
    have = [shard.index for shard in shards]
    if twice := sorted({index for index in have if have.count(index) > 1}):
        raise ShardsDiffer(f"shard {', '.join(f'{i}/{count}' for i in twice)} was given more than once")
    if missing := [f"{i}/{count}" for i in range(1, count + 1) if i not in have]:
        raise ShardsDiffer(f"shard {', '.join(missing)} is missing: run it, then join again")
    return count
