"""Our attention kernel over a cache laid out head by head (HND, the decision) and token by token (NHD), in turns in one run.

Strides are arguments of the kernel, so it is the same kernel and the same arithmetic: both must give the same bits. Not known
here: other kernels, and which cells.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from statistics import median

import torch

from ...engine.backends import BACKENDS
from ...engine.conformance.judging import allowed_error
from .attention_calls import Call, Stage, attend_with, best, error_of, layer_bytes, read_bytes
from .context import Context
from .ledger import RED, Row
from .sizes import KernelCell
from .timing import rotation

LAYOUTS = ("HND", "NHD")
DECISION = "HND is the decision, NHD a check"
BLOCKS = 3
WORTH_KNOWING = 0.02
BY_STRIDES = ("triton", "cpu")  # back ends that take any strides; others may copy


def in_nhd(board: Stage) -> Stage:
    """The same keys, values and queries with a token's heads side by side; shapes are as before, strides are not."""
    twin = copy.copy(board)
    vars(twin).pop("situation", None)
    twin.cache = copy.copy(board.cache)
    twin.cache.kv = board.cache.kv.transpose(-3, -2).contiguous().transpose(-3, -2)  # [L, 2, B, H, S, D]
    twin.cache.prepared = {}
    return twin


def layout_rows(context: Context, cell: KernelCell) -> Iterator[Row]:
    """How much longer the kernel takes over NHD than over HND, with the spread over blocks."""
    dtype: torch.dtype = getattr(torch, context.sizes.dtype)
    needed, free = 2 * layer_bytes(cell, dtype.itemsize), context.free_bytes
    if needed > free:
        yield Row("left out", f"layouts {cell}", {"needed_bytes": needed, "free_bytes": int(free)},
                  reason="one layer of it does not fit twice")
        return
    layers = rotation(read_bytes(cell, dtype.itemsize), needed, free, context.sizes.most_layers)
    board = Stage(cell, layers, dtype, context.device)
    name = best(board)
    if name not in BY_STRIDES:
        yield Row("refused", f"layouts {cell}", reason=f"attention would be by {name} here, which has no layouts to compare")
        return
    backend = BACKENDS[name]
    calls = {
        layout: Call(layout, attend_with(backend, at)) for layout, at in zip(LAYOUTS, (board, in_nhd(board)), strict=True)
    }  # fmt: skip
    allowed = allowed_error(dtype, dtype)
    errors = {layout: error_of(call, board, is_ours=True) for layout, call in calls.items()}
    same = torch.equal(*(call.launch(0) for call in calls.values()))
    if not same or not max(errors.values()) <= allowed:
        yield Row("layouts", f"{cell} {name}", {"error": max(errors.values()), "same_bits": same}, RED,
                  f"the same bits, error at most {allowed:.0e}", reason="wrong, so it gets no speed")
        return
    yield _compared(context, f"{cell} {name}", calls, board)


def _compared(context: Context, what: str, calls: dict[str, Call], board: Stage) -> Row:
    found: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    apart = 0.0
    for block in range(BLOCKS):
        for layout in LAYOUTS if block % 2 == 0 else reversed(LAYOUTS):
            timing = context.timed(calls[layout].launch, board.layers)
            found[layout].append(timing.seconds)
            apart = max(apart, timing.disagreement)
    ratios = [nhd / hnd for hnd, nhd in zip(*(found[layout] for layout in LAYOUTS), strict=True)]
    gap = median(ratios) - 1
    flags = (f"NHD takes {abs(gap):.1%} {'longer' if gap > 0 else 'less'} than HND, the decision",)
    values = {
        "nhd_over_hnd": median(ratios), "low": min(ratios), "high": max(ratios), "hnd_s": median(found["HND"]),
        "nhd_s": median(found["NHD"]), "disagreement": apart, "blocks": BLOCKS, "layers": board.layers,
    }  # fmt: skip
    return Row("layouts", what, values, flags=flags if abs(gap) > WORTH_KNOWING else (), reason=DECISION)
