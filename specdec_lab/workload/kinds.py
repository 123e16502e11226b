"""Every kind of workload that ships, by name."""

from __future__ import annotations

from typing import Unpack

from ..records import Cell
from .held_out import TEXT_KINDS, held_out_text
from .needle import NEEDLE, needles
from .prompts import Sampling, Tokenizer, Workload

KINDS = (*TEXT_KINDS, NEEDLE)


def held_out(
    kind: str, cell: Cell, tokenizer: Tokenizer, *, max_new_tokens: int = 128, follow_ups: int = 3,
    follow_up_tokens: int = 64, **sampling: Unpack[Sampling],
) -> Workload:
    """Text that the demo pair was not trained on, every prompt exactly `cell.length` tokens long.

    kind  prose, code, revision or conversation (held_out_text), or needle (needles: values of `max_new_tokens` tokens)
    """
    if kind not in KINDS:
        raise ValueError(f"kind of held-out text must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == NEEDLE:
        return needles(cell, tokenizer, max_new_tokens=max_new_tokens, **sampling)
    return held_out_text(
        kind, cell, tokenizer, max_new_tokens=max_new_tokens, follow_ups=follow_ups, follow_up_tokens=follow_up_tokens,
        **sampling,
    )
