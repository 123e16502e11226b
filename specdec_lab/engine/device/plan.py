"""What device rounds will allocate, from shapes alone, before anything is allocated; and what would fit instead.

Weights are loaded by then and not counted. Temporaries (temporaries.py) are those of a chain and of a tree of NODES drafted
tokens a row, whichever holds more: which configurations will run is not known yet. The pool of captured graphs holds them.
Lists are those of one SnapKV view of up to LISTED tokens. Not known here: allocators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec_kernels.tree_attention.gpu import default_chunk, num_parts, workspace_floats

from ...records import TreeShape
from ..cache import CacheTooLarge
from ..memory import slots_of
from ..models.groups import Processes
from ..models.loading import ModelPair
from ..models.runner import Runner
from ..sampling import Processor
from .state import ENTRY, MATCHING, TIMES
from .temporaries import Choosing, Widths, forward_bytes, reference_attention_bytes

NODES = 16
ASSUMED = (Widths.of(TreeShape.chain(NODES)), Widths.of(TreeShape.branching((4, 3))))
LISTED = 4096
LIST_COPIES = 3  # as chosen, as chosen anew, and the buffer that rounds read
ENTRY_BYTES = 4  # of a list
LIBRARIES_BYTES = 128 << 20  # workspaces of matrix products, compiled kernels
RANKS_BYTES = 512 << 20  # buffers through which NCCL's channels talk; an allowance
SORT_COPIES = 2  # of what torch sorts on a GPU, inside the one operation; an allowance
FLOAT, INT, ITEM = 4, 8, 20
GREEDY = Choosing(Processor(0.0), "rejection", "triton")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose.

    workspace    partial results of attention
    temporaries  logits, laws, noise and activations
    lists        what a SnapKV view names in every layer and KV head

    The first two are not there at the same time, yet an allocator need not find the place of one fit for the other.
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


def plan(
    pair: ModelPair, batch: int, max_tokens: int, rounds_per_read: int, choosing: Choosing = GREEDY,
    widths: Sequence[Widths] = ASSUMED,
) -> MemoryPlan:
    """For `batch` rows of up to `max_tokens` tokens, margin for drafts included, and rounds of these widths."""
    slots = slots_of(max_tokens)
    return MemoryPlan(
        _kv(pair.target, batch, slots), 0 if pair.draft is None else _kv(pair.draft, batch, slots),
        max(_workspace(pair, batch, slots, w, choosing) for w in widths),
        max(_temporaries(pair, batch, slots, w, choosing) for w in widths),
        batch * slots * INT + 2 * rounds_per_read * (batch * ENTRY + TIMES) * INT + batch * MATCHING * INT,
        LIST_COPIES * list_bytes(pair.target, batch, min(LISTED, slots)),
        LIBRARIES_BYTES + (RANKS_BYTES if _meets_on_gpus(pair.target) else 0),
    )  # fmt: skip


def list_bytes(runner: Runner, batch: int, budget: int) -> int:
    """Of lists of `budget` tokens."""
    return runner.shape.layers * batch * runner.shape.kv_heads * budget * ENTRY_BYTES


def check_memory(
    pair: ModelPair, batch: int, max_tokens: int, rounds_per_read: int, free: int | None, choosing: Choosing = GREEDY
) -> MemoryPlan:
    """The plan; CacheTooLarge with its numbers, and what fits instead, if it does not fit in `free` bytes (None: not known)."""
    made = plan(pair, batch, max_tokens, rounds_per_read, choosing)
    if free is None or made.total <= free:
        return made

    def fits(rows: int, tokens: int) -> bool:
        return plan(pair, rows, tokens, rounds_per_read, choosing).total <= free

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


def _workspace(pair: ModelPair, batch: int, slots: int, widths: Widths, choosing: Choosing) -> int:
    """Of attention: in verify, and in a draft forward through a window, whose parts are shorter."""
    if choosing.ops != "triton":
        return 0  # in the temporaries
    return max(
        _parts(runner, batch, slots, tokens, is_windowed)
        for runner, tokens in _forwards(pair, widths) for is_windowed in (False, True)
    )


def _parts(runner: Runner, batch: int, slots: int, queries: int, is_windowed: bool) -> int:
    """Partial results, and the list of parts."""
    s, chunk = runner.shape, default_chunk(windowed=is_windowed)
    floats = workspace_floats(batch, s.heads, queries, s.head_dim, slots, chunk)
    return FLOAT * floats + ITEM * batch * s.kv_heads * num_parts(slots, chunk)


def _forwards(pair: ModelPair, widths: Widths) -> list[tuple[Runner, int]]:
    """Who runs, and the most tokens that it is fed at once: verify, and a draft, whose first forward has two."""
    verify = (pair.target, widths.nodes + 1)
    return [verify] if pair.draft is None else [verify, (pair.draft, max(2, widths.fed))]


def _temporaries(pair: ModelPair, batch: int, slots: int, widths: Widths, choosing: Choosing) -> int:
    """The layers of a forward beside the laws kept so far; or everything that is as wide as the vocabulary."""
    shape, e, rows = pair.target.shape, pair.target.dtype.itemsize, widths.nodes + 1
    wide = max(choosing.widest(widths, e), _gathered(pair.target, rows, e) + widths.laws * choosing.law_kept(e))
    layers = max(_layers(runner, batch, tokens, slots, choosing) for runner, tokens in _forwards(pair, widths))
    kept = batch * widths.laws * choosing.law_kept(e) * shape.vocab
    moved = 0
    if choosing.ops != "triton":  # torch moves a tree's path through a copy of its keys and values
        moved = batch * widths.depth * shape.kv_bytes_per_token(pair.target.kv_dtype.itemsize) if widths.is_tree else 0
    beside = batch * rows * (4 * shape.hidden * e + 16 * widths.depth * INT) + batch * ENTRY * INT + moved
    sorts = choosing.sorted_rows(widths) * SORT_COPIES * (FLOAT + INT) if pair.target.device.type == "cuda" else 0
    return max(kept + layers, round(batch * shape.vocab * (wide + sorts))) + beside


def _layers(runner: Runner, batch: int, tokens: int, slots: int, choosing: Choosing) -> int:
    made = forward_bytes(runner.shape, batch, tokens, runner.dtype.itemsize)
    return made + (0 if choosing.ops == "triton" else reference_attention_bytes(runner.shape, batch, tokens, slots))


def _gathered(target: Runner, rows: int, e: int) -> float:
    """Logits of shards beside those that they make together, before and after they are put in order."""
    return 0.0 if target.group is None else rows * e * (2 + 1 / target.group.ranks)


def _meets_on_gpus(target: Runner) -> bool:
    return isinstance(target.group, Processes) and target.device.type == "cuda"
