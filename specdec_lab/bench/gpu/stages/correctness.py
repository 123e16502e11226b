"""`correctness`: our back ends and kernels against float64 on this device, bits, far offsets, and what NVIDIA's tools say.

Cases are drawn in a fixed random order until their share of the time is over, so that a short run is a fair sample of all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from ....engine.attention import Need
from ....engine.backends import BACKENDS
from ....engine.conformance import Report, Verdict, cases, judge
from ....engine.conformance.cases import ROUND_QUERIES
from ....engine.conformance.judging import ALLOWED
from ....records import Cell
from ...kernel_shapes import KernelShape
from .. import tools
from ..attempts import one_by_one
from ..attention_calls import Stage, error_of, layer_bytes
from ..context import Context
from ..kernel_cases import kernel_rows
from ..ledger import PASS, RED, Row
from ..round_checks import round_rows
from ..sizes import KernelCell
from ..small_cases import CASES, one_call, preferred, small_errors

# What our GPU kernels are held to; the conformance suite, which is for any back end, allows half as much again.
BARS = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 2e-6}
SIZES = ((128, 4), (128, 1), (64, 2))  # head size and group
CONFORMANCE_SHARE = 0.3  # of the stage's time
BYTES_AGREE = 0.03
MANY = KernelCell(KernelShape.parse("32x4k/8x128g4"), 5)  # fills every multiprocessor


def stage(context: Context) -> Iterator[Row]:
    """Conformance per back end, kernel cases, device rounds, bits, offsets, memory checker, counted bytes."""
    parts = {
        "conformance": _conformance, "kernels": kernel_rows, "device rounds": round_rows, "bits": _bits,
        "far offsets": _far_offsets, "sanitizer": _sanitizer, "counted bytes": _counted,
    }  # fmt: skip
    for what, rows in parts.items():
        yield from one_by_one(context, what, rows(context))


def _conformance(context: Context) -> Iterator[Row]:
    device = context.device.type
    dtypes = tuple(BARS) if context.is_gpu else (torch.float32,)
    asked = [(name, dtype, *size) for size in SIZES for dtype in dtypes for name in BACKENDS if name != "reference"]
    able = []
    for name, dtype, head_dim, group in asked:
        need = Need(device, dtype, head_dim, group, ROUND_QUERIES, tree=True, window=True)
        reason = BACKENDS[name].why_not(need)
        able += [(name, need)] if reason is None else []
        if reason is not None and (head_dim, group) == SIZES[0]:
            yield Row("refused", f"{name} {_dtype(dtype)}", reason=reason)
    seconds = CONFORMANCE_SHARE * context.seconds / max(len(able), 1)
    for name, need in able:
        context.checkpoint(f"conformance of {name}")
        yield from one_by_one(context, f"conformance {name} {_dtype(need.dtype)}", _judged(context, name, need, seconds))


def _judged(context: Context, name: str, need: Need, seconds: float) -> Iterator[Row]:
    """As many cases as fit, worst first in what is said."""
    every, verdicts, started = list(cases(need)), [], context.now()
    random.Random(0).shuffle(every)
    for case in every:
        verdicts.append(judge(BACKENDS[name], case))
        if context.now() - started > seconds or len(verdicts) >= context.sizes.most_cases:
            break
    ran: list[Verdict] = [verdict for verdict in verdicts if verdict.refusal is None]
    report, bar = Report(name, tuple(verdicts)), BARS[need.dtype]
    what = f"{name} {_dtype(need.dtype)} {need.head_dim}g{need.group}"
    if not ran:
        yield Row("refused", what, reason="; ".join(report.refusals))
        return
    # a case may allow more than its dtype does, where its scores are large: all are put on one scale
    worst = max(ran, key=lambda verdict: verdict.error / verdict.allowed)
    error = worst.error / worst.allowed * ALLOWED[need.dtype]
    is_ours = name == "triton"
    is_right = not report.faulty and (not is_ours or error <= bar)
    faults = [str(verdict) for verdict in report.faulty[:2]]
    reason = "; ".join(faults) if faults else f"worst: {worst.case.name}"
    words = f"error at most {bar if is_ours else ALLOWED[need.dtype]:.0e}, no fault"
    values = {"cases": len(ran), "of_cases": len(every), "worst_error": error, "faulty": len(report.faulty)}
    yield Row("conformance", what, values, PASS if is_right else RED, words, reason=reason[:300])


def _bits(context: Context) -> Iterator[Row]:
    """At full occupancy: the same bits when asked again, and for a row alone in its batch."""
    cell = MANY if context.is_gpu else context.sizes.kernels[0]
    dtype: torch.dtype = getattr(torch, context.sizes.dtype)
    board = Stage(cell, 1, dtype, context.device)
    call = preferred(board)
    backend = BACKENDS[call.name]
    first = call.launch(0).clone()
    again = all(torch.equal(first, call.launch(0)) for _ in range(3))
    yield Row("bits", f"{call.name} {cell} asked again", verdict=PASS if again else RED, bar="the same bits")
    if backend.promises.same_alone:
        row = cell.shape.cell.batch - 1
        alone = board.situation.row(row, 1)
        made = backend.attend(alone.q, alone.cache, 0, alone.plan(backend), alone.scale)
        same = torch.equal(made[0], first[row])
        yield Row("bits", f"{call.name} {cell} row {row} alone", verdict=PASS if same else RED, bar="the same bits")


def _far_offsets(context: Context) -> Iterator[Row]:
    """Keys so many that their 32-bit offsets wrap; the last row shows it."""
    cell, dtype = context.sizes.kernels[0], getattr(torch, context.sizes.dtype)
    wanted, one = context.sizes.far_offset_bytes, layer_bytes(cell, dtype.itemsize)
    shape = cell.shape
    batch = shape.cell.batch * max(1, -(-2 * wanted // one))  # keys are half of a layer
    many = Cell(batch, shape.cell.length)
    far = KernelCell(KernelShape(many, shape.kv_heads, shape.head_dim, shape.group), cell.queries)
    needed, free = layer_bytes(far, dtype.itemsize), context.free_bytes
    if needed > free:
        yield Row("left out", f"offsets beyond 2^31: {far}", {"needed_bytes": needed, "free_bytes": int(free)},
                  reason="it does not fit")
        return
    board = Stage(far, 1, dtype, context.device)
    call = preferred(board)
    error, elements = error_of(call, board, is_ours=True), board.cache.kv.numel() // 2
    bar = BARS[dtype]
    words = f"error at most {bar:.0e}" + ("" if elements > 1 << 31 else " (fewer than 2^31 elements here)")
    yield Row("offsets", f"{call.name} {far}", {"error": error, "elements": elements}, PASS if error <= bar else RED, words)


def _sanitizer(context: Context) -> Iterator[Row]:
    right = small_errors(context.device, getattr(torch, context.sizes.dtype), context.say)
    yield Row("small cases", f"{len(CASES)} of them", verdict=PASS if right else RED, bar="right")
    for tool in tools.CHECKS if context.is_gpu else ():
        found = tools.sanitize(tool, context.left_s / 2)
        if found.is_good is None:
            yield Row("left out", f"compute-sanitizer {tool}", reason=found.words)
        else:
            verdict = PASS if found.is_good else RED
            yield Row("sanitizer", tool, verdict=verdict, bar="no error", reason=found.words)


def _counted(context: Context) -> Iterator[Row]:
    """Whether the memory delivered the bytes that we count; that licenses the count as a measurement."""
    if not context.is_gpu:
        marks: list[bool] = []
        kv_bytes = one_call(context.sizes.kernels[0], context.device, torch.float32, marks.append)
        what = str(context.sizes.kernels[0])
        yield Row("bytes", what, {"counted_bytes": kv_bytes}, reason="nothing to compare with on a CPU")
        return
    torch.cuda.empty_cache()
    found = tools.count_bytes(context.left_s)
    if found.read_bytes is None or found.counted_bytes is None:
        yield Row("left out", "ncu", reason=found.words)
        return
    over = found.read_bytes / found.counted_bytes
    verdict = PASS if abs(over - 1) <= BYTES_AGREE else RED
    yield Row("bytes", tools.READ_METRIC, {"read_bytes": found.read_bytes, "counted_bytes": found.counted_bytes, "over": over},
              verdict, f"within {BYTES_AGREE:.0%} of the count")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
