"""tree_attention on CPUs through the compiled kernel; meaning and arguments as in reference.py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..build import CannotBuild, load_library

MAX_QUERIES = MAX_NODES = 64
MAX_DIM = 256
_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Call(ctypes.Structure):
    """The C struct of the same name, field by field."""

    _fields_ = (
        [(n, _P) for n in ("q", "k", "v", "out", "lse", "committed", "corner", "node_depth", "query_node", "index",
                           "rows", "workspace")]
        + [(n, _I64) for n in ("q_batch", "q_query", "q_head", "kv_batch", "kv_head", "kv_slot", "out_batch", "out_query",
                               "out_head", "slots", "sink", "recent", "index_len", "index_layer")]
        + [(n, _I32) for n in ("batch", "queries", "heads", "kv_heads", "dim", "nodes", "bf16", "threads", "num_rows")]
        + [("scale", ctypes.c_float)]
    )  # fmt: skip


def why_not(dim: int, dtype: torch.dtype, target: str = "native", folder: Path | None = None) -> str | None:
    """None if the kernel runs here for this head size and KV dtype, else the reason in one sentence."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled kernel reads float32 or bfloat16 KV, not {str(dtype).removeprefix('torch.')}"
    try:
        width = load_library(target, folder).tree_attention_width()
    except CannotBuild as error:
        return str(error)
    if dim % width or dim > MAX_DIM:
        return f"the compiled kernel takes head sizes that are multiples of {width} up to {MAX_DIM}, not {dim}"
    return None


def corner_bits(corner: Tensor) -> Tensor:
    """bool [T, C] -> int64 [T], bit c set where the query sees node c (bit 63 is the sign)."""
    words = [sum(1 << c for c, seen in enumerate(row) if seen) for row in corner.tolist()]
    return torch.tensor([w - (1 << 64) if w >= 1 << 63 else w for w in words], dtype=torch.int64)


def check_code(code: int, call: Call) -> None:
    """Raise ValueError for a non-zero return of the kernel, which then has touched no memory."""
    if code == 0:
        return
    reasons = {
        1: f"batch {call.batch}, heads {call.heads} and KV heads {call.kv_heads} do not fit together",
        2: f"head size {call.dim} is not a multiple of the vector width, or above {MAX_DIM}",
        3: f"{call.queries} queries per sequence; 1 to {MAX_QUERIES} are possible",
        4: f"{call.nodes} corner nodes; 1 to {MAX_NODES} are possible, and every query must be one of them",
        5: f"{call.threads} threads", 6: "the workspace is missing",
        7: "a row to attend for is not in the batch, or rows do not ascend",
    }
    beyond = f"row {code - 1000} has more committed tokens and nodes than its {call.slots} slots hold"
    if call.index:
        beyond += f", or an index entry that is not above the one before it, or not before the window of {call.recent}"
    what = reasons.get(code, beyond)
    raise ValueError(f"tree_attention refused: {what}")


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, committed: Tensor, corner: Tensor, node_depth: Tensor, query_node: Tensor, *,
    scale: float, sink: int = 0, recent: int = 0, index: Tensor | None = None, threads: int | None = None,
    target: str = "native", folder: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.tree_attention. q in float32; k and v float32 or bfloat16, last dimension contiguous.

    returns  o [B, T, Hq, D] float32 and the natural log-sum-exp [B, T, Hq] float32
    raises   ValueError for shapes and lengths beyond capacity, before any memory is touched
    """
    if q.dtype != torch.float32 or k.dtype != v.dtype or k.stride() != v.stride() or k.stride(3) != 1 or q.stride(3) != 1:
        raise ValueError(
            "tree_attention takes float32 queries, and keys and values of one dtype and layout, last dimension contiguous"
        )
    library = load_library(target, folder)
    bits, depths, nodes = corner_bits(corner), node_depth.to(torch.int32), query_node.to(torch.int32)
    committed = committed.to(torch.int64).contiguous()
    listed = index.to(torch.int32).contiguous() if index is not None else None
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:3])
    call = Call(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), committed.data_ptr(), bits.data_ptr(),
        depths.data_ptr(), nodes.data_ptr(), listed.data_ptr() if listed is not None else None, None, None,
        *q.stride()[:3], *k.stride()[:3], *out.stride()[:3],
        k.shape[2], sink, recent, listed.shape[2] if listed is not None else 0, 0,
        q.shape[0], q.shape[1], q.shape[2], k.shape[1], q.shape[3], corner.shape[1], k.dtype == torch.bfloat16,
        threads or torch.get_num_threads(), 0, scale,
    )  # fmt: skip
    check_code(library.tree_attention_check_index(ctypes.byref(call), 1), call)
    check_code(library.tree_attention_check(ctypes.byref(call)), call)
    workspace = aligned(library.tree_attention_workspace(ctypes.byref(call)))
    call.workspace = workspace.data_ptr()
    check_code(library.tree_attention(ctypes.byref(call)), call)
    return out, lse


def aligned(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that starts at a multiple of 64 bytes."""
    memory = torch.empty(elements + 64 // dtype.itemsize, dtype=dtype)
    start = -memory.data_ptr() % 64 // dtype.itemsize
    return memory[start : start + elements]
