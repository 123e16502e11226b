"""row_lse on GPUs through Triton; meaning and arguments as in reference.py. Two launches, no sync.

The first writes three numbers for every 4,096 tokens of a row, the second reads them. Torch allocates them, inside a capture
from the graph's own pool; `out` saves the other allocations.

logits / temperature is a product with the reciprocal, as torch's is on a GPU: within one float32 ulp of the quotient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise.gpu import check_out, power_of_two
from .reference import RowStats

BLOCK = 4096  # tokens of a row that one program reads: five rows of 128K keep 160 programs busy
TOKENS_PER_THREAD = 32
LOGITS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def row_lse(logits: Tensor, temperature: float, ids: Tensor | None = None, out: RowStats | None = None) -> RowStats:
    """See reference.row_lse."""
    from .gpu_kernels import join_kernel, stats_kernel

    rows, vocabulary = logits.shape
    asked = 0 if ids is None else ids.shape[1]
    out = RowStats.empty(rows, asked, logits.device) if out is None else out
    check_logits(logits, temperature)
    if ids is not None and (ids.shape[0] != rows or ids.dtype not in INTEGERS or ids.stride(1) != 1):
        raise ValueError(f"ids are int32 or int64 [{rows}, K] without gaps along K, got {ids.dtype} {list(ids.shape)}")
    check_out(out.lse, (rows,), (torch.float32,), "lse")
    check_out(out.best, (rows,), INTEGERS, "best")
    check_out(out.best_value, (rows,), (torch.float32,), "best_value")
    check_out(out.logprob, (rows, asked), (torch.float32,), "logprob")
    tile = stats_tile(vocabulary)
    blocks, inverse = -(-vocabulary // tile["BLOCK"]), 1.0 / temperature
    highest, total = torch.empty(2, rows, blocks, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    stats_kernel[(rows * blocks,)](logits, inverse, highest, total, where, logits.stride(0), V=vocabulary, **tile)
    join_kernel[(rows,)](
        logits, ids, highest, total, where, out.lse, out.best, out.best_value, out.logprob, inverse, logits.stride(0),
        0 if ids is None else ids.stride(0), ASKED=asked, BLOCK_K=power_of_two(asked), V=vocabulary, BLOCK=tile["BLOCK"],
        BLOCKS=power_of_two(blocks), num_warps=1,
    )  # fmt: skip
    return out


def stats_tile(vocabulary: int) -> dict[str, int]:
    """Tokens that a program reads, and its warps: so many that a thread has TOKENS_PER_THREAD of a full block."""
    block = block_of(vocabulary)
    return {"BLOCK": block, "num_warps": max(1, block // (32 * TOKENS_PER_THREAD))}


def block_of(vocabulary: int, most: int = BLOCK) -> int:
    """Tokens that a program reads at once."""
    return int(min(most, max(32, 1 << (vocabulary - 1).bit_length())))


def check_logits(logits: Tensor, temperature: float) -> None:
    """ValueError for logits that kernels would misread."""
    if logits.dtype not in LOGITS or logits.stride(-1) != 1:
        raise ValueError(
            f"logits are float32, bfloat16 or float16 without gaps along the vocabulary, got {logits.dtype} with strides "
            f"{logits.stride()}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}. Greedy decoding: take `best` with temperature 1")
