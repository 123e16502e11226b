"""stamp on GPUs through Triton: one program that reads the GPU's global timer. Meaning and arguments as in reference.py.

Launched behind other kernels of its stream it starts when they have ended; in a CUDA graph every replay writes anew.
"""

from __future__ import annotations

from torch import Tensor


def stamp(table: Tensor, number: Tensor, column: int) -> None:
    """See reference.stamp. Triton's interpreter has no timer; use the reference there."""
    from .gpu_kernels import stamp_kernel

    stamp_kernel[(1,)](table, number, table.shape[0], table.stride(0), column, num_warps=1)
