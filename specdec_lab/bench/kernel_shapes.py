"""What an attention kernel is timed in. Standard library only, so that a command line can be parsed with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..records import Cell, ParseError, TreeShape


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Sequences x tokens of context, and the KV heads of one layer. Spelled `8x4096/3x64`, with a group `8x8k/4x64g2`.

    group  query heads per KV head
    """

    cell: Cell
    kv_heads: int
    head_dim: int
    group: int = 1

    def __post_init__(self) -> None:
        if min(self.kv_heads, self.head_dim, self.group) < 1:
            raise ValueError(f"KernelShape counts must be at least 1, got {self}")

    def __str__(self) -> str:
        return f"{self.cell}/{self.kv_heads}x{self.head_dim}" + (f"g{self.group}" if self.group > 1 else "")

    @classmethod
    def parse(cls, text: str) -> KernelShape:
        """Read `8x4096/3x64` or `8x8k/4x64g2`."""
        match = re.fullmatch(r"([^/]+)/(\d+)x(\d+)(?:g(\d+))?", text.strip())
        if match is None:
            raise ParseError(f"shape {text!r} is not BATCHxLENGTH/KVHEADSxDIM, as 8x4k/3x64, or with a group 8x8k/4x64g2")
        return cls(Cell.parse(match[1]), int(match[2]), int(match[3]), int(match[4] or 1))

    def kv_bytes(self, num_nodes: int, element_bytes: int) -> int:
        """Keys and values that one call must read: the context and the nodes of the round, each once."""
        return 2 * self.cell.batch * self.kv_heads * (self.cell.length + num_nodes) * self.head_dim * element_bytes


# Plain heads; the shipped pair where its KV is half again as large as a cache of 32 MiB, and where it is six times that; GQA.
SHAPES = tuple(KernelShape.parse(s) for s in ("2x8192/8x64", "8x4096/3x64", "16x8192/3x64", "8x8192/4x64g2"))
QUERIES = (1, 2, 4, 5, 8, 16)
TREE = TreeShape.parse("3,2,1")  # 15 drafted nodes and the root: 16 queries
DTYPES = ("float32", "bfloat16")
BLOCKS, CALLS = 8, 4  # of every measured thing, calls in a block
