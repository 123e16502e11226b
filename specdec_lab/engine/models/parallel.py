"""Tensor parallelism for FastLlama: each rank holds its share of the heads, of the MLP and of the vocabulary.

Weights are cut by rank as they are read: rows of q, k, v, gate, up and the head; columns of o_proj and down. Partial sums are
added over all ranks after o_proj and after down, and the shares of the logits are gathered, so every rank sees the same logits
and, randomness being by counter, decides the same tokens (groups.py). Not known here: drafting, acceptance.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...costs import ModelShape
from ...records import ONE_SHARD
from .groups import Alone, Group, Processes
from .meeting import meeting

ROWS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.weight",
        "up_proj.weight", "lm_head.weight")  # fmt: skip
COLUMNS = ("o_proj.weight", "down_proj.weight")


class ParallelError(ValueError):
    """A model cannot be cut, or the processes are not those that were asked for; the message says why."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which share of a model this is."""

    rank: int
    ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ParallelError(f"a shard is rank 0..{self.ranks - 1} of {self.ranks}, got rank {self.rank}")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `1/8`: the first of eight."""
        first, slash, ranks = text.partition("/")
        if not slash or not first.isdigit() or not ranks.isdigit():
            raise ParallelError(f"shard {text!r} is not of the form N/RANKS, for example 1/8")
        return cls(int(first) - 1, int(ranks))

    @property
    def label(self) -> str:
        """What a header says of a shard that runs alone."""
        return f"{ONE_SHARD}{self.ranks}"

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor, a copy, so that the whole can be freed."""
        return tensor.chunk(self.ranks, dim)[self.rank].contiguous() if self.ranks > 1 else tensor


def why_not_cut(shape: ModelShape, ranks: int) -> str | None:
    """None if a model can be cut into so many shards, else the reason in words."""
    parts = {"heads": shape.heads, "key-value heads": shape.kv_heads, "columns of the MLP": shape.intermediate,
             "token ids": shape.vocab}  # fmt: skip
    bad = [f"{count:,} {what}" for what, count in parts.items() if count % ranks]
    return f"{', '.join(bad)} cannot be divided among {ranks} ranks" if bad else None


def join(ranks: int, device: torch.device) -> tuple[Shard, Processes]:
    """This process's shard and the group it belongs to; started by torchrun, which sets RANK and WORLD_SIZE."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ParallelError(f"--tensor-parallel {ranks} needs {ranks} processes: start it with "
                            f"torchrun --nproc-per-node {ranks} -m specdec_lab ...")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world != ranks:
        raise ParallelError(f"--tensor-parallel {ranks}, but {world} processes were started; make them equal")
    meeting()  # from here on a rank that fails is noticed by the others
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local >= there:
            raise ParallelError(f"rank {rank} needs a GPU of its own, and this machine has {there}; start fewer processes")
        torch.cuda.set_device(local)
    if not torch.distributed.is_initialized():
        has_nccl = device.type == "cuda" and torch.distributed.is_nccl_available()
        torch.distributed.init_process_group("nccl" if has_nccl else "gloo")
    return Shard(rank, ranks), _processes(ranks)


@lru_cache(maxsize=1)
def _processes(ranks: int) -> Processes:
    return Processes(ranks)


class ShardedWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint, cut for one rank when they are asked for."""

    def __init__(self, weights: Mapping[str, Tensor], shard: Shard) -> None:
        self._weights, self._shard = weights, shard

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        if name.endswith(ROWS):
            return self._shard.cut(tensor, 0)
        if name.endswith(COLUMNS):
            return self._shard.cut(tensor, 1)
        if name.endswith("o_proj.bias") and self._shard.rank:  # added once, by the first rank
            return torch.zeros_like(tensor)
        return tensor


def shard_config(config: Any, shape: ModelShape, ranks: int) -> Any:
    """The configuration whose sizes are those of one shard: its bytes and FLOPs are the shard's own."""
    reason = why_not_cut(shape, ranks)
    if reason is not None:
        raise ParallelError(f"{reason}. Use a number that divides them.")
    cut = copy.deepcopy(config)
    cut.head_dim = shape.head_dim
    cut.num_attention_heads, cut.num_key_value_heads = shape.heads // ranks, shape.kv_heads // ranks
    cut.intermediate_size = shape.intermediate // ranks
    return cut


@dataclass(frozen=True, slots=True)
class Placement:
    """A shard and the group in which it works."""

    shard: Shard
    group: Group

    @classmethod
    def of(cls, tensor_parallel: int, shard: str | Shard | None, device: torch.device) -> Placement | None:
        """The ranks of torchrun, one shard alone, or None for a whole model."""
        if tensor_parallel < 1:
            raise ParallelError(f"tensor_parallel must be at least 1, got {tensor_parallel}")
        if shard is not None:
            if tensor_parallel > 1:
                raise ParallelError("a shard runs alone; leave out shard or tensor_parallel")
            part = Shard.parse(shard) if isinstance(shard, str) else shard
            return cls(part, Alone(part.ranks))
        if tensor_parallel == 1:
            return None
        part, group = join(tensor_parallel, device)
        return cls(part, group)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of a shard without its group."""
        return (self.shard.label,) if isinstance(self.group, Alone) else ()
