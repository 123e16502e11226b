"""One call of each small kernel of a round at the size of an 8B model, and how long it may take.

Random inputs; buffers that are read rotate, so that a call finds them in no cache. Not known here: how calls are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...costs import ModelShape
from .round_kernels import PURPOSE, SEED, both
from .timing import MOST_SETS, ROTATED_BYTES

Launch = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class RoundCall:
    """A launch, the bytes that it must move, and the most that it may take (a prediction for an H200)."""

    name: str
    launch: Launch
    turns: int
    moved_bytes: int
    pass_s: float


@dataclass(frozen=True, slots=True)
class RoundSize:
    """Rows of the batch, drafted tokens of each, slots of the cache, and the model."""

    batch: int
    drafted: int
    slots: int
    shape: ModelShape


def round_calls(size: RoundSize, dtype: torch.dtype, device: torch.device) -> Iterator[RoundCall]:
    """Rotary append of one layer, compaction of all, row statistics, acceptance of a chain, the last draw, the plan."""
    yield _rope_append(size, dtype, device)
    yield _kv_compact(size, dtype, device)
    yield from _logits(size, dtype, device)
    if device.type == "cuda":
        yield _work_list(size, device)


def _sets(read_bytes: int, device: torch.device) -> int:
    """Buffers that take turns."""
    return min(MOST_SETS, -(-ROTATED_BYTES // read_bytes)) if device.type == "cuda" else 2


def _rope_append(size: RoundSize, dtype: torch.dtype, device: torch.device) -> RoundCall:
    ours, _ = both("rope_append", device)
    shape, batch, tokens = size.shape, size.batch, size.drafted + 1
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    moved = 2 * batch * tokens * width * dtype.itemsize
    sets = _sets(moved, device)
    qkv = torch.randn(sets, batch, tokens, width, device=device, dtype=dtype)
    kv = torch.randn(2, batch, shape.kv_heads, size.slots, shape.head_dim, device=device, dtype=dtype)
    angles = torch.randn(size.slots, shape.head_dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    out = torch.empty(batch, tokens, shape.heads, shape.head_dim, device=device, dtype=dtype)
    at = (_committed(size, device)[:, None] + torch.arange(tokens, device=device)).to(torch.int32)

    def append(turn: int) -> object:
        return ours.rope_append(qkv[turn % sets], at, at, cos, sin, kv, out=out)

    return RoundCall("rope_append", append, sets, moved, 6e-6)


def _kv_compact(size: RoundSize, dtype: torch.dtype, device: torch.device) -> RoundCall:
    ours, _ = both("kv_compact", device)
    shape, batch, drafted = size.shape, size.batch, size.drafted
    kv = torch.randn(shape.layers, 2, batch, shape.kv_heads, size.slots, shape.head_dim, device=device, dtype=dtype)
    path = (2 * torch.arange(1, drafted + 1, device=device, dtype=torch.int32)).expand(batch, -1).contiguous()
    counts = torch.full((batch,), drafted, dtype=torch.int32, device=device)
    committed = _committed(size, device)
    moved = 2 * 2 * shape.layers * batch * shape.kv_heads * drafted * shape.head_dim * dtype.itemsize  # read, and written
    return RoundCall("kv_compact", lambda turn: ours.kv_compact(kv, path, counts, committed), 1, moved, 20e-6)


def _logits(size: RoundSize, dtype: torch.dtype, device: torch.device) -> Iterator[RoundCall]:
    rows, draws, accepting = (both(name, device)[0] for name in ("row_lse", "sample_rows", "accept"))
    batch, drafted, vocab = size.batch, size.drafted, size.shape.vocab
    read = batch * (drafted + 1) * vocab * dtype.itemsize
    sets = _sets(read, device)
    logits = torch.randn(sets, batch * (drafted + 1), vocab, device=device, dtype=dtype)
    ids = torch.randint(0, vocab, (batch * (drafted + 1), 1), device=device)
    yield RoundCall("row_lse", lambda turn: rows.row_lse(logits[turn % sets], 0.8, ids), sets, read, 18e-6)
    tokens = torch.randint(0, vocab, (batch, drafted), device=device)
    counts = torch.full((batch,), drafted, device=device)
    target_p, draft_q = (-torch.rand(batch, drafted, device=device) for _ in range(2))
    sequences, first = torch.arange(batch, device=device), _committed(size, device).long() + 1
    seed = torch.tensor([SEED], device=device)  # on the device: a graph cannot copy it there

    def accept(turn: int) -> object:
        return accepting.accept_chain(tokens, counts, target_p, draft_q, seed, sequences, first, PURPOSE)

    yield RoundCall("accept_chain", accept, 1, 2 * target_p.numel() * 4, 6e-6)
    target = logits.view(sets, batch, drafted + 1, vocab)
    lse = torch.logsumexp(target[0].float() / 0.8, -1)
    draft_lse = lse[:, :drafted].contiguous()
    accepted = accept(0)

    def draw(turn: int) -> object:
        of = target[turn % sets]
        laws = (of, lse, of[:, :drafted], draft_lse, None, 0.8)
        return draws.draw_residual(*laws, accepted, seed, sequences, first, PURPOSE)

    yield RoundCall("draw_residual", draw, sets, 2 * batch * vocab * dtype.itemsize, 12e-6)


def _work_list(size: RoundSize, device: torch.device) -> RoundCall:
    from specdec_kernels.work_list import gpu

    order = torch.arange(size.drafted + 1, dtype=torch.int32, device=device)
    committed = _committed(size, device)
    made = gpu.empty(size.batch, size.shape.kv_heads, size.slots, 1024, device)

    def plan(turn: int) -> object:
        return gpu.work_list(committed, order, order, kv_heads=size.shape.kv_heads, chunk=1024, out=made)

    return RoundCall("work_list", plan, 1, made.items.numel() * 4, 5e-6)


def _committed(size: RoundSize, device: torch.device) -> Tensor:
    """[B] int32: as far into the cache as drafts at every second node still fit behind."""
    return torch.full((size.batch,), size.slots - 2 * size.drafted - 2, dtype=torch.int32, device=device)
