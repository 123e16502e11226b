"""A decoder forward on CPUs through the compiled kernel; meaning as in reference.py.

`Decoder` holds packed weights and may be called for ever; a `Call` of tree attention says what its forward reads.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
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


class _Chain(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("first", ctypes.POINTER(_Forward)), *((n, _P) for n in ("sequences", "tokens", "laws")), ("seed", ctypes.c_uint64),
        ("temperature", ctypes.c_float), *((n, _I32) for n in ("depth", "purpose", "coupled")), ("choosing_ns", _I64),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Draw:
    """How a drafted token is chosen. temperature 0: the most likely one.

    sequences   [B] int64, seed and purpose: the random numbers (specdec_kernels.noise)
    is_coupled  True: the Gumbel-max draw of its position; False: by the law itself, which is then returned
    """

    temperature: float
    sequences: Tensor
    seed: int
    purpose: int
    is_coupled: bool


@dataclass(frozen=True, slots=True)
class Drafted:
    """tokens [B, depth]; law [B, depth, V] they were drawn from, where one was asked for; nanoseconds by use."""

    tokens: Tensor
    law: Tensor | None
    attention_ns: int
    choosing_ns: int


def why_not(weights_dtype: torch.dtype, target: str = "native", folder: Path | None = None) -> str | None:
    """None if a decoder with weights of this type can be compiled here, else the reason in one sentence."""
    if weights_dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled decoder reads float32 or bfloat16 weights, not {str(weights_dtype).removeprefix('torch.')}"
    try:
        load_library(target, folder)
    except CannotBuild as error:
        return str(error)
    return None


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
        forward = self._forward(tokens, call, kv_layer, keep, logits, best)
        code = self._library.decoder_forward(ctypes.byref(forward))
        if code:
            self._refuse(code, tokens, call)
        return int(forward.attention_ns)

    def draft(self, tokens: Tensor, call: attention.Call, kv_layer: int, depth: int, draw: Draw) -> Drafted:
        """A chain of `depth` tokens after tokens [B, lag + 1] (root last, lag 0 or 1), each appended and attended to.

        call    reads of the first step: a chain of lag + 1 nodes over the committed tokens before them; its workspace must be
                large enough for lag + depth nodes
        raises  ValueError as forward, before any memory is touched
        """
        batch, width = tokens.shape
        empty = torch.zeros if call.rows else torch.empty  # rows that are left out must not hold chance
        law = None if draw.temperature == 0 or draw.is_coupled else empty(batch, depth, self.vocab)
        out, step_tokens = empty(batch, depth, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
        logits, best = torch.empty(batch, 1, self.vocab), torch.empty(batch, 1, dtype=torch.int64)
        keep, space = torch.tensor([width - 1], dtype=torch.int32), torch.empty(call.threads, self.vocab)
        first = self._forward(tokens, call, kv_layer, keep, logits, best)
        chain = _Chain(
            ctypes.pointer(first), draw.sequences.data_ptr(), out.data_ptr(), law.data_ptr() if law is not None else None,
            draw.seed & 0xFFFFFFFFFFFFFFFF, draw.temperature, depth, draw.purpose, draw.is_coupled, 0,
        )  # fmt: skip
        code = self._library.decoder_draft(ctypes.byref(chain), _P(step_tokens.data_ptr()), _P(space.data_ptr()))
        if code:
            self._refuse(code, tokens, call)
        return Drafted(out, law, int(first.attention_ns), int(chain.choosing_ns))

    def _forward(
        self, tokens: Tensor, call: attention.Call, kv_layer: int, keep: Tensor, logits: Tensor, best: Tensor
    ) -> _Forward:
        floats = self._library.decoder_scratch(ctypes.byref(self._model), _I64(tokens.numel()), call.threads)
        scratch: Tensor | None = getattr(self._memory, "scratch", None)
        if scratch is None or scratch.numel() < floats:
            scratch = self._memory.scratch = attention.aligned(floats)
        return _Forward(
            ctypes.pointer(self._model), ctypes.pointer(call), tokens.data_ptr(), keep.data_ptr(), logits.data_ptr(),
            best.data_ptr(), scratch.data_ptr(), kv_layer, 0, keep.shape[0],
        )  # fmt: skip

    def _refuse(self, code: int, tokens: Tensor, call: attention.Call) -> None:
        if code >= FIRST_TOKEN_CODE:
            row, query = divmod(code - FIRST_TOKEN_CODE, call.queries)
            raise ValueError(
                f"decoder refused: token {int(tokens[row, query])} of row {row}, query {query} is not one of {self.vocab} ids, "
                f"or lies beyond the {self._model.positions} positions of the rotary table"
            )
        what = {
            8: "the call's heads are not the model's", 9: "a kept query is none of the queries", 10: "memory is missing",
            11: f"a chain this deep does not fit into 64 nodes, {call.slots} slots and {self._model.positions} positions",
        }  # fmt: skip
        if code in what:
            raise ValueError(f"decoder refused: {what[code]}")
        attention.check_code(code, call)
