"""ngram_match in Triton's interpreter equals its reference, over blocks, programs and launches."""

from __future__ import annotations

import pytest
import torch

from ngram_world import MADE_TEXTS, found_by_the_engine, padded, random_texts
from specdec_kernels.ngram import gpu, reference

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

SIZES = (4, 3, 2)


@pytest.mark.parametrize(("sizes", "depth"), [(SIZES, 3), ((1,), 1), ((5, 2), 8)], ids=str)
def test_it_finds_what_the_drafter_finds(sizes, depth):
    texts = [*MADE_TEXTS, *random_texts(12, 60, depth, 3)]
    ids, lengths = padded(texts, 64)
    work = torch.zeros(len(texts), 2, dtype=torch.int64)
    tokens, counts = gpu.ngram_match(ids, lengths, sizes, depth, work)
    assert (tokens.tolist(), counts.tolist()) == found_by_the_engine(texts, sizes, depth)
    assert not work.any(), "ready for the next launch"


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_matches_in_any_block_of_any_program_are_found(kind, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_PROGRAMS", 3)
    block = gpu.BLOCK
    width = (gpu.MOST_PROGRAMS + 2) * block  # a program has more than one turn
    lengths = torch.tensor([width, 3 * block + 5, block - 1, block, 40], dtype=kind)
    ids = torch.arange(width).repeat(5, 1) % 60_000 + 10  # nothing repeats
    places = [width - block + 7, block - 2, 17, block - 40, 30]
    for row, (length, place) in enumerate(zip(lengths.tolist(), places, strict=True)):
        ids[row, length - 4 : length] = torch.tensor([1, 2, 3, 4])
        ids[row, place : place + 4] = torch.tensor([1, 2, 3, 4])
    ids[0, 5:9] = torch.tensor([1, 2, 3, 4])  # an earlier one
    wide = torch.full((5, width + 3), -1)
    wide[:, :width] = ids
    work = torch.zeros(5, 2, dtype=torch.int64)
    for _ in range(2):
        made = gpu.ngram_match(wide[:, :width], lengths, SIZES, 5, work)
        expected = reference.ngram_match(ids, lengths, SIZES, 5)
        assert torch.equal(made[0], expected[0])
        assert torch.equal(made[1], expected[1])
    assert made[1].tolist() == [5] * 5
    assert made[0][0, 0] == ids[0, places[0] + 4]


def test_offsets_beyond_two_to_the_31_elements():
    try:
        memory = torch.empty(2**31 + 64, dtype=torch.int64)  # pages that nobody touches cost nothing
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    ids = memory.as_strided((2, 64), (2**31, 1))
    text, lengths = padded([[9, 5, 6, 5, 6], [1, 2, 3, 4, 8, 1, 2, 3, 4]], 64)
    ids.copy_(text)
    tokens, counts = gpu.ngram_match(ids, lengths, SIZES, 2)
    assert (tokens.tolist(), counts.tolist()) == ([[5, 6], [8, 1]], [2, 2])


def test_what_does_not_fit_is_refused():
    ids, lengths = padded([[1, 2, 3]], 8)
    for given, words in (
        ((ids.int(), lengths, SIZES, 2), "ids is int64"), ((ids, lengths[None], SIZES, 2), "lengths must be"),
        ((ids, lengths, (33,), 2), "up to 32 tokens"), ((ids, lengths, SIZES, 2, torch.zeros(1, 2)), "work must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            gpu.ngram_match(*given)
