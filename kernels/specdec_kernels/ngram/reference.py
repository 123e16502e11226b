"""What ngram_match means, in torch on any device. gpu.py computes the same; same arguments, same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ngram_match(
    ids: Tensor, lengths: Tensor, sizes: Sequence[int], depth: int, work: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What followed the latest earlier occurrence of each row's last tokens: of its last sizes[0], or else sizes[1], ...

    ids      [B, S] int64; row b's text is ids[b, :lengths[b]], what lies behind it may be anything
    lengths  [B] int32 or int64
    sizes    tokens that must be equal, the most first
    depth    tokens wanted behind the occurrence. Where the text ends before, what follows repeats from its begin, as if the
             text went on with its period
    work     what gpu.py adds up in; not used here
    returns  tokens [B, depth] int64, and their counts [B] int64: depth, or 0 where nothing matches, whose tokens are 0
    """
    check_sizes(sizes)
    start = torch.arange(ids.shape[1], device=ids.device)  # of what follows an occurrence
    lengths = lengths.long()
    equal = (start < lengths[:, None]).expand(ids.shape)  # [B, S] the last `back` tokens before start are the text's last
    best = torch.full_like(lengths, -1)
    for back in range(1, sizes[0] + 1):
        last = ids.gather(1, (lengths - back).clamp(min=0)[:, None])
        equal = equal & (start >= back) & (ids.roll(back, 1) == last)
        if back in sizes:  # a longer match replaces a shorter one
            latest = torch.where(equal, start, -1).amax(1)
            best = torch.where(latest >= 0, latest, best)
    found = best >= 0
    order = torch.arange(depth, device=ids.device)
    at = best[:, None] + order % (lengths - best).clamp(min=1)[:, None]
    tokens = ids.gather(1, at.clamp(0, ids.shape[1] - 1))
    return torch.where(found[:, None], tokens, 0), found * depth


def check_sizes(sizes: Sequence[int]) -> None:
    """ValueError unless there are sizes, positive and falling."""
    falls = all(a > b for a, b in zip(sizes, sizes[1:], strict=False))
    if not sizes or sizes[-1] < 1 or not falls:
        raise ValueError(f"sizes of matches are positive and fall, the longest first, got {tuple(sizes)}")
