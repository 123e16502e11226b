"""What fits is planned before it is allocated; large tensors lie on huge pages where the system offers them.

Through 4 KiB pages, KV reads reach two thirds of the bandwidth.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 4096
MADV_HUGEPAGE = 14  # Linux, <sys/mman.h>
WORTH_BYTES = 4 << 20
SLOT_MULTIPLE = 256


def slots_of(tokens: int) -> int:
    """Slots of a row that holds `tokens`: one more for padding, in whole multiples."""
    return -(-(tokens + 1) // SLOT_MULTIPLE) * SLOT_MULTIPLE


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The KV cache of `batch` sequences of `tokens`, beside what is free.

    weight_bytes  of the model the cache belongs to, already allocated; 0 where it is not known
    """

    batch: int
    tokens: int
    slot_bytes: int  # keys and values of one token, all layers
    free_bytes: int
    weight_bytes: int = 0

    @property
    def kv_bytes(self) -> int:
        """Of the whole cache."""
        return self.batch * slots_of(self.tokens) * self.slot_bytes

    @property
    def largest_batch(self) -> int:
        """Sequences of this length that fit; 0 if not even one."""
        return self.free_bytes // (slots_of(self.tokens) * self.slot_bytes)

    @property
    def largest_length(self) -> int:
        """Tokens per sequence that fit for this batch; 0 if not even one."""
        slots = self.free_bytes // (self.batch * self.slot_bytes) // SLOT_MULTIPLE * SLOT_MULTIPLE
        return max(slots - 1, 0)

    def why_not(self, device: str) -> str | None:
        """None if it fits, else the bytes, and the largest batch and length that fit."""
        if self.kv_bytes <= self.free_bytes:
            return None
        beside = f" beside {self.weight_bytes:,} bytes of weights" if self.weight_bytes else ""
        fits = [f"{self.largest_batch:,} sequences of this length"] if self.largest_batch else []
        fits += [f"{self.batch:,} of {self.largest_length:,} tokens"] if self.largest_length else []
        return (
            f"the KV cache of {self.batch} sequences x {self.tokens} tokens needs {self.kv_bytes:,} bytes{beside}; "
            f"{self.free_bytes:,} are free on {device}. Use a smaller batch or length: "
            + (f"at most {' or '.join(fits)} fit." if fits else "not even one sequence of this length fits.")
        )


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a Linux CPU large ones ask for huge pages before the memory is first touched."""
    if device.type != "cpu" or sys.platform != "linux":
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = torch.empty(*shape, dtype=dtype)
    start, size = memory.data_ptr(), memory.numel() * memory.itemsize
    if size >= WORTH_BYTES:
        first = -(-start // PAGE) * PAGE
        # advice: a kernel without huge pages ignores it, and nothing depends on it but speed
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t((start + size - first) // PAGE * PAGE), MADV_HUGEPAGE)
    return memory.zero_()
