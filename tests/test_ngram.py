"""ngram_match means what the engine's n-gram drafter does, text for text."""

from __future__ import annotations

import pytest
import torch

from ngram_world import MADE_TEXTS, found_by_the_engine, padded, random_texts
from specdec_kernels.ngram.reference import ngram_match

SIZES = (4, 3, 2)


@pytest.mark.parametrize("sizes", [SIZES, (1,), (5, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("alphabet", [2, 4, 12])
def test_it_finds_what_the_drafter_finds(sizes, depth, alphabet):
    texts = [*MADE_TEXTS, *random_texts(200, 60, depth, alphabet)]
    for fill in range(3):
        ids, lengths = padded(texts, 64, fill)
        tokens, counts = ngram_match(ids, lengths, sizes, depth)
        expected = found_by_the_engine(texts, sizes, depth)
        assert (tokens.tolist(), counts.tolist()) == expected
    assert 0 < sum(map(bool, expected[1])) < len(texts), "rows with and without a match"


def test_a_longer_match_wins_and_of_equals_the_later_one():
    texts = [[1, 2, 3, 4, 7, 3, 4, 8, 1, 2, 3, 4], [3, 4, 7, 3, 4, 8, 1, 3, 4], [1, 2, 1, 2, 1, 2]]
    tokens, counts = ngram_match(*padded(texts, 20), SIZES, 3)
    assert tokens.tolist() == [[7, 3, 4], [8, 1, 3], [1, 2, 1]]
    assert counts.tolist() == [3, 3, 3]


def test_a_continuation_that_the_text_ends_goes_on_with_its_period():
    tokens, _ = ngram_match(*padded([[9, 5, 6, 5, 6]], 8), SIZES, 5)
    assert tokens.tolist() == [[5, 6, 5, 6, 5]]


def test_what_lies_behind_a_text_is_never_read_as_text():
    ids, lengths = padded([[1, 2, 3]], 10, fill=-7)
    ids[0, 3:] = torch.tensor([9, 1, 2, 3, 9, 1, 2])
    assert ngram_match(ids, lengths, SIZES, 2)[1].tolist() == [0]


@pytest.mark.parametrize("sizes", [(), (2, 3), (2, 2), (3, 0)], ids=str)
def test_sizes_that_do_not_fall_are_refused(sizes):
    with pytest.raises(ValueError, match="the longest first"):
        ngram_match(*padded([[1, 2]], 4), sizes, 1)
