"""A round's record: measured seconds beside exact bytes and FLOPs, and what a reader must know of them (flags).

Pure functions. Not known here: models' weights, caches, how a round came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..records import SpecConfig, StepRecord
from .batch import Forward
from .calibrate import Ceilings
from .clocks import Lap, Phase
from .models.runner import Runner

BUSY_RATIO, BUSY_SLACK_S = 1.1, 5e-4


@dataclass(slots=True)
class Progress:
    """Where a run stands on the host: turn, tokens emitted in it per row, rounds, seconds."""

    emitted: list[int]
    rounds: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Commit:
    """What a round gave each row: accepted drafts, emitted tokens, whether they were cut; ranks and nodes as in StepRecord."""

    accepted: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    censored: tuple[bool, ...]
    ranks: tuple[tuple[int, ...], ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Counted:
    """Exact bytes and FLOPs of some forwards of one model."""

    kv_read_bytes: int = 0
    kv_write_bytes: int = 0
    weight_bytes: int = 0
    linear_flops: int = 0
    attention_flops: int = 0
    query_tokens: int = 0
    threads: int = 0


def count(runner: Runner, forwards: Sequence[Forward], threads: int) -> Counted:
    """What these forwards read, wrote and computed."""
    if not forwards:
        return Counted()
    shape, tokens = runner.shape, sum(f.rows * f.queries for f in forwards)
    kv = shape.kv_bytes_per_token(runner.kv_dtype.itemsize)
    # a key without its value is half a KV row, and half of attention's FLOPs
    doubled_keys = sum(2 * f.keys + f.scored_keys for f in forwards)
    doubled_pairs = sum(2 * f.pairs + f.scored_pairs for f in forwards)
    return Counted(
        kv * doubled_keys // 2, kv * tokens, len(forwards) * shape.weight_bytes(runner.dtype.itemsize),
        shape.linear_flops(tokens), shape.attention_flops(doubled_pairs) // 2,
        max(f.queries for f in forwards), threads,
    )


@lru_cache(maxsize=512)
def _spelled(config: SpecConfig) -> str:
    """str(config), which walks a tree's nodes: once per configuration, not per round."""
    return str(config)


def step_record(
    kind: str, config: SpecConfig, progress: Progress, lap: Lap, context: tuple[int, ...], drafted: tuple[int, ...],
    commit: Commit, target: Counted, draft: Counted, ceilings: Ceilings,
) -> StepRecord:
    """The record of a round or a prefill."""
    s = lap.seconds
    draft_s = s[Phase.DRAFT_LINEAR] + s[Phase.DRAFT_ATTENTION] + s[Phase.DRAFT_OTHER]
    floor_s = target.kv_read_bytes / ceilings.read_bytes_per_s
    flags = []
    if lap.wall_s > BUSY_RATIO * lap.cpu_s + BUSY_SLACK_S:
        flags.append("busy")
    if s[Phase.ATTENTION] and floor_s > s[Phase.ATTENTION]:
        flags.append("floor-above-measured")
    return StepRecord(
        index=progress.rounds, kind=kind, config=_spelled(config), start_s=progress.seconds, wall_s=lap.wall_s, draft_s=draft_s,
        linear_s=s[Phase.LINEAR], attention_s=s[Phase.ATTENTION], commit_s=s[Phase.COMMIT], accept_s=s[Phase.ACCEPT],
        host_s=s[Phase.HOST], cpu_s=lap.cpu_s, context_tokens=context, drafted=drafted, accepted=commit.accepted,
        tokens=commit.tokens, censored=commit.censored, ranks=commit.ranks, nodes=commit.nodes,
        draft_linear_s=s[Phase.DRAFT_LINEAR], draft_attention_s=s[Phase.DRAFT_ATTENTION],
        draft_kv_floor_s=draft.kv_read_bytes / ceilings.read_bytes_per_s, kv_floor_s=floor_s,
        kv_read_bytes=target.kv_read_bytes, draft_kv_read_bytes=draft.kv_read_bytes,
        kv_write_bytes=target.kv_write_bytes + draft.kv_write_bytes, weight_bytes=target.weight_bytes + draft.weight_bytes,
        linear_flops=target.linear_flops + draft.linear_flops, attention_flops=target.attention_flops + draft.attention_flops,
        query_tokens=target.query_tokens, draft_threads=draft.threads, verify_threads=target.threads, flags=tuple(flags),
    )
