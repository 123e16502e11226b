"""Our GPU kernels other than attention against their references, on this device: random inputs, every output compared.

Not known here: the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from specdec_kernels.bandwidth import reference as bandwidth
from specdec_kernels.tree_attention import gpu as attention_gpu
from specdec_kernels.tree_attention.gpu import WorkList
from specdec_kernels.work_list import gpu as work_list_gpu
from specdec_kernels.work_list import reference as work_list_reference

from ...engine.conformance.judging import worst_row
from . import round_kernels
from .attempts import one_by_one
from .context import Context
from .ledger import PASS, RED, Row

CHUNK = 1024  # keys of a part
SAME = 4e-3  # between two orders of adding up, in bfloat16
Case = Callable[[torch.device], Iterator[tuple[str, float, float]]]  # (what, error, allowed)


def kernel_rows(context: Context) -> Iterator[Row]:
    """A row per comparison; the kernels run in Triton, so on a CPU only the references are run against themselves."""
    if context.is_gpu and find_spec("triton") is None:
        yield Row("left out", "kernels", reason="Triton is not installed")
        return
    for case in CASES:
        context.checkpoint("the kernel cases")
        yield from one_by_one(context, f"kernel {case.__name__.strip('_')}", _judged(case, context.device))


def _judged(case: Case, device: torch.device) -> Iterator[Row]:
    for what, error, allowed in case(device):
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


def _work_list(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The parts of ragged rows, with and without a window; and attention over such a list, which must not change a bit."""
    committed = torch.tensor([0, 63, 5000, 1025], dtype=torch.int32, device=device)
    order = torch.arange(5, dtype=torch.int32, device=device)
    for sink, recent in ((0, 0), (4, 508)):
        right, count = work_list_reference.work_list(
            committed, order, order, kv_heads=2, chunk=CHUNK, sink=sink, recent=recent
        )
        what = f"work_list {f'window {sink}+{recent}' if recent else 'of everything'}"
        if device.type != "cuda":
            yield what, float(int(count) != right.shape[0]), 0.0
            continue
        made = work_list_gpu.work_list(
            committed, order, order, kv_heads=2, chunk=CHUNK, sink=sink, recent=recent, longest=5005
        )
        found = made.items[: int(made.count)].cpu()
        yield what, float(not _equal(_sorted(found), _sorted(right.cpu()))), 0.0
        yield f"{what}, attended", _attended(committed, order, sink, recent, made), SAME


def _attended(committed: Tensor, order: Tensor, sink: int, recent: int, work: WorkList) -> float:
    """How far attention over the list lies from attention over a grid of all parts."""
    batch, queries, device = committed.shape[0], order.shape[0], committed.device
    q = torch.randn(batch, queries, 8, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 2, 5120, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    corner = order[:, None] >= order
    grid, listed = (
        attention_gpu.tree_attention(
            q, k, v, committed, corner, order, order, scale=0.1, sink=sink, recent=recent, longest=5005, chunk=CHUNK, work=given
        )[0] for given in (None, work)
    )  # fmt: skip
    return worst_row([listed], [grid.double()])


def _sorted(items: Tensor) -> Tensor:
    """Rows in one order, whoever made them."""
    return torch.tensor(sorted(items.tolist()))


CASES: tuple[Case, ...] = (
    _reads, _work_list, round_kernels.rope_append, round_kernels.kv_compact, round_kernels.row_lse, round_kernels.accept,
    round_kernels.sample_rows, round_kernels.noise, round_kernels.ngram_match,
)
