"""Retrieval: where needles lie and are found again, and the shipped model that finds them."""

import pytest

from specdec_lab.records import Cell
from specdec_lab.workload import held_out, needles, retrieved_share
from specdec_lab.workload.needle import KEY_TOKENS


class Words:
    """A token per word, ids in the order of their first use: the held-out text has thousands."""

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        return [self.ids.setdefault(word, len(self.ids)) for word in text.split()]


WORDS = Words()


@pytest.mark.parametrize(("batch", "length", "new"), [(1, 200, 30), (3, 1000, 64), (2, 4096, 47)])
def test_a_prompt_ends_with_a_key_whose_value_lies_far_back_and_nowhere_else(batch, length, new):
    w = held_out("needle", Cell(batch, length), WORDS, max_new_tokens=new, seed=3)
    assert {len(p) for p in w.prompts} == {length}
    for prompt, answer in zip(w.prompts, w.answers, strict=True):
        key = prompt[-KEY_TOKENS:]
        places = [i for i in range(length) if prompt[i : i + KEY_TOKENS] == key]
        assert places[-1] == length - KEY_TOKENS
        (place,) = places[:-1]
        assert prompt[place + KEY_TOKENS : place + KEY_TOKENS + new] == answer
        assert all(prompt.count(token) == 1 for token in answer), "what follows a part of the value is never in doubt"
        assert length - place - len(answer) > 0.2 * length


def test_the_seed_decides_what_is_hidden_and_depths_where():
    draw = [needles(Cell(1, 900), WORDS, max_new_tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1]
    assert draw[0].prompts != draw[2].prompts
    w = needles(Cell(1, 900), WORDS, max_new_tokens=40, num_needles=1, depths=[0.5])
    place = w.prompts[0].index(w.answers[0][0])
    assert abs(place - 0.5 * (900 - 48)) <= KEY_TOKENS + 1


def test_as_many_needles_are_hidden_as_half_of_the_prompt_holds():
    for length, new, count in [(300, 100, 1), (1000, 100, 4), (500, 50, 4)]:
        (prompt,) = needles(Cell(1, length), WORDS, max_new_tokens=new).prompts
        (plain,) = held_out("prose", Cell(1, length - count * (new + KEY_TOKENS) - KEY_TOKENS), WORDS).prompts
        assert [t for t in prompt if t in set(plain)] == list(plain)


def test_retrieval_is_counted_by_place():
    w = needles(Cell(2, 300), WORDS, max_new_tokens=20)
    assert retrieved_share(w, w.answers) == 1.0
    assert retrieved_share(w, [w.answers[0], w.answers[0]]) == 0.5
    assert retrieved_share(w, [w.answers[0][:5], ()]) == 5 / 40
    with pytest.raises(ValueError, match="knows no answers"):
        retrieved_share(held_out("prose", Cell(1, 64), WORDS), [[1]])


def test_needles_that_do_not_fit_are_clear_errors():
    with pytest.raises(ValueError, match="half of it must be ordinary text"):
        needles(Cell(1, 200), WORDS, max_new_tokens=150)
    with pytest.raises(ValueError, match="one per needle, got"):
        needles(Cell(1, 400), WORDS, max_new_tokens=20, num_needles=2, depths=[0.9, 0.1])
    few = Words()
    few.encode = lambda text: list(text.encode())
    with pytest.raises(ValueError, match="tokens that the text around them does not use"):
        needles(Cell(1, 4000), few, max_new_tokens=100)
