"""The KV cache of one model: one tensor, per-row committed lengths, append beyond them, commit and roll back.

Slots at and beyond a row's committed length may hold garbage: drafts, padding, rejected tokens. Nothing reads them except
the forward that wrote them. The last slot is scratch for padding tokens. Not known here: who attends to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import memory

if TYPE_CHECKING:
    from .models.runner import Runner


class CacheTooLarge(MemoryError):
    """The KV cache does not fit; raised before allocation, with the bytes."""


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where it cannot be told."""
    if device.type == "cuda":  # what torch keeps for later is free to us too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def check_fits(runner: Runner, batch: int, tokens: int) -> None:
    """Raise CacheTooLarge if the KV of a model cannot hold `batch` sequences of `tokens`; nothing is allocated."""
    shape, free = runner.shape, available_bytes(runner.device)
    if free is not None:
        slot_bytes = shape.kv_bytes_per_token(runner.kv_dtype.itemsize)
        plan = memory.MemoryPlan(batch, tokens, slot_bytes, free, shape.params * runner.dtype.itemsize)
        if reason := plan.why_not(str(runner.device)):
            raise CacheTooLarge(reason)


class KvCache:
    """kv [layers, 2, batch, kv_heads, slots, head_dim]; committed [batch] int64, tokens whose KV is final."""

    def __init__(
        self, layers: int, batch: int, kv_heads: int, max_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        *, weight_bytes: int = 0,
    ) -> None:
        slots, free = memory.slots_of(max_tokens), available_bytes(device)
        slot_bytes = 2 * layers * kv_heads * head_dim * dtype.itemsize
        if free is not None:
            plan = memory.MemoryPlan(batch, max_tokens, slot_bytes, free, weight_bytes)
            if reason := plan.why_not(str(device)):
                raise CacheTooLarge(reason)
        # zeros, not empty: back ends that mask scores but not loads would turn a stray NaN into NaN output
        self.kv = memory.zeros((layers, 2, batch, kv_heads, slots, head_dim), dtype, device)
        self.committed = torch.zeros(batch, dtype=torch.int64, device=device)
        self.batch, self.kv_heads, self.slots, self.head_dim = batch, kv_heads, slots, head_dim
        rows = torch.arange(2 * batch * kv_heads, device=device) * slots
        self._row_starts = rows.view(2, batch, kv_heads, 1)
        self._flat = self.kv.view(layers, -1, head_dim)
        self.prepared: dict[Any, Any] = {}  # what a back end keeps with this cache: its calls and its workspace

    @property
    def scratch_slot(self) -> int:
        """Where padding tokens write; never read."""
        return self.slots - 1

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.slots - 1

    def write_index(self, slots: Tensor) -> Tensor:
        """Flat row numbers for `append`: slots [B, T] -> [2 * B * Hkv * T]. Built once per forward, used by every layer."""
        return (self._row_starts + slots[:, None, :]).reshape(-1)

    def append(self, layer: int, kv: Tensor, index: Tensor) -> None:
        """Write kv [2, B, Hkv, T, D] of one layer at `index` (from write_index)."""
        self._flat[layer].index_copy_(0, index, kv.reshape(-1, self.head_dim).to(self.kv.dtype))

    def fill_noise(self, lengths: Sequence[int], seed: int) -> None:
        """Standard normal keys and values up to lengths [B], in place of text that was read. Times do not depend on them."""
        generator = torch.Generator(self.kv.device).manual_seed(seed)
        for layer in self.kv:  # layer by layer: one call over all of them would be indexed with 64 bits
            layer[..., : max(lengths), :].normal_(generator=generator)
        self.committed = torch.tensor(list(lengths), dtype=torch.int64, device=self.committed.device)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K and V at slots [B, N], or [B, Hkv, N] where heads differ; each [B, Hkv, N, D]."""
        index = (self._row_starts + (slots if slots.dim() == 3 else slots[:, None, :])).reshape(-1)
        both = self._flat[layer].index_select(0, index).view(2, self.batch, self.kv_heads, -1, self.head_dim)
        return both[0], both[1]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each a view [B, Hkv, slots, D]."""
        return self.kv[layer, 0], self.kv[layer, 1]

    def compact(self, paths: Sequence[Sequence[int]], counts: Sequence[int]) -> None:
        """Move the KV of each row's accepted nodes next to its root, in all layers at once.

        paths, counts  per row the accepted nodes, numbered from the root (0) at the committed length, and how many of them
                       count. Node paths[b][i] goes to slot committed + 1 + i; nodes that lie there already are not touched.
        Nodes rise along a path, so a source lies at or behind its destination.
        """
        moves = [
            (row, node, place) for row, (path, count) in enumerate(zip(paths, counts, strict=True))
            for place, node in enumerate(path[:count], start=1) if node != place
        ]
        if not moves:
            return
        rows, sources, places = torch.tensor(moves, device=self.committed.device).T
        starts = self._row_starts[:, rows, :, 0] + self.committed[rows, None]  # [2, M, Hkv]
        kept = self._flat.index_select(1, (starts + sources[:, None]).flatten())  # read whole before anything is written
        self._flat.index_copy_(1, (starts + places[:, None]).flatten(), kept)

    def commit(self, counts: Tensor) -> None:
        """Declare counts [B] more tokens final."""
        self.committed = self.committed + counts

    def rollback(self, lengths: Tensor) -> None:
        """Forget everything beyond lengths [B]."""
        self.committed = lengths.clone()
