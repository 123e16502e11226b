"""What our GPU kernels would have computed on the GPU that is not there: launched as always, then meant by their references.

Not known here: launches (fake_triton.py), tensors (fake_cuda.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from fake_cuda import FakeGpu
from specdec_kernels.stamp import reference as reference_stamp

SAME = {
    "rope_append": ("rope_append",), "kv_compact": ("kv_compact",), "row_lse": ("row_lse",),
    "accept": ("accept_chain_equal", "accept_chain", "accept_tree_equal", "accept_tree"),
    "sample_rows": ("draw_gumbel", "draw_inverse", "draw_residual"),
    "noise": ("words", "gumbel", "uniform", "gumbel_argmax"), "bandwidth": ("read_bw", "copy_bw"),
}  # fmt: skip
TICK_NS = 1000


@contextmanager
def meant(gpu: FakeGpu) -> Iterator[None]:
    """Kernels compute, until the block ends."""
    now = itertools.count(TICK_NS, TICK_NS)
    with ExitStack() as stack:

        def replace(folder: str, name: str, effect: Callable[..., Any]) -> None:
            module = import_module(f"specdec_kernels.{folder}.gpu")
            stack.enter_context(mock.patch.object(module, name, _both(gpu, getattr(module, name), effect)))

        for folder, names in SAME.items():
            for name in names:
                replace(folder, name, getattr(import_module(f"specdec_kernels.{folder}.reference"), name))
        replace("tree_attention", "tree_attention", lambda *a, **k: _attention(now, *a, **k))
        replace("work_list", "work_list", _work_list)
        replace("stamp", "stamp", lambda *where: reference_stamp.stamp(*where, lambda: next(now)))
        replace("bandwidth", "timer_ticks", lambda count, device: torch.arange(count) * 32)
        yield


def _both(gpu: FakeGpu, launch: Callable[..., Any], effect: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        made = launch(*args, **kwargs)

        def work(made: Any, args: Any, kwargs: Any) -> None:
            meaning = effect(*args, **kwargs)
            for old, new in zip(_tensors(made), _tensors(meaning) if made is not None else (), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old[: new.shape[0]].copy_(new) if old.dim() else old.copy_(new)

        gpu.run(work, (made, args, kwargs), {})
        return made

    return call


def _tensors(made: Any) -> list[torch.Tensor]:
    if dataclasses.is_dataclass(made):
        made = [getattr(made, f.name) for f in dataclasses.fields(made)]
    made = [made] if isinstance(made, torch.Tensor) else made
    return [t for t in made or () if isinstance(t, torch.Tensor)]


def _work_list(
    committed: Any, node_depth: Any, query_node: Any, *, kv_heads: int, chunk: int, sink: int = 0, recent: int = 0,
    list_len: int = 0, window: Any = None, stamps: Any = None, **launch: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As work_list.gpu takes it: the list is longer than what is in it."""
    from specdec_kernels.work_list.reference import work_list

    if window is not None:
        sink, recent, _ = window.tolist()
    if stamps is not None:
        stamps.copy_(torch.tensor([2**63 - 1, 0]).expand_as(stamps))
    items, count = work_list(
        committed, node_depth, query_node, kv_heads=kv_heads, chunk=chunk, sink=sink, recent=recent, list_len=list_len
    )
    return items, torch.as_tensor(count).view(1)


def _attention(
    now: Iterator[int], q: Any, k: Any, v: Any, committed: Any, corner: Any, node_depth: Any, query_node: Any, *,
    scale: float, sink: int = 0, recent: int = 0, index: Any = None, window: Any = None, stamps: Any = None, **launch: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As tree_attention.gpu takes it: a packed corner, and a window in memory."""
    from specdec_kernels.tree_attention.reference import tree_attention

    if window is not None:
        sink, recent, _ = window.tolist()
    if corner.dtype == torch.int32:
        node = torch.arange(node_depth.shape[0])
        corner = (corner[:, node // 32].long() >> (node % 32)) & 1 == 1
    if stamps is not None:
        stamps.copy_(torch.tensor([next(now), next(now)]))
    return tree_attention(
        q, k, v, committed.long(), corner, node_depth, query_node.long(), scale=scale, sink=sink, recent=recent, index=index
    )


