"""One attention call of one layer at a cell: our back ends through the engine's seam, and what others offer, over the same KV.

Others read the same keys and values with the same queries; where they cannot mask a tree or a corner they attend to the whole
prefix without one, which the row says: as many bytes, as many FLOPs. Not known here: how calls are timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.attention import AttentionBackend, Need, Reads
from ...engine.backends import AUTOMATIC, BACKENDS
from ...engine.batch import Forward, count_forward
from ...engine.cache import KvCache
from ...engine.conformance.cases import Corner, Situation
from ...engine.conformance.judging import meaning, worst_row
from ...engine.memory import slots_of
from ...records import KvView
from .paged_calls import flashinfer, tried, varlen
from .sizes import KernelCell

QUICK = ("sdpa-flash", "sdpa-flash-folded", "sdpa-efficient-folded", "flash_attn-unmasked", "varlen_attn")
COMPILED = ("flex", "flashinfer")  # for seconds, when they first see a shape
NO_CORNER = "attends to the whole prefix, no mask among the drafted tokens"
PLANNED = "its plan is made beforehand and not timed"
NO_WINDOW = "reads a dense copy of the window, whose making is not timed"


Make = Callable[["Stage"], "Callable[[int], Tensor] | str"]


@dataclass(frozen=True, slots=True)
class Call:
    """Something to be timed: launch(turn) attends once to the layer whose turn it is."""

    name: str
    launch: Callable[[int], Tensor]
    says: str = ""


class Stage:
    """Random KV of a cell in `layers` layers, which are read in turn, and random queries."""

    def __init__(self, cell: KernelCell, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        shape, batch, length = cell.shape, cell.shape.cell.batch, cell.shape.cell.length
        self.cell, self.corner = cell, corner_of(cell)
        self.cache = KvCache(layers, batch, shape.kv_heads, length + cell.queries, shape.head_dim, dtype, device)
        for layer in self.cache.kv:  # one at a time: a normal draw of all would need as much again
            layer.normal_()
        self.cache.committed = torch.full((batch,), length, device=device)
        heads = shape.kv_heads * shape.group
        self.q = torch.randn(batch, cell.queries, heads, shape.head_dim, device=device, dtype=dtype)
        self.scale = shape.head_dim**-0.5

    @cached_property
    def situation(self) -> Situation:
        """As the engine and the conformance suite put it."""
        cell, committed = self.cell, self.cache.committed
        nodes = self.corner.tensors(committed.device)
        longest = cell.shape.cell.length + len(self.corner.parents)
        reads = Reads(committed, *nodes, cell.view or KvView.full(), longest, True, self.corner.is_chain)
        return Situation(self.q, self.cache, reads, cell.shape.group, None, self.scale)

    @property
    def need(self) -> Need:
        """What the call asks of a back end."""
        cell = self.cell
        return Need(self.q.device.type, self.cache.kv.dtype, cell.shape.head_dim, cell.shape.group, cell.queries,
                    tree=cell.is_tree, window=cell.view is not None)

    @property
    def counts(self) -> Forward:
        """Keys and pairs of one call, exactly; a tree's nodes see fewer keys of its corner than a chain's do."""
        shape, queries = self.cell.shape.cell, self.cell.queries
        counted = count_forward([shape.length] * shape.batch, queries, self.cell.view or KvView.full())
        if not self.cell.is_tree:
            return counted
        seen = sum(depth + 1 for depth in self.corner.tensors(torch.device("cpu"))[1].tolist())
        return Forward(shape.batch, queries, counted.keys, shape.batch * (queries * shape.length + seen))

    @property
    def kv_bytes(self) -> int:
        """Keys and values that one call must read."""
        shape = self.cell.shape
        return 2 * self.counts.keys * shape.kv_heads * shape.head_dim * self.cache.kv.itemsize

    @property
    def flops(self) -> int:
        """Of one call: two products per query-key pair."""
        shape = self.cell.shape
        return 4 * self.counts.pairs * shape.kv_heads * shape.group * shape.head_dim

    @property
    def layers(self) -> int:
        """Layers that take turns."""
        return int(self.cache.kv.shape[0])


def corner_of(cell: KernelCell) -> Corner:
    """A chain, or a tree in which every node has two children."""
    count = cell.queries
    parents = tuple((node - 1) // 2 if node else -1 for node in range(count)) if cell.is_tree else tuple(range(-1, count - 1))
    return Corner(f"{'binary tree' if cell.is_tree else 'chain'} of {count}", parents, tuple(range(count)))


def layer_bytes(cell: KernelCell, itemsize: int) -> int:
    """What one layer of a cell's cache occupies."""
    shape = cell.shape
    slots = slots_of(shape.cell.length + cell.queries)
    return 2 * shape.cell.batch * shape.kv_heads * slots * shape.head_dim * itemsize


def read_bytes(cell: KernelCell, itemsize: int) -> int:
    """What one call reads of its layer, about."""
    most = cell.view.max_tokens if cell.view else None
    keys = cell.shape.cell.length if most is None else min(most, cell.shape.cell.length)
    return 2 * cell.shape.cell.batch * cell.shape.kv_heads * keys * cell.shape.head_dim * itemsize


def ours(stage: Stage) -> Iterator[Call | tuple[str, str]]:
    """A call per back end that can, or (name, why not)."""
    for name, backend in BACKENDS.items():
        if name == "reference":
            continue
        reason = backend.why_not(stage.need)
        yield (name, reason) if reason else Call(name, attend_with(backend, stage))


def best(stage: Stage) -> str | None:
    """Which of ours the engine would take, and so the one that the bars are for."""
    names = AUTOMATIC.get(stage.q.device.type, ())
    return next((name for name in names if BACKENDS[name].why_not(stage.need) is None), None)


def attend_with(backend: AttentionBackend, stage: Stage) -> Callable[[int], Tensor]:
    """A launch through the engine's seam; what a forward makes once for all its layers is made here."""
    situation = stage.situation
    plan = situation.plan(backend)
    return lambda turn: backend.attend(situation.q, stage.cache, turn % stage.layers, plan, stage.scale)


def others(stage: Stage, names: Iterable[str]) -> Iterator[Call | tuple[str, str]]:
    """What torch and others offer for the same read, or (name, why not)."""
    makers: dict[str, Make] = {
        "sdpa-flash": _sdpa("FLASH_ATTENTION"), "sdpa-flash-folded": _sdpa("FLASH_ATTENTION", folds=True),
        "sdpa-efficient-folded": _sdpa("EFFICIENT_ATTENTION", folds=True), "flash_attn-unmasked": _flash_attn,
        "varlen_attn": varlen, "flex": _flex, "flashinfer": flashinfer,
    }  # fmt: skip
    for name in names:
        made = makers[name](stage)
        yield (name, made) if isinstance(made, str) else Call(name, made, _says(stage, name))


def _says(stage: Stage, name: str) -> str:
    cell = stage.cell
    told = {NO_CORNER: cell.queries > 1, NO_WINDOW: cell.view is not None, PLANNED: name == "flashinfer"}
    return "; ".join(words for words, holds in told.items() if holds)


def _dense(stage: Stage) -> list[tuple[Tensor, Tensor]]:
    """K and V of every layer as others read them, each [B, Hkv, N, D]: views of the cache, or copies of a window."""
    length, view = stage.cell.shape.cell.length, stage.cell.view
    pairs = [stage.cache.layer(layer) for layer in range(stage.layers)]
    if view is None:
        end = length + stage.cell.queries
        return [(k[:, :, :end], v[:, :, :end]) for k, v in pairs]

    def window(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, : view.sink], x[:, :, length + 1 - view.recent : length + 1]], 2)

    return [(window(k), window(v)) for k, v in pairs]


def _sdpa(kind: str, *, folds: bool = False) -> Callable[[Stage], Callable[[int], Tensor] | str]:
    """torch's SDPA by one of its kernels; `folds`: a group's query heads become queries, for kernels that know no groups."""

    def make(stage: Stage) -> Callable[[int], Tensor] | str:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen, dense, group = getattr(SDPBackend, kind), _dense(stage), stage.cell.shape.group
        q = _folded(stage) if folds else stage.q.transpose(1, 2)

        def launch(turn: int) -> Tensor:
            k, v = dense[turn % stage.layers]
            with sdpa_kernel(chosen):
                out = F.scaled_dot_product_attention(q, k, v, scale=stage.scale, enable_gqa=group > 1 and not folds)
            return _unfolded(out, stage) if folds else out.transpose(1, 2)

        return tried(launch)

    return make


def _folded(stage: Stage) -> Tensor:
    """[B, T, Hq, D] -> [B, Hkv, G*T, D]"""
    batch, queries, heads, dim = stage.q.shape
    group = stage.cell.shape.group
    grouped = stage.q.view(batch, queries, heads // group, group, dim).permute(0, 2, 3, 1, 4)
    return grouped.reshape(batch, heads // group, -1, dim)


def _unfolded(out: Tensor, stage: Stage) -> Tensor:
    """[B, Hkv, G*T, D] -> [B, T, Hq, D], a view."""
    batch, queries, heads, dim = stage.q.shape
    group = stage.cell.shape.group
    return out.view(batch, heads // group, group, queries, dim).permute(0, 3, 1, 2, 4).reshape(batch, queries, heads, dim)


def _flex(stage: Stage) -> Callable[[int], Tensor] | str:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = torch.compile(flex_attention, dynamic=False) if stage.q.device.type == "cuda" else flex_attention
    q, dense, grouped = stage.q.transpose(1, 2), _dense(stage), stage.cell.shape.group > 1

    def launch(turn: int) -> Tensor:
        k, v = dense[turn % stage.layers]
        out: Tensor = attend(q, k, v, scale=stage.scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on a CPU it warns that it was not compiled, which is so on purpose
        return tried(launch)


def _flash_attn(stage: Stage) -> Callable[[int], Tensor] | str:
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    attend: Any = getattr(import_module("flash_attn"), "flash_attn_with_kvcache", None)
    if attend is None:
        return "this flash_attn has no flash_attn_with_kvcache"
    dense = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in _dense(stage)]

    def launch(turn: int) -> Tensor:
        k, v = dense[turn % stage.layers]
        out: Tensor = attend(stage.q, k, v, softmax_scale=stage.scale, causal=False)
        return out

    return tried(launch)


def error_of(call: Call, stage: Stage, *, is_ours: bool) -> float:
    """Worst relative error over the output rows of the last sequence, layer 0, against float64; inf where it is not finite.

    Ours are held to the meaning of the cell, others to what they compute: softmax over what they read, without a mask.
    """
    last = stage.q.shape[0] - 1
    right = meaning(stage.situation.row(last, 1)) if is_ours else [_unmasked(stage, last)]
    return worst_row([call.launch(0)[last:]], right)


def _unmasked(stage: Stage, row: int) -> Tensor:
    """[1, T, Hq, D] in float64, head by head: a long context of all heads would need gigabytes."""
    k, v = (x[row].double() for x in _dense(stage)[0])  # [Hkv, N, D]
    q = _folded(stage)[row].double()  # [Hkv, G*T, D]
    heads = [((q[h] @ k[h].T) * stage.scale).softmax(-1) @ v[h] for h in range(q.shape[0])]
    whole = torch.stack(heads)[None].expand(stage.q.shape[0], -1, -1, -1)
    return _unfolded(whole.contiguous(), stage)[:1]
