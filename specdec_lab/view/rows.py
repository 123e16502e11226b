"""What a picture needs of a step: one row of numbers, its packing into bytes, and how rows are merged to save room.

Knows records only. The column order is the wire format of the live view; the front end reads it from the same list.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

from .. import records
from ..records import StepRecord

COLUMNS = (
    "step",  # index of the first round that the row stands for, counted over the whole view
    "count",  # rounds that the row stands for
    "segment",
    "draft_ms",
    "linear_ms",
    "attention_ms",
    "commit_ms",
    "accept_ms",
    "host_ms",
    "kv_floor_ms",
    "context_tokens",  # mean over rows of the batch that are still alive
    "tokens_per_row",  # emitted in the round, mean over rows that are still alive
    "flags",
)
STEP, COUNT, SEGMENT = range(3)
FIRST_PHASE, KV_FLOOR, CONTEXT, TOKENS, FLAGS = 3, 9, 10, 11, 12

FLOOR_ABOVE_MEASURED = 1
BUSY = 2

Row = tuple[float, ...]


def row_of(step: StepRecord, index: int, segment: int) -> Row:
    """The numbers of one round, times in ms."""
    alive = [row for row, tokens in enumerate(step.tokens) if tokens]
    rows = len(alive) or 1
    phases = [getattr(step, name) * 1e3 for name in records.PHASES]
    context = sum(step.context_tokens[row] for row in alive) / rows
    return (index, 1, segment, *phases, step.kv_floor_s * 1e3, context, step.num_emitted / rows, _flags(step))


def _flags(step: StepRecord) -> int:
    above = step.kv_floor_s > step.attention_s or "floor-above-measured" in step.flags
    return (FLOOR_ABOVE_MEASURED if above else 0) | (BUSY if "busy" in step.flags else 0)


def merge(first: Row, second: Row) -> Row:
    """One row that stands for both: means weighted by the number of rounds, so that sums over rounds are kept."""
    count = first[COUNT] + second[COUNT]
    a, b = first[COUNT] / count, second[COUNT] / count
    means = (a * x + b * y for x, y in zip(first[FIRST_PHASE:FLAGS], second[FIRST_PHASE:FLAGS], strict=True))
    return (first[STEP], count, first[SEGMENT], *means, int(first[FLAGS]) | int(second[FLAGS]))


def halve(rows: Iterable[Row]) -> list[Row]:
    """Neighbours of one segment merged in pairs; about half as many rows."""
    merged: list[Row] = []
    is_pair = False
    for row in rows:
        if merged and not is_pair and merged[-1][SEGMENT] == row[SEGMENT]:
            merged[-1] = merge(merged[-1], row)
            is_pair = True
        else:
            merged.append(row)
            is_pair = False
    return merged


def at_most(rows: Sequence[Row], limit: int) -> list[Row]:
    """Rows merged until there are at most `limit`; with more segments than that, the newest rows."""
    kept = list(rows)
    while len(kept) > limit:
        fewer = halve(kept)
        if len(fewer) == len(kept):
            return kept[-limit:]
        kept = fewer
    return kept


def pack(rows: Sequence[Row]) -> bytes:
    """Little-endian float32, column after column."""
    flat = array("f", (row[column] for column in range(len(COLUMNS)) for row in rows))
    if sys.byteorder == "big":
        flat.byteswap()
    return flat.tobytes()


def unpack(data: bytes) -> list[Row]:
    """The inverse of pack, to float32 precision."""
    flat = array("f", data)
    if sys.byteorder == "big":
        flat.byteswap()
    size = len(flat) // len(COLUMNS)
    return [tuple(flat[column * size + i] for column in range(len(COLUMNS))) for i in range(size)]


def families(row: Row) -> tuple[float, float, float, float]:
    """The stack of a row in ms: KV floor, compute, draft, other. Its sum is the measured time of the round."""
    draft, linear, attention, commit, accept, host = row[FIRST_PHASE:KV_FLOOR]
    floor = min(row[KV_FLOOR], attention)
    return floor, linear + attention - floor, draft, commit + accept + host
