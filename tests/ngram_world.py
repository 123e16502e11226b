"""Texts that repeat, and what the drafter of the engine finds in them."""

from __future__ import annotations

import random

import torch

from specdec_lab.engine.drafters import _IndexedText

MADE_TEXTS = (
    [], [5], [5, 5], [5, 5, 5], [1, 2, 1, 2, 1], [1, 2, 3, 4, 9, 1, 2, 3, 4], [1, 2, 3, 4, 7, 2, 3, 4, 8, 1, 2, 3, 4],
    [3, 4, 7, 1, 3, 4, 8, 1, 2, 3, 4], [4, 4, 4, 4, 4, 4], [1, 2, 3], [7, 1, 2, 3, 8, 1, 2, 3], [1, 2, 9, 3, 2],
)  # fmt: skip


def random_texts(count, longest, seed, alphabet=3):
    """Texts of a small alphabet: most tails occur before, in many places."""
    draw = random.Random(seed)
    return [[draw.randrange(alphabet) for _ in range(draw.randrange(longest + 1))] for _ in range(count)]


def padded(texts, width, fill=1):
    """ids [B, width] and lengths [B]; behind the texts lies `fill`, which could match."""
    ids = torch.tensor([text + [fill] * (width - len(text)) for text in texts], dtype=torch.int64)
    return ids, torch.tensor([len(text) for text in texts])


def found_by_the_engine(texts, sizes, depth):
    """(tokens, counts) of the drafter on the host, padded with 0."""
    drafts = []
    for text in texts:
        row = _IndexedText()
        row.extend(text, sizes)
        drafts.append(row.continuation(depth, sizes))
    return [d + [0] * (depth - len(d)) for d in drafts], [len(d) for d in drafts]
