"""Which tile the Triton kernels run with: a table from what compiles without spills, to be re-measured per GPU.

Not known here: the kernels. `python -m specdec_kernels.contract` compiles every line.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_BLOCKS = (16, 32, 64)  # packed query rows of one program: 16 and 32 fit HMMA, 64 Hopper's warpgroups
CHUNK, WINDOW_CHUNK = 1024, 256  # keys of one part; fixed, so that a sequence's bits do not depend on its batch


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and keys of one step of the loop, and how it is spread and pipelined. Chunks are multiples of block_n.

    max_registers  per thread. Named, it keeps the assembler from spilling to fit one more block on a multiprocessor
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def __str__(self) -> str:
        registers = ", all registers" if self.max_registers else ""
        return f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages{registers}"


def row_block(rows: int) -> int:
    """The smallest row block that holds `rows`, or the largest, of which there are then several."""
    return next((block for block in ROW_BLOCKS if rows <= block), ROW_BLOCKS[-1])


def tile(
    rows: int, dim: int, element_bytes: int, sm: int, triton_minor: int, *, windowed: bool = False, work_list: bool = False,
) -> Tile:  # fmt: skip
    """The tile for this many packed rows, head size and size of a KV element, on this GPU and Triton 3.x."""
    del sm, triton_minor, windowed, work_list
    block_m = row_block(rows)
    return Tile(block_m, 64 if dim <= 128 and element_bytes == 2 else 32, 4, 3)
