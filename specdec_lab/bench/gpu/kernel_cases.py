"""Our GPU kernels other than attention against their references, on this device: random inputs, every output compared.

Not known here: the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from specdec_kernels.bandwidth import reference as bandwidth

from .context import Context
from .ledger import PASS, RED, Row

Case = Callable[[torch.device], Iterator[tuple[str, float, float]]]  # (what, error, allowed)


def kernel_rows(context: Context) -> Iterator[Row]:
    """A row per comparison; the kernels run in Triton, so on a CPU only the references are run against themselves."""
    if context.is_gpu and find_spec("triton") is None:
        yield Row("left out", "kernels", reason="Triton is not installed")
        return
    for case in CASES:
        context.checkpoint("the kernel cases")
        for what, error, allowed in case(context.device):
            verdict = PASS if error <= allowed else RED
            yield Row("kernel", what, {"error": error}, verdict, f"at most {allowed:.0e}" if allowed else "equal")


def _reads(device: torch.device) -> Iterator[tuple[str, float, float]]:
    if device.type == "cuda":
        from specdec_kernels.bandwidth import gpu as ours
    else:
        from specdec_kernels.bandwidth import reference as ours  # type: ignore[no-redef]
    for count, programs in ((1, 1), (4099, 3), (1 << 20, 264)):
        words = torch.randint(-(1 << 31), (1 << 31) - 1, (count,), dtype=torch.int32, device=device)
        poisoned = torch.full((programs,), 7, dtype=torch.int64, device=device)
        right = bandwidth.read_bw(words, torch.zeros_like(poisoned))
        yield f"read_bw of {count} words in {programs} shares", float(not _equal(ours.read_bw(words, poisoned), right)), 0.0
        target = torch.full_like(words, 3)
        yield f"copy_bw of {count} words", float(not _equal(ours.copy_bw(words, target), words)), 0.0
    ticks = ours.timer_ticks(32, device)
    yield "timer_ticks rise", float(not bool((ticks.diff() > 0).all())), 0.0


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


CASES: tuple[Case, ...] = (_reads,)
