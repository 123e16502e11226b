"""The noise on GPUs through Triton; meaning and arguments as in reference.py. No host sync; with `out` given no allocation.

Words and uniforms are the reference's bit for bit. Gumbel noise g is float64 through the device's logarithm: the reference's
within 2 ulp of max(1, |g|). `seed` as int64 [1] on the device is read at every launch; as an int it is copied there, which a
CUDA graph cannot hold. `purpose` may be an IntEnum; launches take plain integers only.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORDS_AT_ONCE = 1024
NOISY_BLOCK = 2048  # tokens of a row that one program of a Gumbel draw looks at; fixed, so that no row's bits depend on others
NOISY_TOKENS_PER_THREAD = 16


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
    at = (seed_tensor(seed, law.device), sequences, positions, int(purpose))
    strides, tile = (positions.shape[1], *law.stride()[:2]), noisy_tile(law.shape[2])
    quick = glance(law, 1.0, *at, is_law=True)
    argmax_kernel[(positions.numel(),)](law, quick, *at, out, *strides, V=law.shape[2], **tile)
    return out


def glance(
    scores: Tensor, inverse: float, seed: Tensor, sequences: Tensor, positions: Tensor, purpose: int, *, is_law: bool
) -> Tensor:  # fmt: skip
    """What every block of the rows offers at most, float32 [rows, blocks]: the first of the two launches of a Gumbel draw."""
    from .gpu_kernels import glance_kernel

    rows, vocabulary = positions.numel(), scores.shape[2]
    tile = noisy_tile(vocabulary)
    del tile["BLOCKS"]
    quick = torch.empty(rows, -(-vocabulary // tile["BLOCK"]), dtype=torch.float32, device=scores.device)
    glance_kernel[(quick.numel(),)](
        scores, inverse, seed, sequences, positions, purpose, quick, positions.shape[1], *scores.stride()[:2], V=vocabulary,
        IS_LAW=is_law, **tile,
    )  # fmt: skip
    return quick


def noisy_tile(vocabulary: int) -> dict[str, int]:
    """Tokens at once of a Gumbel draw, how many such blocks a row has (to a power of two), and warps."""
    block = min(NOISY_BLOCK, max(16, 1 << (vocabulary - 1).bit_length()))
    return {"BLOCK": block, "BLOCKS": power_of_two(-(-vocabulary // block)),
            "num_warps": max(1, block // (32 * NOISY_TOKENS_PER_THREAD))}  # fmt: skip


def power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << (max(count, 1) - 1).bit_length()
