"""`kernels`: one attention call per cell, ours beside what torch and others offer, over the same rotated random KV.

Every call is first compared with float64; one that is wrong gets no speed. Achieved bytes/s are exact KV bytes over the median,
divided by the calibrated read ceiling.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec

import torch

from ....engine.conformance.judging import allowed_error
from ..attempts import one_by_one, one_of_theirs
from ..attention_calls import COMPILED, QUICK, Call, Stage, best, error_of, layer_bytes, others, ours, read_bytes
from ..context import Context, release
from ..layouts import layout_rows
from ..ledger import MISS, RED, Row, bar_verdict
from ..round_calls import RoundCall, round_calls
from ..sizes import KernelCell
from ..timing import Timing, is_valid, rotation, speed_flags

COMPILES_S = {"flex": 15.0, "flashinfer": 60.0}  # assumed, not measured


def stage(context: Context) -> Iterator[Row]:
    """A row per cell and contestant, both layouts, small kernels; what compiles for every shape is last, if time is left."""
    yield from _once(_everything(context))


def _everything(context: Context) -> Iterator[Row]:
    for cell in context.sizes.kernels:
        context.checkpoint(str(cell))
        yield from one_by_one(context, str(cell), measure(context, cell))
    for cell in context.sizes.layouts:
        context.checkpoint(f"layouts {cell}")
        yield from one_by_one(context, f"layouts {cell}", layout_rows(context, cell))
    yield from one_by_one(context, "kernels of a round", _round_kernels(context))
    for name in COMPILED:
        yield from _compiled(context, name)


def _once(rows: Iterable[Row]) -> Iterator[Row]:
    """What a contestant cannot do for one reason in every cell is said at the first."""
    told = set()
    for row in rows:
        key = (row.what.rpartition(" ")[2], row.reason)
        if row.kind != "refused" or key not in told:
            yield row
        told.add(key)


def _compiled(context: Context, name: str) -> Iterator[Row]:
    """A contestant that compiles when it first sees a shape, which nothing can cut short, as far as the time goes."""
    for cell in context.sizes.kernels:
        context.checkpoint(f"{cell} {name}")
        if not context.has_time_for(COMPILES_S[name]):
            yield Row("left out", f"{cell} {name}", reason=f"it and the cells after it: compiling is taken to need "
                      f"{COMPILES_S[name]:.0f} s (assumed), {context.left_s:.0f} s are left")
            return
        yield from one_of_theirs(context, f"{cell} {name}", measure_others(context, cell, (name,)))


def _round_kernels(context: Context) -> Iterator[Row]:
    """The small kernels of a round: time counts, not bandwidth. Their numbers are checked by the stage `correctness`."""
    size, dtype = context.sizes.round_size, getattr(torch, context.sizes.dtype)
    if context.is_gpu and find_spec("triton") is None:
        yield Row("left out", "kernels of a round", reason="Triton is not installed")
        return
    release(context.device)
    for call in round_calls(size, dtype, context.device):
        context.checkpoint(call.name)
        yield from one_by_one(context, call.name, _round_kernel(context, call))


def _round_kernel(context: Context, call: RoundCall) -> Iterator[Row]:
    size, timing = context.sizes.round_size, context.timed(call.launch, call.turns)
    values = {**timing.to_dict(), "moved_bytes": call.moved_bytes,
              "achieved_bytes_per_s": call.moved_bytes / timing.seconds, "turns": call.turns}
    verdict = bar_verdict(-timing.seconds, -call.pass_s)
    what, bar = f"{call.name} {size.batch}x{size.drafted + 1}", f"at most {call.pass_s * 1e6:.0f} us"
    yield Row("round kernel", what, values, verdict, bar)


def measure(context: Context, cell: KernelCell) -> Iterator[Row]:
    """Ours, and all others that start at once."""
    board = _board(context, cell)
    if isinstance(board, Row):
        yield board
        return
    for made in ours(board):
        yield _row(context, board, made, is_ours=True)
    for made in others(board, QUICK):
        yield _row(context, board, made, is_ours=False)


def measure_others(context: Context, cell: KernelCell, names: Iterable[str]) -> Iterator[Row]:
    """These of the others; nothing where the cell does not fit, which `measure` has said."""
    board = _board(context, cell)
    if isinstance(board, Stage):
        for made in others(board, names):
            yield _row(context, board, made, is_ours=False)


def _board(context: Context, cell: KernelCell) -> Stage | Row:
    """A cell's caches, or the row that says what they would need."""
    dtype: torch.dtype = getattr(torch, context.sizes.dtype)
    needed, free = layer_bytes(cell, dtype.itemsize), context.free_bytes
    if needed > free:
        most = int(cell.shape.cell.batch * free // needed)
        return Row("left out", str(cell), {"needed_bytes": needed, "free_bytes": int(free), "largest_batch": most},
                   reason="one layer of it does not fit")
    # half of what is free stays for what others make of it: copies of windows, float64 of a row
    layers = rotation(read_bytes(cell, dtype.itemsize), needed, max(free / 2, needed), context.sizes.most_layers)
    return Stage(cell, layers, dtype, context.device)


def _row(context: Context, board: Stage, made: Call | tuple[str, str], *, is_ours: bool) -> Row:
    if isinstance(made, tuple):
        return Row("refused", f"{board.cell} {made[0]}", reason=made[1])
    error, allowed = error_of(made, board, is_ours=is_ours), allowed_error(board.cache.kv.dtype, board.q.dtype)
    what = f"{board.cell} {made.name}"
    if not error <= allowed:
        bar = f"error at most {allowed:.0e}"
        return Row("attention", what, {"error": error}, RED, bar, reason="wrong, so it gets no speed")
    timing = context.timed(made.launch, board.layers)
    flags = speed_flags(board.kv_bytes, timing.seconds, context.ceilings.read_bytes_per_s, context.l2_bytes)
    verdict, limit = _bar(context, board, timing) if is_ours and made.name == best(board) else (None, None)
    achieved = board.kv_bytes / timing.seconds
    values = {
        "median_s": timing.seconds, "achieved_bytes_per_s": achieved,
        "read_share": achieved / context.ceilings.read_bytes_per_s, "achieved_flops_per_s": board.flops / timing.seconds,
        **timing.to_dict(), "kv_bytes": board.kv_bytes, "error": error, "layers": board.layers,
    }  # fmt: skip
    if verdict is not None and not is_valid(flags):
        verdict = MISS
    return Row("attention", what, values, verdict, limit, flags=flags, reason=made.says)


def _bar(context: Context, board: Stage, timing: Timing) -> tuple[str | None, str | None]:
    """What the cell expects of our kernel."""
    cell, seconds = board.cell, timing.seconds
    if cell.pass_share is not None:
        share = board.kv_bytes / seconds / context.ceilings.read_bytes_per_s
        aim = f", aim {cell.aim_share:.0%}" if cell.aim_share else ""
        return bar_verdict(share, cell.pass_share, cell.aim_share), f"{cell.pass_share:.0%} of the read ceiling{aim}"
    if cell.pass_flops is not None:
        return bar_verdict(board.flops / seconds, cell.pass_flops), f"{cell.pass_flops / 1e12:.0f} TFLOP/s"
    if cell.pass_s is not None:
        return bar_verdict(-seconds, -cell.pass_s), f"at most {cell.pass_s * 1e6:.0f} us"
    return None, None
