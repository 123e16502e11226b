"""work_list on GPUs through Triton, once per round; meaning and arguments as in reference.py. No host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tree_attention.gpu import MAX_QUERIES, NO_LIMIT, WorkList, num_parts, window_scalars

PROGRAMS_PER_MULTIPROCESSOR = 2
INTERPRETED_PROGRAMS = 3  # any number is right
MAX_BATCH = 1024
ITEMS_AT_ONCE = 128


def work_list(
    committed: Tensor, node_depth: Tensor, query_node: Tensor, *, kv_heads: int, chunk: int, sink: int = 0, recent: int = 0,
    list_len: int = 0, window: Tensor | None = None, longest: int | None = None, stamps: Tensor | None = None,
    out: WorkList | None = None,
) -> WorkList:  # fmt: skip
    """See reference.work_list; give the result as `work` to tree_attention.gpu.tree_attention.

    window   as tree_attention takes it, on the device, instead of sink and recent
    longest  no row has more keys than this; sizes the list, needed where `out` is not given
    stamps   int64 [layers, 2], contiguous: reset to (2**63 - 1, 0), ready for the stamps of this round's attention
    out      an earlier list for as many keys, to be overwritten: then nothing is allocated (with `window`, or without a window)
    """
    batch = committed.shape[0]
    if batch > MAX_BATCH:
        raise ValueError(f"work_list takes batches of up to {MAX_BATCH} sequences, not {batch}")
    if stamps is not None and (stamps.dtype != torch.int64 or stamps.shape[-1] != 2 or not stamps.is_contiguous()):
        raise ValueError(f"stamps must be contiguous int64 [layers, 2], got {stamps.dtype} {list(stamps.shape)}")
    if out is None:
        if longest is None:
            raise ValueError("work_list needs `longest`, the most keys of any row, or `out`: the list is made on the device")
        out = empty(batch, kv_heads, longest, chunk, committed.device)
    if window is None and recent > 0:
        window = window_scalars(sink, recent, committed.device)
    from .gpu_kernels import plan_kernel

    plan_kernel[(batch,)](
        committed, node_depth, query_node, window, out.items, out.count, stamps, batch, kv_heads, query_node.shape[0],
        node_depth.shape[0], list_len, chunk, out.items.shape[0], 0 if stamps is None else stamps.numel() // 2,
        WINDOWED=window is not None, LISTED=window is not None and list_len > 0, BLOCK_B=1 << (batch - 1).bit_length(),
        BLOCK=ITEMS_AT_ONCE, MOST=MAX_QUERIES, num_warps=4,
    )  # fmt: skip
    return out


def empty(batch: int, kv_heads: int, longest: int, chunk: int, device: torch.device) -> WorkList:
    """Room for the list of any rows of up to `longest` keys, and a grid that fills the device."""
    items = batch * kv_heads * num_parts(min(longest, NO_LIMIT), chunk)
    programs = INTERPRETED_PROGRAMS
    if device.type == "cuda":
        programs = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return WorkList(
        torch.empty(items, 5, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int32, device=device), programs
    )
