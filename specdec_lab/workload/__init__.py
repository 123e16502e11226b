"""Where prompts come from: the user's text or file, shipped held-out text of an exact length, or a retrieval task.

A workload is prompts as tokens together with how to continue them. Not known here: models, engines, views.
"""

from __future__ import annotations

from typing import Unpack

from ..records import Cell
from .needle import ANSWER_TOKENS, NEEDLE, answer, needle_prompts, retrieved
from .needle_text import VOCABULARY as NEEDLE_VOCABULARY
from .prompts import VERIFIERS, Sampling, Tokenizer, Tokens, Workload, from_file, from_text, random_context
from .shipped_text import CONTINUATION_TOKENS, HELD_OUT, HELD_OUT_KINDS, HeldOutText, held_out, read_held_out

KINDS = (*HELD_OUT_KINDS, NEEDLE)

__all__ = [
    "ANSWER_TOKENS", "CONTINUATION_TOKENS", "HELD_OUT", "HELD_OUT_KINDS", "KINDS", "NEEDLE", "NEEDLE_VOCABULARY", "VERIFIERS",
    "HeldOutText", "Sampling", "Tokenizer", "Tokens", "Workload", "answer", "from_file", "from_text", "held_out", "make",
    "needle_prompts", "random_context", "read_held_out", "retrieved", "why_not",
]  # fmt: skip


def why_not(kind: str, tokenizer: Tokenizer | None, vocabulary: int, model: str) -> str | None:
    """Why a model with this tokenizer and so many token ids cannot read this kind of workload; None when it can."""
    if kind not in KINDS:
        return f"workload must be one of {', '.join(KINDS)} or random, got {kind!r}"
    if kind == NEEDLE:
        if tokenizer is None and vocabulary == NEEDLE_VOCABULARY:
            return None
        return (f"the needle workload is written in the {NEEDLE_VOCABULARY} token ids of the needle model, other text "
                f"to {model} ({vocabulary} ids). Load its model: --model needle, or load(\"needle\")")
    if tokenizer is not None:
        return None
    return (f"{model} was loaded without a tokenizer, so the shipped {kind} text cannot be given to it. Load a folder with "
            "tokenizer files, take the workload 'random' (for timing only), pass a function from cell to Workload, or, with "
            "--model needle, use the needle workload")


def make(
    kind: str, cell: Cell, tokenizer: Tokenizer | None, *, max_new_tokens: int = 128, **sampling: Unpack[Sampling]
) -> Workload:
    """The workload of a kind; see `held_out` and `needle_prompts`."""
    if kind == NEEDLE:
        return needle_prompts(cell, max_new_tokens=max_new_tokens, **sampling)
    if tokenizer is None:
        raise ValueError(f"the shipped {kind} text needs a tokenizer")
    return held_out(kind, cell, tokenizer, max_new_tokens=max_new_tokens, **sampling)
