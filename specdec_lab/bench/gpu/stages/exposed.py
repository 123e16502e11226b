"""`exposed`: the part of attention's time that loading KV costs, and what context costs a whole step.

Exposed KV load = attention - the same kernel with slot numbers cut to a small power of two, so that it reads a few tiles
again and again from L2: the time that would vanish with infinitely fast memory. Its output is wrong on purpose and unused. Cost
of context = a step at n tokens - a step at a few, all else equal; that works on every back end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor

from specdec_kernels.tree_attention import gpu

from ....engine.loop import Engine
from ....records import Cell, SpecConfig
from ..attempts import one_by_one
from ..attention_calls import Stage, layer_bytes, read_bytes
from ..context import Context
from ..ledger import Row, bar_verdict
from ..models import assumed, engine_for, fitting, rounds_of, tokens_for
from ..sizes import KernelCell
from ..timing import rotation

L2_SHARE = 4  # of the L2, an aliased footprint takes at most one part in so many
SMALLEST_ALIAS = 64  # slots: one block of keys
TINY_LENGTH = 16
STAMPS_AGREE = 0.02
STAMPS_COST = 0.005
OFF = SpecConfig.off()


def stage(context: Context) -> Iterator[Row]:
    """Per attention cell: real, aliased, stamped. Per length: a plain step against a plain step of next to no context."""
    for cell in context.sizes.exposed:
        context.checkpoint(str(cell))
        yield from one_by_one(context, f"aliased {cell}", _aliased(context, cell))
    yield from one_by_one(context, "cost of context", _context_cost(context))


def alias_mask(cell: KernelCell, itemsize: int, l2_bytes: int) -> int:
    """The largest power of two of slots, less one, whose KV over all rows and heads stays well inside the L2."""
    per_slot = 2 * cell.shape.cell.batch * cell.shape.kv_heads * cell.shape.head_dim * itemsize
    slots = SMALLEST_ALIAS
    while 2 * slots * per_slot <= l2_bytes // L2_SHARE:
        slots *= 2
    return slots - 1


def _aliased(context: Context, cell: KernelCell) -> Iterator[Row]:
    dtype: torch.dtype = getattr(torch, context.sizes.dtype)
    reason = gpu.why_not(context.device.type, cell.shape.head_dim, dtype)
    if reason is not None:
        yield Row("refused", f"aliased {cell}", reason=reason)
        return
    needed, free = layer_bytes(cell, dtype.itemsize), context.free_bytes
    if needed > free:
        yield Row("left out", str(cell), {"needed_bytes": needed, "free_bytes": int(free)}, reason="one layer does not fit")
        return
    layers = rotation(read_bytes(cell, dtype.itemsize), needed, free, context.sizes.most_layers)
    board = Stage(cell, layers, dtype, context.device)
    mask = alias_mask(cell, dtype.itemsize, context.l2_bytes or 1 << 20)
    real = context.timed(attention_of(board), board.layers)
    fast = context.timed(attention_of(board, mask=mask), board.layers)
    floor = board.kv_bytes / context.ceilings.read_bytes_per_s
    exposed = real.seconds - fast.seconds
    yield Row("exposed", str(cell), {
        "exposed_s": exposed, "exposed_share": exposed / real.seconds, "attention_s": real.seconds, "aliased_s": fast.seconds,
        "kv_floor_s": floor, "alias_slots": mask + 1, "disagreement": max(real.disagreement, fast.disagreement),
        "aliased_bytes_per_s": board.kv_bytes / fast.seconds,
    }, bar_verdict(exposed, 0.0), "not negative")  # fmt: skip
    if context.is_gpu and not gpu.is_interpreted():
        yield from _stamped(context, board, real.seconds)


def attention_of(board: Stage, *, mask: int | None = None, stamps: Tensor | None = None) -> Callable[[int], Tensor]:
    """A launch of the kernels alone: all that a forward makes once for its layers is made here."""
    reads, (batch, queries, heads, dim) = board.situation.reads, board.q.shape
    corner = (gpu.pack_corner(reads.corner), reads.node_depths.to(torch.int32), reads.query_nodes.to(torch.int32))
    committed, out = reads.committed.to(torch.int32), torch.empty_like(board.q)
    lse = torch.empty(batch, queries, heads, dtype=torch.float32, device=board.q.device)
    floats = gpu.workspace_floats(batch, heads, queries, dim, reads.longest, gpu.default_chunk(False))
    workspace = torch.empty(floats, dtype=torch.float32, device=board.q.device) if floats else None

    def launch(turn: int) -> Tensor:
        made, _ = gpu.tree_attention(
            board.q, *board.cache.layer(turn % board.layers), committed, *corner, scale=board.scale, alias_mask=mask,
            stamps=stamps, out=out, lse=lse, workspace=workspace, longest=reads.longest,
        )
        return made

    return launch


def _stamped(context: Context, board: Stage, seconds: float) -> Iterator[Row]:
    """What in-kernel stamps cost, and whether the interval that they give is the one that events give."""
    stamps = torch.tensor([2**63 - 1, 0], dtype=torch.int64, device=context.device)
    launch = attention_of(board, stamps=stamps)
    stamped = context.timed(launch, board.layers)
    cost = stamped.seconds / seconds - 1
    yield Row("stamps", f"cost in {board.cell}", {"cost": cost, "stamped_s": stamped.seconds}, bar_verdict(-cost, -STAMPS_COST),
              f"at most {STAMPS_COST:.1%}")
    spans = []
    for turn in range(context.sizes.repeats):
        stamps.copy_(torch.tensor([2**63 - 1, 0], device=context.device))
        launch(turn)
        first, last = stamps.tolist()
        spans.append((last - first) * 1e-9)
    apart = abs(median(spans) / seconds - 1)
    yield Row("stamps", f"interval in {board.cell}", {"apart": apart, "span_s": median(spans), "events_s": seconds},
              bar_verdict(-apart, -STAMPS_AGREE), f"within {STAMPS_AGREE:.0%} of events")


def _context_cost(context: Context) -> Iterator[Row]:
    model = context.sizes.models[0]
    engine = engine_for(context, model)
    for wanted in model.cells:
        context.checkpoint(f"cost of context {wanted}")
        yield from one_by_one(context, f"cost of context {wanted}", _cost_in(context, engine, model.name, wanted))


def _cost_in(context: Context, engine: Engine, name: str, wanted: Cell) -> Iterator[Row]:
    rounds = context.sizes.rounds
    new_tokens = tokens_for(OFF, rounds)
    cell, note = fitting(context, engine, wanted, new_tokens)
    if note is not None:
        yield note
    if cell is None:
        return
    steps = {}
    for at in (cell, Cell(cell.batch, TINY_LENGTH)):
        run = rounds_of(assumed(engine, at, new_tokens), OFF, rounds)
        steps[at] = median(step.wall_s for step in run.rounds)
        labels = run.header.labels
    long_s, tiny_s = steps[cell], steps[Cell(cell.batch, TINY_LENGTH)]
    yield Row("cost of context", f"{name} {cell}", {
        "context_cost_s": long_s - tiny_s, "step_s": long_s, "tiny_step_s": tiny_s, "share": 1 - tiny_s / long_s,
    }, labels=labels)  # fmt: skip
