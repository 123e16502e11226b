"""A decoder forward on CPUs through the compiled kernel; meaning as in reference.py.

`Decoder` holds packed weights and may be called for ever; a `Call` of tree attention says what its forward reads.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..build import CannotBuild, load_library
from ..tree_attention import cpu as attention
from .reference import Weights

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
FIRST_TOKEN_CODE = 2_000_000
MATRICES = ("qkv", "out", "gate", "up", "down")
VECTORS = ("input_norm", "post_norm", "q_norm", "k_norm", "qkv_bias", "out_bias")


class _Layer(ctypes.Structure):
    _fields_: ClassVar[Any] = [(n, _P) for n in (*MATRICES, *VECTORS)]


class _Model(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        [("layers", ctypes.POINTER(_Layer)), *((n, _P) for n in ("embedding", "head", "norm", "cosine", "sine")),
         ("positions", _I64)]
        + [(n, _I32) for n in ("num_layers", "hidden", "heads", "kv_heads", "dim", "intermediate", "vocab", "bf16")]
        + [("eps", ctypes.c_float)]
    )  # fmt: skip


class _Forward(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        [("model", ctypes.POINTER(_Model)), ("attention", ctypes.POINTER(attention.Call))]
        + [(n, _P) for n in ("tokens", "keep", "logits", "best", "scratch")]
        + [("kv_layer", _I64), ("attention_ns", _I64), ("num_keep", _I32)]
    )


class _Draft(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("first", ctypes.POINTER(_Forward)), *((n, _P) for n in ("children", "sequences", "tokens", "laws")),
        ("seed", ctypes.c_uint64), ("temperature", ctypes.c_float), *((n, _I32) for n in ("nodes", "purpose", "coupled")),
        ("choosing_ns", _I64),
    ]  # fmt: skip


class _Sizes(ctypes.Structure):
    _fields_: ClassVar[Any] = [(n, _I64) for n in ("scratch", "workspace", "fed", "widest")]


@dataclass(frozen=True, slots=True)
class Draw:
    """How drafted tokens are chosen. temperature 0: the most likely ones, of equals the lower.

    sequences   [B] int64, seed and purpose: the random numbers (specdec_kernels.noise)
    is_coupled  True: those of largest log law + Gumbel noise of their position; False: drawn one after the other from what is
                left of the law itself, which is then returned
    """

    temperature: float
    sequences: Tensor
    seed: int
    purpose: int
    is_coupled: bool


@dataclass(frozen=True, slots=True)
class Drafted:
    """tokens [B, nodes]; law [B, nodes with children, V] they were drawn from, where one was asked for; nanoseconds by use."""

    tokens: Tensor
    law: Tensor | None
    attention_ns: int
    choosing_ns: int


@lru_cache(maxsize=512)
def children_tensor(children: tuple[int, ...]) -> Tensor:
    """The numbers of children as the kernel reads them, made once per tree."""
    return torch.tensor(children, dtype=torch.int32)


@lru_cache(maxsize=64)
def _last(width: int) -> Tensor:
    """The index of the last of some queries."""
    return torch.tensor([width - 1], dtype=torch.int32)


def why_not(weights_dtype: torch.dtype, target: str = "native", folder: Path | None = None) -> str | None:
    """None if a decoder with weights of this type can be compiled here, else the reason in one sentence."""
    if weights_dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled decoder reads float32 or bfloat16 weights, not {str(weights_dtype).removeprefix('torch.')}"
    try:
        load_library(target, folder)
    except CannotBuild as error:
        return str(error)
    return None


def _check_tokens(tokens: Tensor, call: attention.Call) -> None:
    wanted = call.batch, call.queries
    if tokens.dtype != torch.int64 or tokens.shape != wanted or not tokens.is_contiguous():
        raise ValueError(f"decoder refused: the call reads contiguous int64 tokens {list(wanted)}, got {tokens.dtype} "
                         f"{list(tokens.shape)}")  # fmt: skip


def _check_sequences(sequences: Tensor, batch: int) -> None:
    if sequences.dtype != torch.int64 or sequences.shape != (batch,) or not sequences.is_contiguous():
        raise ValueError(f"decoder refused: sequences are int64 [{batch}], got {sequences.dtype} {list(sequences.shape)}")


class Decoder:
    """Packed weights of one model, and the scratch memory of its forwards.

    weights  matrices and embedding in float32 or bfloat16 (one type); norms and biases of any float type
    """

    def __init__(self, weights: Weights, target: str = "native", folder: Path | None = None) -> None:
        self._library = load_library(target, folder)
        self._bf16 = weights.embedding.dtype == torch.bfloat16
        self._kept: list[Tensor] = []
        layers = (_Layer * len(weights.blocks))()
        for layer, block in zip(layers, weights.blocks, strict=True):
            for name in MATRICES:
                setattr(layer, name, self._pack(getattr(block, name)))
            for name in VECTORS:
                setattr(layer, name, self._vector(getattr(block, name)))
        vocab, hidden = weights.embedding.shape
        self.vocab, self._memory = vocab, threading.local()  # two engines may use one model from two threads
        self._model = _Model(
            layers, self._keep(weights.embedding.contiguous()), self._pack(weights.head), self._vector(weights.norm),
            None, None, 0, len(weights.blocks), hidden, weights.heads, weights.kv_heads, weights.head_dim,
            weights.blocks[0].gate.shape[0], vocab, self._bf16, weights.eps,
        )  # fmt: skip
        self.set_positions(weights.cosine, weights.sine)

    def set_positions(self, cosine: Tensor, sine: Tensor) -> None:
        """Other rotary tables [positions, D/2] float32, for contexts longer than those given before."""
        self._tables = cosine.contiguous(), sine.contiguous()
        self._model.cosine, self._model.sine = self._tables[0].data_ptr(), self._tables[1].data_ptr()
        self._model.positions = cosine.shape[0]

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _vector(self, vector: Tensor | None) -> int | None:
        return None if vector is None else self._keep(vector.float().contiguous())

    def _pack(self, matrix: Tensor) -> int:
        columns, inputs = matrix.shape
        packed = attention.aligned(self._library.decoder_packed(_I64(columns), _I64(inputs)), matrix.dtype)
        whole = matrix.contiguous()
        self._library.decoder_pack(_P(whole.data_ptr()), _I64(columns), _I64(inputs), int(self._bf16), _P(packed.data_ptr()))
        return self._keep(packed)

    def forward(
        self, tokens: Tensor, call: attention.Call, kv_layer: int, keep: Tensor, logits: Tensor, best: Tensor
    ) -> int:
        """Append and score; returns the nanoseconds spent in attention.

        tokens    [B, T] int64 contiguous
        call      what to read, with k and v of layer 0; q, out and their strides are set here
        kv_layer  elements from one layer's keys to the next one's
        keep      [K] int32 query indices; logits [B, K, V] float32 and best [B, K] int64 are filled, but for rows left out
        raises    ValueError for tokens, positions or lengths out of range, before any memory is touched
        """
        _check_tokens(tokens, call)
        kept = (tokens.shape[0], keep.shape[0])
        if keep.dtype != torch.int32 or best.shape != kept or logits.shape != (*kept, self.vocab):
            raise ValueError(f"decoder refused: for {kept[1]} kept queries (int32) logits are {[*kept, self.vocab]} and best "
                             f"{list(kept)}, got {keep.dtype}, {list(logits.shape)} and {list(best.shape)}")
        forward = self._forward(tokens, call, kv_layer, keep, logits, best)
        code = self._library.decoder_forward(ctypes.byref(forward))
        self._check(code, tokens, call)
        return int(forward.attention_ns)

    def draft(
        self, tokens: Tensor, call: attention.Call, kv_layer: int, children: tuple[int, ...], draw: Draw
    ) -> Drafted:
        """Draft a tree after tokens [B, lag + 1] (root last, lag 0 or 1): nodes with children are appended and attended to.

        call      reads of the first forward: a chain of lag + 1 nodes over the committed tokens before them; its workspace
                  is set here
        children  how many children each node has, breadth-first from the root: that is the whole tree; of a chain (1, .., 1, 0)
        raises    ValueError as forward, before any memory is touched
        """
        _check_tokens(tokens, call)
        _check_sequences(draw.sequences, call.batch)
        batch, width = tokens.shape
        keep, counts = _last(width), children_tensor(children)
        first = _Forward(
            ctypes.pointer(self._model), ctypes.pointer(call), tokens.data_ptr(), keep.data_ptr(), None, None, None,
            kv_layer, 0, 1,
        )  # fmt: skip
        draft = _Draft(
            ctypes.pointer(first), counts.data_ptr(), draw.sequences.data_ptr(), None, None, draw.seed & 0xFFFFFFFFFFFFFFFF,
            draw.temperature, len(children) - 1, draw.purpose, draw.is_coupled, 0,
        )  # fmt: skip
        here, sizes = ctypes.byref(draft), _Sizes()
        self._check(self._library.decoder_draft_sizes(here, ctypes.byref(sizes)), tokens, call)
        empty = torch.zeros if call.rows else torch.empty  # rows that are left out must not hold chance
        out = empty(batch, len(children) - 1, dtype=torch.int64)
        law = None if draw.temperature == 0 or draw.is_coupled else empty(batch, sizes.fed, self.vocab)
        logits = self._room("logits", batch * sizes.widest * self.vocab)
        space = self._room("space", 2 * call.threads * self.vocab)
        numbers = torch.empty(2, batch * sizes.widest, dtype=torch.int64)  # arg-max of the logits, tokens that are fed
        first.logits, first.best = logits.data_ptr(), numbers.data_ptr()
        first.scratch = self._room("scratch", sizes.scratch).data_ptr()
        call.workspace = self._room("workspace", sizes.workspace).data_ptr()
        draft.tokens, draft.laws = out.data_ptr(), None if law is None else law.data_ptr()
        code = self._library.decoder_draft(here, _P(numbers[1].data_ptr()), _P(space.data_ptr()))
        self._check(code, tokens, call)
        return Drafted(out, law, int(first.attention_ns), int(draft.choosing_ns))

    def _forward(
        self, tokens: Tensor, call: attention.Call, kv_layer: int, keep: Tensor, logits: Tensor, best: Tensor
    ) -> _Forward:
        floats = self._library.decoder_scratch(ctypes.byref(self._model), _I64(tokens.numel()), call.threads)
        scratch = self._room("scratch", floats)
        return _Forward(
            ctypes.pointer(self._model), ctypes.pointer(call), tokens.data_ptr(), keep.data_ptr(), logits.data_ptr(),
            best.data_ptr(), scratch.data_ptr(), kv_layer, 0, keep.shape[0],
        )  # fmt: skip

    def _room(self, name: str, floats: int) -> Tensor:
        """Working memory of this thread that stays and grows."""
        room: Tensor | None = getattr(self._memory, name, None)
        if room is None or room.numel() < floats:
            room = attention.aligned(floats)
            setattr(self._memory, name, room)
        return room

    def _check(self, code: int, tokens: Tensor, call: attention.Call) -> None:
        if code == 0:
            return
        if code >= FIRST_TOKEN_CODE:
            row, query = divmod(code - FIRST_TOKEN_CODE, call.queries)
            raise ValueError(
                f"decoder refused: token {int(tokens[row, query])} of row {row}, query {query} is not one of {self.vocab} ids, "
                f"or lies beyond the {self._model.positions} positions of the rotary table"
            )
        what = {
            8: "the call's heads are not the model's", 9: "a kept query is none of the queries", 10: "memory is missing",
            11: "the chain or tree is none, or does not fit into 64 nodes, "
                f"{call.slots} slots, {self._model.positions} positions and {self.vocab} children per node",
            12: f"{call.batch} sequences; up to 65,536 are possible",
        }  # fmt: skip
        if code in what:
            raise ValueError(f"decoder refused: {what[code]}")
        attention.check_code(code, call)
