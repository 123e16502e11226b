"""Attention calls for tools that watch a process from outside: `python -m specdec_lab.bench.gpu.small_cases cases|bytes`.

`cases` runs three small calls of the preferred back end and compares them with float64; a memory checker sees every access.
`bytes` runs one large call between the profiler's start and stop, and prints the bytes that we count for it. Not known here:
the tools.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

import torch

from ...engine.backends import BACKENDS
from ...engine.conformance.judging import allowed_error
from ...records import KvView
from ..kernel_shapes import KernelShape
from .attention_calls import Call, Stage, best, error_of, ours
from .sizes import KernelCell

CASES = (
    KernelCell(KernelShape.parse("2x70/2x64g4"), 5),
    KernelCell(KernelShape.parse("1x129/1x128g4"), 9, is_tree=True),
    KernelCell(KernelShape.parse("2x150/2x64g2"), 1, view=KvView.window(2, 33)),
)
LARGE = KernelCell(KernelShape.parse("8x32k/8x128g4"), 5)
EXIT_WRONG = 1


def preferred(board: Stage) -> Call:
    """The call of the back end that the engine would take."""
    name = best(board)
    return next(call for call in ours(board) if isinstance(call, Call) and call.name == name)


def small_errors(device: torch.device, dtype: torch.dtype, say: Callable[[str], None] = print) -> bool:
    """Run the three cases; whether all are right."""
    is_right = True
    for cell in CASES:
        board = Stage(cell, 1, dtype, device)
        call = preferred(board)
        error, allowed = error_of(call, board, is_ours=True), allowed_error(dtype, dtype)
        say(f"{call.name} {cell}: error {error:.1e}, allowed {allowed:.0e}")
        is_right = is_right and error <= allowed
    return is_right


def one_call(cell: KernelCell, device: torch.device, dtype: torch.dtype, mark: Callable[[bool], object]) -> int:
    """Attend once to a cold layer between mark(True) and mark(False); the bytes that it must read."""
    board = Stage(cell, 2, dtype, device)
    call = preferred(board)
    call.launch(0)  # compiles, and leaves layer 1 out of the cache
    _wait(device)
    mark(True)
    call.launch(1)
    _wait(device)
    mark(False)
    return board.kv_bytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profiler(is_on: bool) -> None:
    runtime = torch.cuda.cudart()
    runtime.cudaProfilerStart() if is_on else runtime.cudaProfilerStop()


def main(words: Sequence[str]) -> int:
    """Exit code 1 if a case is wrong."""
    device = torch.device("cuda")
    if list(words) == ["cases"]:
        return 0 if small_errors(device, torch.bfloat16) else EXIT_WRONG
    kv_bytes = one_call(LARGE, device, torch.bfloat16, _profiler)
    print(json.dumps({"kv_bytes": kv_bytes, "backends": list(BACKENDS)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
