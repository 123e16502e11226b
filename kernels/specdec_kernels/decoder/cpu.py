"""A decoder forward on CPUs through the compiled kernel; meaning as in reference.py.

`Decoder` holds packed weights and may be called for ever; a `Call` of tree attention says what its forward reads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..build import CannotBuild, load_library
from ..tree_attention import cpu as attention
from .reference import Weights

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
FIRST_TOKEN_CODE = 2_000_000


class _Layer(ctypes.Structure):
    _fields_: ClassVar[Any] = [(n, _P) for n in ("qkv", "out", "gate", "up", "down", "input_norm", "post_norm", "q_norm", "k_norm",
                                            "qkv_bias", "out_bias")]  # fmt: skip


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
            for name in ("qkv", "out", "gate", "up", "down"):
                setattr(layer, name, self._pack(getattr(block, name)))
            for name in ("input_norm", "post_norm", "q_norm", "k_norm", "qkv_bias", "out_bias"):
                setattr(layer, name, self._vector(getattr(block, name)))
        vocab, hidden = weights.embedding.shape
        self.vocab, self._scratch = vocab, torch.empty(0)
        self._model = _Model(
            layers, self._keep(weights.embedding.contiguous()), self._pack(weights.head), self._vector(weights.norm),
            None, None, 0, len(weights.blocks), hidden, weights.heads, weights.kv_heads, weights.head_dim, weights.blocks[0].gate.shape[0],
            vocab, self._bf16, weights.eps,
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
        floats = self._library.decoder_scratch(ctypes.byref(self._model), _I64(tokens.numel()), call.threads)
        if self._scratch.numel() < floats:
            self._scratch = attention.aligned(floats)
        forward = _Forward(
            ctypes.pointer(self._model), ctypes.pointer(call), tokens.data_ptr(), keep.data_ptr(), logits.data_ptr(),
            best.data_ptr(), self._scratch.data_ptr(), kv_layer, 0, keep.shape[0],
        )  # fmt: skip
        code = self._library.decoder_forward(ctypes.byref(forward))
        if code:
            self._refuse(code, tokens, call)
        return int(forward.attention_ns)

    def _refuse(self, code: int, tokens: Tensor, call: attention.Call) -> None:
        if code >= FIRST_TOKEN_CODE:
            row, query = divmod(code - FIRST_TOKEN_CODE, call.queries)
            raise ValueError(
                f"decoder refused: token {int(tokens[row, query])} of row {row}, query {query} is not one of {self.vocab} ids, "
                f"or lies beyond the {self._model.positions} positions of the rotary table"
            )
        what = {8: "the call's heads are not the model's", 9: "a kept query is none of the queries", 10: "memory is missing"}
        if code in what:
            raise ValueError(f"decoder refused: {what[code]}")
        attention.check_code(code, call)
