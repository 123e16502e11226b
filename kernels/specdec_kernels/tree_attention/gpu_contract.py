"""Every tile of the attention kernels that we ship, ready to be compiled for GPUs that are not here. See ../contract.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..contract import Compiled, compile_kernel
from .gpu import MAX_QUERIES, PARTS_AT_ONCE
from .gpu_tiles import ROW_BLOCKS, Tile, tile

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
INTEGERS = ("committed", "node_depth", "query_node")
STRIDES = ("q_batch", "q_query", "q_head", "kv_batch", "kv_head", "kv_slot", "out_batch", "out_query", "out_head")
KINDS = {"full": {}, "window": {"WINDOWED": True}, "list": {"WINDOWED": True, "LISTED": True}}


def shipped(
    sms: tuple[int, ...] = (80, 90, 100), dims: tuple[int, ...] = (64, 128, 256), dtypes: tuple[str, ...] = ("bf16", "fp32"),
) -> Iterator[Callable[[], Compiled]]:  # fmt: skip
    """One function per kernel, GPU, row block, head size and dtype; calling it compiles. fp16 compiles like bf16."""
    for sm in sms:
        for dim in dims:
            for dtype in dtypes:
                for rows in ROW_BLOCKS:
                    yield lambda a=(sm, rows, dim, dtype): split(*a)
                yield lambda a=(sm, 16, dim, dtype): split(*a, "window")
                yield lambda a=(sm, 16, dim, dtype): split(*a, "list")
                yield lambda a=(sm, 16, dim, dtype): split(*a, work_list=True)
                yield lambda a=(sm, dim, dtype): combine(*a)


def split(
    sm: int, rows: int, dim: int, dtype: str, kind: str = "full", work_list: bool = False, chosen: Tile | None = None,
    **more: Any,
) -> Compiled:  # fmt: skip
    """The main kernel for `rows` packed rows, as a launch on this GPU would compile it.

    chosen  a tile to try instead of the shipped one
    more    constants of the kernel to compile otherwise: FINAL=True, STAMPED=True
    """
    from . import gpu_kernels

    kernel = gpu_kernels.list_kernel if work_list else gpu_kernels.split_kernel
    chosen = chosen or tile(rows, dim, BYTES[dtype], sm, _triton_minor())
    constants = {
        "GROUP": 4, "DIM": dim, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),
        "WINDOWED": False, "LISTED": False, "FINAL": False, "ALIASED": False, "STAMPED": False, "MOST": MAX_QUERIES,
        **KINDS[kind], **more,
    }  # fmt: skip
    name = f"{'list' if work_list else 'split'} {kind:6} {dtype} D{dim:<3} {chosen.block_m}x{chosen.block_n} w{chosen.num_warps} s{chosen.num_stages}"
    return _compile(kernel, dtype, constants, sm, chosen.num_warps, chosen.num_stages, name)


def combine(sm: int, dim: int, dtype: str) -> Compiled:
    """The kernel that joins parts."""
    from . import gpu_kernels

    constants = {
        "GROUP": 4, "DIM": dim, "BLOCK_D": max(16, 1 << (dim - 1).bit_length()), "BLOCK_S": PARTS_AT_ONCE, "WINDOWED": False,
        "LISTED": False, "STAMPED": False, "MOST": MAX_QUERIES,
    }  # fmt: skip
    return _compile(gpu_kernels.combine_kernel, dtype, constants, sm, 1, 3, f"combine {dtype} D{dim}")


def _compile(kernel: Any, dtype: str, constants: dict[str, Any], sm: int, warps: int, stages: int, name: str) -> Compiled:
    types = {"lse": "*fp32", "part_out": "*fp32", "part_lse": "*fp32", "scale_log2": "fp32", "words": "*i32", "stamps": "*i64"}
    types |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(("work", "work_count"), "*i32")
    types |= dict.fromkeys(INTEGERS, "*i32") | {"window": "*i32", "index": "*i32"}
    absent = {"window"} if not constants["WINDOWED"] else set()
    absent |= {"index"} if not constants["LISTED"] else set()
    absent |= {"stamps"} if not constants["STAMPED"] else set()
    absent |= {"part_out", "part_lse"} if constants.get("FINAL") else set()
    constants = constants | dict.fromkeys(absent)
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constants}
    constants = {a: value for a, value in constants.items() if a in kernel.arg_names}
    scalars = [a for a, t in signature.items() if t == "i32" and a not in STRIDES]
    return compile_kernel(
        kernel, signature, constants, sm, num_warps=warps, num_stages=stages, unaligned=scalars, name=name
    )


def _triton_minor() -> int:
    import triton

    return int(triton.__version__.split(".")[1])
