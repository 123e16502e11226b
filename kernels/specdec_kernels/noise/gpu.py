"""The noise on GPUs through Triton; meaning and arguments as in reference.py. No host sync; with `out` given no allocation.

Words and uniforms are the reference's bit for bit. Gumbel noise g is float64 through the device's logarithm: the reference's
within 2 ulp of max(1, |g|). `seed` as int64 [1] on the device is read at every launch; as an int it is copied there, which a
CUDA graph cannot hold. `purpose` may be an IntEnum; launches take plain integers only.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS_AT_ONCE = 1024
NOISY_BLOCK = 4096  # tokens that a Gumbel draw looks at at once
NOISY_WARPS = 16


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed as int64 [1] on the device."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"a seed on the device is int64 [1], got {seed.dtype} {list(seed.shape)}")
        return seed
    low = seed & (1 << 64) - 1
    return torch.tensor([low - (1 << 64) if low >> 63 else low], dtype=torch.int64, device=device)


def check_places(sequences: Tensor, positions: Tensor) -> None:
    """ValueError unless sequences [B] and positions [B, ...] are contiguous integers."""
    for name, tensor in (("sequences", sequences), ("positions", positions)):
        if tensor.dtype not in (torch.int32, torch.int64) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32 or int64, got {tensor.dtype} with strides {tensor.stride()}")
    if sequences.shape != positions.shape[:1]:
        raise ValueError(f"sequences must be [B], positions [B, ...], got {list(sequences.shape)} and {list(positions.shape)}")


def check_out(out: Tensor, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...], name: str = "out") -> None:
    """ValueError unless `out` has this shape, one of these types and no gaps."""
    if tuple(out.shape) != shape or out.dtype not in kinds or not out.is_contiguous():
        raise ValueError(f"{name} must be contiguous {list(shape)} in one of {kinds}, got {out.dtype} {list(out.shape)}")


def words(
    seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, count: int, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """See reference.words."""
    return _fill(0, torch.int64, seed, sequences, positions, purpose, count, out)


def gumbel(
    seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, count: int, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """See reference.gumbel."""
    return _fill(1, torch.float64, seed, sequences, positions, purpose, count, out)


def _fill(
    kind: int, dtype: torch.dtype, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, count: int,
    out: Tensor | None,
) -> Tensor:  # fmt: skip
    from .gpu_kernels import words_kernel

    check_places(sequences, positions)
    out = torch.empty(*positions.shape, count, dtype=dtype, device=positions.device) if out is None else out
    check_out(out, (*positions.shape, count), (dtype,))
    block = min(WORDS_AT_ONCE, max(4, 1 << (count - 1).bit_length()))
    words_kernel[(positions.numel(), -(-count // block))](
        seed_tensor(seed, positions.device), sequences, positions, int(purpose), out, positions.shape[1], count, KIND=kind,
        BLOCK=block,
    )  # fmt: skip
    return out


def uniform(
    seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, lanes: Tensor | int = 0, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """See reference.uniform. Nothing is allocated where lanes are int32 [B, ...] of the result's shape, as positions are."""
    from .gpu_kernels import uniform_kernel

    lanes = torch.as_tensor(lanes, dtype=torch.int32, device=positions.device)
    positions, lanes = (t.contiguous() for t in torch.broadcast_tensors(positions, lanes))
    check_places(sequences, positions)
    out = torch.empty(positions.shape, dtype=torch.float64, device=positions.device) if out is None else out
    check_out(out, tuple(positions.shape), (torch.float64,))
    numel = positions.numel()
    uniform_kernel[(-(-numel // WORDS_AT_ONCE),)](
        seed_tensor(seed, positions.device), sequences, positions, lanes, int(purpose), out, numel // positions.shape[0], numel,
        BLOCK=WORDS_AT_ONCE,
    )  # fmt: skip
    return out


def gumbel_argmax(
    law: Tensor, seed: int | Tensor, sequences: Tensor, positions: Tensor, purpose: int, out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """See reference.gumbel_argmax; law in float32. Decided in float64: only scores that agree to about 1e-15 may differ."""
    from .gpu_kernels import argmax_kernel

    check_places(sequences, positions)
    if law.dtype != torch.float32 or law.shape[:2] != positions.shape or law.stride(2) != 1:
        raise ValueError(f"the draw takes a float32 law [B, T, V] without gaps along V, got {law.dtype} {list(law.shape)}")
    out = torch.empty(positions.shape, dtype=torch.int64, device=law.device) if out is None else out
    check_out(out, tuple(positions.shape), (torch.int32, torch.int64))
    argmax_kernel[(positions.numel(),)](
        law, seed_tensor(seed, law.device), sequences, positions, int(purpose), out, positions.shape[1], *law.stride()[:2],
        V=law.shape[2], BLOCK=noisy_block(law.shape[2]), num_warps=noisy_warps(law.shape[2]),
    )  # fmt: skip
    return out


def noisy_block(vocabulary: int) -> int:
    """Tokens at once of a Gumbel draw."""
    return int(min(NOISY_BLOCK, max(16, 1 << (vocabulary - 1).bit_length())))


def noisy_warps(vocabulary: int) -> int:
    """Warps of a Gumbel draw: a thread has 8 tokens."""
    return max(1, noisy_block(vocabulary) * NOISY_WARPS // NOISY_BLOCK)
