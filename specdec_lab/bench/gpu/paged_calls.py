"""Kernels of others that read keys and values in pages: torch's variable-length attention, and FlashInfer.

A row of our cache is a run of whole pages already, head by head, so a page is a view of it whose heads lie a row's slots apart:
nothing is copied, and they read the very bytes that our kernels read. Whether a kernel honours such strides is not taken on
trust: like all others it is compared with float64 before it is timed. Not known here: how calls are timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attempts import Attempt

if TYPE_CHECKING:
    from .attention_calls import Stage

PAGE = 256  # tokens; torch's kernel takes multiples of it, and rows of our caches hold whole ones
WORKSPACE_BYTES = 128 << 20  # what FlashInfer's authors recommend
NO_WINDOW = "it reads whole pages, and a window of ours is no run of pages"
NEEDED = ("seqused_k", "block_table")  # of varlen_attn, from torch 2.12.1

Launch = Callable[[int], Tensor]


def pages_of(x: Tensor) -> Tensor:
    """K or V of a layer [B, Hkv, S, D], contiguous -> its pages [P, Hkv, PAGE, D], a view; see page_table."""
    batch, heads, slots, dim = x.shape
    if slots % PAGE or not x.is_contiguous():
        raise ValueError(f"a row of {slots} slots is no run of whole pages of {PAGE}")
    pages = ((batch - 1) * heads + 1) * (slots // PAGE)  # of the last row only those of its first head
    return x.as_strided((pages, heads, PAGE, dim), (PAGE * dim, slots * dim, dim, 1))


def page_table(batch: int, heads: int, slots: int, keys: int, device: torch.device) -> Tensor:
    """int32 [B, pages that hold the first `keys` tokens]: where a row's pages are among pages_of."""
    first = torch.arange(batch, device=device) * heads * (slots // PAGE)
    return (first[:, None] + torch.arange(-(-keys // PAGE), device=device)).to(torch.int32)


def _table(stage: Stage) -> tuple[Tensor, int]:
    """The table of a stage's cache, and how many tokens of every row are read: prefix and drafted tokens."""
    keys = stage.cell.shape.cell.length + stage.cell.queries
    cache = stage.cache
    return page_table(cache.batch, cache.kv_heads, cache.slots, keys, stage.q.device), keys


def _starts(batch: int, each: int, device: torch.device) -> Tensor:
    """int32 [B + 1]: where every row begins when rows of `each` follow one another."""
    return torch.arange(0, batch * each + 1, each, dtype=torch.int32, device=device)


def varlen(stage: Stage) -> Launch | str:
    """torch.nn.attention.varlen over our pages, or why not."""
    if stage.cell.view is not None:
        return NO_WINDOW
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    attend: Any = import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(attend).parameters
    if missing := [name for name in NEEDED if name not in known]:
        return (f"varlen_attn of torch {torch.__version__} takes no {' and no '.join(missing)} (both come with torch 2.12.1), "
                "so it cannot read a cache with room behind its tokens; a copy of the cache would not be the same read")
    table, keys = _table(stage)
    batch, queries, heads, dim = stage.q.shape
    pairs = [[pages_of(part).transpose(1, 2) for part in stage.cache.layer(layer)] for layer in range(stage.layers)]
    starts, ends = (_starts(batch, each, stage.q.device) for each in (queries, keys))
    used = torch.full((batch,), keys, dtype=torch.int32, device=stage.q.device)
    q = stage.q.view(batch * queries, heads, dim)
    options = {"enable_gqa": True} if "enable_gqa" in known and stage.cell.shape.group > 1 else {}

    def launch(turn: int) -> Tensor:
        k, v = pairs[turn % stage.layers]
        out: Tensor = attend(
            q, k, v, starts, ends, queries, keys, scale=stage.scale, seqused_k=used, block_table=table, **options
        )
        return out.view(batch, queries, heads, dim)

    return tried(launch)


def flashinfer(stage: Stage) -> Launch | str:
    """FlashInfer's decode wrapper for one query per row, its prefill wrapper for more; or why not. Its plan is made here."""
    if stage.cell.view is not None:
        return NO_WINDOW
    if find_spec("flashinfer") is None:
        return "FlashInfer is not installed (package flashinfer-python; it compiles at its first call, with nvcc and ninja)"
    attempt = Attempt()
    with attempt:
        module = import_module("flashinfer")
        name = f"Batch{'Decode' if stage.cell.queries == 1 else 'Prefill'}WithPagedKVCacheWrapper"
        if not hasattr(module, name):
            return f"the flashinfer package here has no {name}"
        run = _planned(stage, getattr(module, name))
        pairs = [tuple(map(pages_of, stage.cache.layer(layer))) for layer in range(stage.layers)]
        batch, queries, heads, dim = stage.q.shape
        q = stage.q.view(batch * queries, heads, dim)

        def launch(turn: int) -> Tensor:
            out: Tensor = run(q, pairs[turn % stage.layers])
            return out.view(batch, queries, heads, dim)

        return tried(launch)
    return _reason(attempt)


def _planned(stage: Stage, make: Any) -> Any:
    """`run` of a wrapper whose plan holds for every layer."""
    table, keys = _table(stage)
    batch, queries, heads, dim = stage.q.shape
    device, shape = stage.q.device, stage.cell.shape
    pages = table.shape[1]
    of_pages = (_starts(batch, pages, device), table.flatten(), torch.full_like(table[:, 0], keys - (pages - 1) * PAGE))
    sizes = (heads, shape.kv_heads, dim, PAGE)
    options = {"sm_scale": stage.scale, "q_data_type": stage.q.dtype, "kv_data_type": stage.cache.kv.dtype}
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if queries == 1:
        wrapper = make(workspace, "HND", use_tensor_cores=shape.group > 1)
        wrapper.plan(*of_pages, *sizes, **options)
    else:
        wrapper = make(workspace, "HND")
        wrapper.plan(_starts(batch, queries, device), *of_pages, *sizes, causal=False, **options)
    return wrapper.run


def tried(launch: Launch) -> Launch | str:
    """The launch if it runs once, else why it does not; a memory that is too small is raised, being no trait of a kernel."""
    attempt = Attempt()
    with attempt:
        launch(0)
    return launch if not attempt.reason else _reason(attempt)


def _reason(attempt: Attempt) -> str:
    if attempt.is_memory:
        raise MemoryError(attempt.reason)
    return attempt.reason
