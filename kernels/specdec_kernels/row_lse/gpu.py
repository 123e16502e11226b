"""row_lse on GPUs through Triton; meaning and arguments as in reference.py. One launch, no sync; with `out` no allocation.

logits / temperature is a product with the reciprocal, as torch's is on a GPU: within one float32 ulp of the quotient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise.gpu import check_out
from .reference import RowStats

BLOCK = 8192
TOKENS_PER_THREAD = 16
LOGITS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def row_lse(logits: Tensor, temperature: float, ids: Tensor | None = None, out: RowStats | None = None) -> RowStats:
    """See reference.row_lse."""
    from .gpu_kernels import stats_kernel

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
    block = block_of(vocabulary)
    stats_kernel[(rows,)](
        logits, ids, out.lse, out.best, out.best_value, out.logprob, 1.0 / temperature, logits.stride(0),
        0 if ids is None else ids.stride(0), ASKED=asked, BLOCK_K=1 << (max(asked, 1) - 1).bit_length(), V=vocabulary,
        BLOCK=block, num_warps=warps_of(block),
    )  # fmt: skip
    return out


def block_of(vocabulary: int, most: int = BLOCK) -> int:
    """Tokens that a program reads at once."""
    return int(min(most, max(32, 1 << (vocabulary - 1).bit_length())))


def warps_of(block: int) -> int:
    """So many that a thread has TOKENS_PER_THREAD of a full block."""
    return max(1, block // (32 * TOKENS_PER_THREAD))


def check_logits(logits: Tensor, temperature: float) -> None:
    """ValueError for logits that kernels would misread."""
    if logits.dtype not in LOGITS or logits.stride(-1) != 1:
        raise ValueError(
            f"logits are float32, bfloat16 or float16 without gaps along the vocabulary, got {logits.dtype} with strides "
            f"{logits.stride()}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}. Greedy decoding: take `best` with temperature 1")
