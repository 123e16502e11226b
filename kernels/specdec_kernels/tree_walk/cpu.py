"""The way down a tree on CPUs through the compiled kernel; meaning and arguments as in reference.py."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..build import CannotBuild, load_library
from ..decoder.cpu import children_tensor
from .reference import Purposes

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Walk(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((n, _P) for n in ("law", "drawn_from", "tokens", "exists", "children")),
        *((n, _P) for n in ("sequences", "first", "node", "made", "space")),
        ("seed", ctypes.c_uint64), ("vocab", _I64),
        *((n, _I32) for n in ("batch", "nodes", "fed", "depth", "level", "target", "accept", "residual", "threads")),
    ]  # fmt: skip


def why_not() -> str | None:
    """None if the kernel runs here, else the reason in one sentence."""
    try:
        load_library()
    except CannotBuild as error:
        return str(error)
    return None


class Walk:
    """See reference.Walk. `node` and `made` are current after every step."""

    def __init__(self, call: _Walk, kept: tuple[Tensor | None, ...], node: Tensor, made: Tensor) -> None:
        self._call, self._kept, self.node, self.made = call, kept, node, made
        self._space = torch.empty(0, dtype=torch.float64)

    def step(self, law: Tensor) -> bool:
        """See reference.Walk.step; law in float32."""
        call, law = self._call, law.contiguous()
        if law.dtype != torch.float32 or law.dim() != 2 or law.shape[0] != call.batch or call.vocab not in (0, law.shape[1]):
            raise ValueError(f"a step takes a float32 law [{call.batch}, V] of one V, got {law.dtype} {list(law.shape)}")
        call.vocab, call.law = law.shape[1], law.data_ptr()
        if call.drawn_from and not self._space.numel():
            self._space = torch.empty(2 * call.threads * call.vocab, dtype=torch.float64)
            call.space = self._space.data_ptr()
        moving = load_library().tree_walk_step(ctypes.byref(call))
        if moving < 0:
            raise ValueError("tree_walk refused: the numbers of children are not those of a tree of this depth and as many "
                             "laws")  # fmt: skip
        call.level += 1
        return bool(moving)


def start(
    tokens: Tensor, exists: Tensor | None, children: tuple[int, ...], depth: int, drawn_from: Tensor | None, seed: int,
    sequences: Tensor, first: Tensor, purposes: Purposes,
) -> Walk:  # fmt: skip
    """All rows at the root. See reference.Walk.

    raises  ValueError for shapes and types that do not go together, before any memory is touched
    """
    batch, nodes = tokens.shape
    wrong = _why_wrong(tokens, exists, children, drawn_from, sequences, first)
    if wrong is not None:
        raise ValueError(f"tree_walk refused: {wrong}")
    tokens, sequences, first = tokens.contiguous(), sequences.contiguous(), first.contiguous()
    exists = None if exists is None else exists.contiguous()
    drawn_from = None if drawn_from is None else drawn_from.contiguous()
    counts, node = children_tensor(children), torch.zeros(batch, dtype=torch.int64)
    made = torch.zeros(batch, 3 * depth + 2, dtype=torch.int64)
    call = _Walk(
        None, None if drawn_from is None else drawn_from.data_ptr(), tokens.data_ptr(),
        None if exists is None else exists.data_ptr(), counts.data_ptr(), sequences.data_ptr(), first.data_ptr(),
        node.data_ptr(), made.data_ptr(), None, seed & 0xFFFFFFFFFFFFFFFF, 0 if drawn_from is None else drawn_from.shape[2],
        batch, nodes, 0 if drawn_from is None else drawn_from.shape[1], depth, 0, purposes.target, purposes.accept,
        purposes.residual, torch.get_num_threads(),
    )  # fmt: skip
    return Walk(call, (tokens, exists, sequences, first, drawn_from, counts), node, made)


def _why_wrong(
    tokens: Tensor, exists: Tensor | None, children: tuple[int, ...], drawn_from: Tensor | None, sequences: Tensor,
    first: Tensor,
) -> str | None:
    batch, nodes = tokens.shape
    if tokens.dtype != torch.int64 or len(children) != nodes + 1:
        return f"{len(children)} numbers of children for {tokens.dtype} tokens of {nodes} nodes"
    for name, given in (("sequences", sequences), ("first", first)):
        if given.dtype != torch.int64 or given.shape != (batch,):
            return f"{name} is int64 [{batch}], got {given.dtype} {list(given.shape)}"
    if exists is not None and (exists.dtype != torch.bool or exists.shape != tokens.shape):
        return f"exists is bool {list(tokens.shape)}, got {exists.dtype} {list(exists.shape)}"
    if drawn_from is not None and (drawn_from.dtype != torch.float32 or drawn_from.dim() != 3 or drawn_from.shape[0] != batch):
        return f"drawn_from is float32 [{batch}, nodes with children, V], got {drawn_from.dtype} {list(drawn_from.shape)}"
    return None
