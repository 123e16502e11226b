"""Which tile the Triton kernels run with: those that compile without spills, in one table. None is measured on a GPU yet.

Not known here: the kernels. `python -m specdec_kernels.contract` compiles every line of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_BLOCKS = (16, 32, 64)  # packed query rows of one program: 16 and 32 for HMMA, 64 for HGMMA (Hopper) and UTCHMMA (Blackwell)
CHUNK, WINDOW_CHUNK = 1024, 256  # keys of one part; fixed, so that a sequence's bits do not depend on its batch
ALL = 255  # registers per thread


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
        registers = f", {'all' if self.max_registers == ALL else self.max_registers} registers" if self.max_registers else ""
        return f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages{registers}"


# (bytes of a KV element, largest head size) -> the tiles of growing row blocks, first for whole prefixes, then for windows
Tiles = tuple[Tile, ...]
TABLE: dict[tuple[int, int], tuple[Tiles, Tiles]] = {
    (2, 64): (
        (Tile(16, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)),
        (Tile(16, 64, 4, 3, ALL), Tile(32, 64, 4, 3, ALL), Tile(64, 32, 4, 2, ALL)),
    ),
    (2, 128): (
        (Tile(16, 64, 4, 3, ALL), Tile(32, 64, 4, 3, ALL), Tile(64, 64, 4, 3, ALL)),
        (Tile(16, 64, 4, 3, ALL), Tile(32, 64, 4, 3, ALL), Tile(64, 32, 4, 2, ALL)),
    ),
    (2, 256): ((Tile(16, 32, 4, 3, ALL), Tile(32, 32, 4, 3, ALL)), (Tile(16, 32, 4, 3, ALL), Tile(32, 32, 4, 3, ALL))),
    (4, 64): ((Tile(16, 32, 8, 2, ALL),), (Tile(16, 32, 8, 2, ALL),)),
    (4, 128): ((Tile(16, 32, 8, 2, ALL),), (Tile(16, 16, 8, 2, ALL),)),
    (4, 256): ((Tile(16, 16, 8, 2, ALL),), (Tile(16, 16, 8, 2, ALL),)),
}
# (Triton 3.x, sm, bytes, largest head size, row block, windowed, from a work list) -> the tile of this combination alone
EXCEPTIONS: dict[tuple[int, int, int, int, int, bool, bool], Tile] = {
    # with stamps the assembler takes 96 registers and spills; it takes 128 without, and as many programs then share an SM
    **{(minor, 90, 2, 64, 16, False, True): Tile(16, 64, 4, 3, 128) for minor in (6, 7)},
    # with stamps it spills with all of them
    **{(minor, 90, 2, 128, 64, False, True): Tile(32, 64, 4, 3, ALL) for minor in (7, 9)},
    **{(minor, 90, 4, 128, 16, False, True): Tile(16, 16, 8, 2, ALL) for minor in (7, 9)},
    # with Blackwell's accumulators the loop over a work list spills at 64 rows
    **{(minor, 100, 2, 128, 64, windowed, True): Tile(32, 64, 4, 3, ALL) for minor in (6, 7, 9) for windowed in (False, True)},
}


def tile(
    rows: int, dim: int, element_bytes: int, sm: int, triton_minor: int, *, windowed: bool = False, work_list: bool = False,
) -> Tile:  # fmt: skip
    """The tile for this many packed rows, head size and size of a KV element, on this GPU and Triton 3.x."""
    block, size = row_block(rows, dim, element_bytes), _size(dim)
    usual = next(t for t in TABLE[element_bytes, size][windowed] if t.block_m == block)
    return EXCEPTIONS.get((triton_minor, sm, element_bytes, size, block, windowed, work_list), usual)


def row_block(rows: int, dim: int, element_bytes: int) -> int:
    """The smallest row block that holds `rows`, or the largest, of which there are then several."""
    blocks = [t.block_m for t in TABLE[element_bytes, _size(dim)][0]]
    return next((block for block in blocks if rows <= block), blocks[-1])


def _size(dim: int) -> int:
    return next(size for size in (64, 128, 256) if dim <= size)
