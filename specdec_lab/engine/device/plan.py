"""What device rounds will allocate, from shapes alone, before anything is allocated; and what would fit instead.

Weights are loaded by then and not counted. Temporaries are an upper bound for rounds of up to NODES drafted tokens a row; the
pool of captured graphs holds them. Lists are those of one SnapKV view of up to LISTED tokens. Not known here: allocators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from specdec_kernels.tree_attention.gpu import default_chunk, workspace_floats

from ..cache import CacheTooLarge
from ..memory import slots_of
from ..models.loading import ModelPair
from ..models.runner import Runner
from .state import ENTRY, MATCHING, TIMES

NODES = 16
LISTED = 4096
LIST_COPIES = 3  # as chosen, as chosen anew, and the buffer that rounds read
ENTRY_BYTES = 4  # of a list
LIBRARIES_BYTES = 128 << 20  # workspaces of matrix products, compiled kernels
FLOAT, INT = 4, 8


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose.

    workspace    partial results of attention
    temporaries  logits, kept draft logits and activations
    lists        what a SnapKV view names in every layer and KV head
    """

    target_kv: int
    draft_kv: int
    workspace: int
    temporaries: int
    state: int
    lists: int = 0
    libraries: int = LIBRARIES_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in self.__slots__)

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {getattr(self, name):,}" for name in self.__slots__)


def plan(pair: ModelPair, batch: int, max_tokens: int, rounds_per_read: int, nodes: int = NODES) -> MemoryPlan:
    """For `batch` rows of up to `max_tokens` tokens, margin for drafts included, and rounds of up to `nodes` drafts."""
    slots = slots_of(max_tokens)
    runners = [pair.target] if pair.draft is None else [pair.target, pair.draft]
    kept = batch * nodes * pair.target.shape.vocab * pair.target.dtype.itemsize  # draft logits, until they are verified
    return MemoryPlan(
        _kv(pair.target, batch, slots), 0 if pair.draft is None else _kv(pair.draft, batch, slots),
        max(_workspace(runner, batch, slots, nodes) for runner in runners),
        kept + max(_temporaries(runner, batch, nodes) for runner in runners),
        batch * slots * INT + 2 * rounds_per_read * (batch * ENTRY + TIMES) * INT + batch * MATCHING * INT,
        LIST_COPIES * list_bytes(pair.target, batch, min(LISTED, slots)),
    )  # fmt: skip


def list_bytes(runner: Runner, batch: int, budget: int) -> int:
    """Of lists of `budget` tokens."""
    return runner.shape.layers * batch * runner.shape.kv_heads * budget * ENTRY_BYTES


def check_memory(pair: ModelPair, batch: int, max_tokens: int, rounds_per_read: int, free: int | None) -> MemoryPlan:
    """The plan; CacheTooLarge with its numbers, and what fits instead, if it does not fit in `free` bytes (None: not known)."""
    made = plan(pair, batch, max_tokens, rounds_per_read)
    if free is None or made.total <= free:
        return made

    def fits(rows: int, tokens: int) -> bool:
        return plan(pair, rows, tokens, rounds_per_read).total <= free

    rows = _largest(batch, lambda n: fits(n, max_tokens))
    tokens = _largest(max_tokens, lambda n: fits(batch, n))
    raise CacheTooLarge(
        f"rounds on the device for {batch} sequences x {max_tokens} tokens need {made.total:,} bytes ({made}); {free:,} are "
        f"free. Of this length {rows} sequences fit; of this batch, {tokens} tokens."
    )


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits; 0 where 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _kv(runner: Runner, batch: int, slots: int) -> int:
    s = runner.shape
    return batch * slots * s.kv_bytes_per_token(runner.kv_dtype.itemsize)


def _workspace(runner: Runner, batch: int, slots: int, nodes: int) -> int:
    """Of verify, and of a draft forward through a window, whose parts are shorter."""
    s = runner.shape
    verify = workspace_floats(batch, s.heads, nodes + 1, s.head_dim, slots, default_chunk(windowed=False))
    return FLOAT * max(verify, workspace_floats(batch, s.heads, 2, s.head_dim, slots, default_chunk(windowed=True)))


def _temporaries(runner: Runner, batch: int, nodes: int) -> int:
    """Logits, and what the widest layer holds at once."""
    s, tokens = runner.shape, batch * (nodes + 1)
    widest = 4 * s.hidden + 4 * s.intermediate + 2 * (s.heads + 2 * s.kv_heads) * s.head_dim
    return tokens * (s.vocab + widest) * runner.dtype.itemsize
