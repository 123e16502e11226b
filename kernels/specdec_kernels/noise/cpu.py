"""The noise on CPUs through the compiled kernel; meaning and arguments as in reference.py."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..build import CannotBuild, load_library

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SEED_MASK = (1 << 64) - 1


class _Noise(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("sequences", _P), ("positions", _P), ("seed", ctypes.c_uint64), ("count", _I64), ("batch", _I32), ("queries", _I32),
        ("purpose", _I32), ("threads", _I32),
    ]  # fmt: skip


def why_not() -> str | None:
    """None if the kernel runs here, else the reason in one sentence."""
    try:
        load_library()
    except CannotBuild as error:
        return str(error)
    return None


def _call(seed: int, sequences: Tensor, positions: Tensor, purpose: int, count: int, threads: int) -> _Noise:
    if sequences.dtype != torch.int64 or positions.dtype != torch.int64 or sequences.shape != positions.shape[:1]:
        raise ValueError(
            f"noise takes int64 sequences [B] and positions [B, T], got {sequences.dtype} {tuple(sequences.shape)} and "
            f"{positions.dtype} {tuple(positions.shape)}"
        )
    batch, queries = positions.shape
    return _Noise(
        sequences.data_ptr(), positions.data_ptr(), seed & _SEED_MASK, count, batch, queries, purpose, threads
    )


def words(seed: int, sequences: Tensor, positions: Tensor, purpose: int, count: int) -> Tensor:
    """See reference.words."""
    sequences, positions = sequences.contiguous(), positions.contiguous()
    out = torch.empty(*positions.shape, count, dtype=torch.int32)
    call = _call(seed, sequences, positions, purpose, count, 1)
    load_library().noise_words(ctypes.byref(call), _P(out.data_ptr()))
    return out.to(torch.int64) & 0xFFFFFFFF


def gumbel_argmax(law: Tensor, seed: int, sequences: Tensor, positions: Tensor, purpose: int) -> Tensor:
    """See reference.gumbel_argmax; law in float32. Logarithms agree to about 2 ulp, so only ties that close may differ."""
    if law.dtype != torch.float32 or law.shape[:2] != positions.shape:
        raise ValueError(f"the compiled draw takes a float32 law [B, T, V], got {law.dtype} {tuple(law.shape)}")
    law, sequences, positions = law.contiguous(), sequences.contiguous(), positions.contiguous()
    tokens = torch.empty(positions.shape, dtype=torch.int64)
    call = _call(seed, sequences, positions, purpose, law.shape[2], torch.get_num_threads())
    load_library().noise_draw(ctypes.byref(call), _P(law.data_ptr()), _P(tokens.data_ptr()))
    return tokens
