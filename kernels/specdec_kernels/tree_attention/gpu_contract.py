"""Every tile of the attention kernels that we ship, ready to be compiled for GPUs that are not here. See ../contract.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..contract import Compiled, compile_kernel
from .gpu import MAX_QUERIES, PARTS_AT_ONCE, block_d
from .gpu_tiles import ROW_BLOCKS, Tile, row_block, tile

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
STRIDES = ("q_batch", "q_query", "q_head", "kv_batch", "kv_head", "kv_slot", "out_batch", "out_query", "out_head")
KINDS: dict[str, dict[str, bool]] = {"full": {}, "window": {"WINDOWED": True}, "lists": {"WINDOWED": True, "LISTED": True}}
TYPES = {
    **dict.fromkeys(("committed", "words", "node_depth", "query_node", "window", "index", "work", "work_count"), "*i32"),
    **dict.fromkeys(("lse", "part_out", "part_lse"), "*fp32"), "scale_log2": "fp32", "stamps": "*i64",
}  # fmt: skip


def shipped(
    sms: tuple[int, ...] = (80, 90, 100), dims: tuple[int, ...] = (64, 128, 256), dtypes: tuple[str, ...] = ("bf16", "fp32"),
) -> Iterator[Callable[[], Compiled]]:  # fmt: skip
    """One function per kernel, GPU, row block, head size and dtype; calling it compiles. fp16 compiles like bf16."""
    for sm in sms:
        for dim in dims:
            for dtype in dtypes:
                for rows in ROW_BLOCKS:
                    if rows == row_block(rows, dim, BYTES[dtype]):
                        for kind in KINDS:
                            yield partial(split, sm, rows, dim, dtype, kind)
                            yield partial(split, sm, rows, dim, dtype, kind, work_list=True)
                        yield partial(split, sm, rows, dim, dtype, work_list=True, STAMPED=True)  # what rounds launch
                yield partial(combine, sm, dim, dtype)


def split(
    sm: int, rows: int, dim: int, dtype: str, kind: str = "full", *, work_list: bool = False, chosen: Tile | None = None,
    **more: Any,
) -> Compiled:  # fmt: skip
    """The main kernel for `rows` packed rows, as a launch on this GPU would compile it.

    kind    full, window or lists
    chosen  a tile to try instead of the shipped one
    more    constants of the kernel to compile otherwise: FINAL=True, STAMPED=True
    """
    from . import gpu_kernels

    kernel = gpu_kernels.list_kernel if work_list else gpu_kernels.split_kernel
    chosen = chosen or tile(rows, dim, BYTES[dtype], sm, _triton_minor(), windowed=kind != "full", work_list=work_list)
    constants = {
        "GROUP": 4, "DIM": dim, "BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_D": block_d(dim),
        "WINDOWED": False, "LISTED": False, "FINAL": False, "ALIASED": False, "STAMPED": False, "MOST": MAX_QUERIES,
        **KINDS[kind], **more,
    }  # fmt: skip
    work = "work list" if work_list else "grid"
    name = f"{work:9} {kind:6} {dtype} D={dim:<3} {chosen}{' stamped' * more.get('STAMPED', False)}"
    return _compile(kernel, dtype, constants, sm, chosen, name)


def combine(sm: int, dim: int, dtype: str) -> Compiled:
    """The kernel that joins parts."""
    from . import gpu_kernels

    constants = {
        "GROUP": 4, "DIM": dim, "BLOCK_D": block_d(dim), "BLOCK_S": PARTS_AT_ONCE, "WINDOWED": False, "LISTED": False,
        "STAMPED": False, "MOST": MAX_QUERIES,
    }  # fmt: skip
    return _compile(gpu_kernels.combine_kernel, dtype, constants, sm, Tile(1, 1, 1, 3), f"combine          {dtype} D={dim}")


def _compile(kernel: Any, dtype: str, constants: dict[str, Any], sm: int, chosen: Tile, name: str) -> Compiled:
    """With every tensor that this variant does without given as None, as a launch gives it."""
    absent = {"window": not constants["WINDOWED"], "index": not constants["LISTED"], "stamps": not constants["STAMPED"]}
    absent |= dict.fromkeys(("part_out", "part_lse"), bool(constants.get("FINAL")))
    constants = constants | {name: None for name, is_absent in absent.items() if is_absent}
    types = TYPES | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names if arg not in constants}
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    counts = [arg for arg, kind in signature.items() if kind == "i32" and arg not in STRIDES]
    return compile_kernel(
        kernel, signature, constants, sm, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        max_registers=chosen.max_registers, unaligned=counts, name=name,
    )  # fmt: skip


def _triton_minor() -> int:
    import triton

    return int(triton.__version__.split(".")[1])
