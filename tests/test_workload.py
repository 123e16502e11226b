"""Workloads: what they check, how long they are, and where held-out prompts come from."""

import json
import random
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec_lab import workload
from specdec_lab.records import Cell
from specdec_lab.workload import HELD_OUT_KINDS, Workload, from_file, from_text, held_out, read_held_out, shipped_text


class Bytes:
    """One token per byte, with a beginning-of-text token if asked for: every length can be counted by hand."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos = bos

    def encode(self, text: str) -> list[int]:
        return ([] if self.bos is None else [self.bos]) + list(text.encode())

    @staticmethod
    def decode(tokens: tuple[int, ...]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="ignore")


ROWS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5)


@given(ROWS, st.integers(1, 50))
def test_the_longest_row_bounds_every_row(prompts, max_new_tokens):
    turns = [[row[::-1] for row in prompts], [row + row for row in prompts]]
    w = Workload("w", prompts, max_new_tokens, turns=turns)
    assert w.max_tokens == 4 * max(map(len, prompts)) + 3 * max_new_tokens
    assert w.cell == Cell(len(prompts), round(sum(map(len, prompts)) / len(prompts)))
    assert hash(w) == hash(Workload("w", w.prompts, max_new_tokens, turns=w.turns))  # lists were kept as tuples


GOOD = {"name": "w", "prompts": [[1, 2], [3]], "max_new_tokens": 4}
BAD = {
    "no prompts": {"prompts": []},
    "prompt of row 1 is empty": {"prompts": [[1], []]},
    "token id -3": {"prompts": [[1], [-3]]},
    "max_new_tokens must be at least 1, got 0": {"max_new_tokens": 0},
    "temperature must be 0 (greedy) or more, got -0.5": {"temperature": -0.5},
    "temperature must be 0 (greedy) or more, got nan": {"temperature": float("nan")},
    "temperature must be 0 (greedy) or more, got inf": {"temperature": float("inf")},
    "top_p must lie in (0, 1], got 0": {"top_p": 0},
    "top_p must lie in (0, 1], got 1.5": {"top_p": 1.5},
    "top_p must lie in (0, 1], got nan": {"top_p": float("nan")},
    "top_k must be 0": {"top_k": -1},
    "verifier must be one of rejection, coupled, got 'typical'": {"verifier": "typical"},
    "turn 2 has 1 rows for 2 prompts": {"turns": [[[1], [2]], [[1]]]},
    "turn 1 of row 0 is empty": {"turns": [[[], [2]]]},
    "3 sequence_ids for 2 prompts": {"sequence_ids": (1, 2, 3)},
    "sequence_ids must differ, got (7, 7)": {"sequence_ids": (7, 7)},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_workload_says_what_is_wrong_with_the_value(message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below, as plain text
        Workload(**{**GOOD, **BAD[message]})
    assert message in str(error.value)


def test_text_becomes_one_prompt_per_text():
    assert from_text("ab", Bytes()).prompts == ((97, 98),)
    w = from_text(["a", "bc"], Bytes(bos=300), max_new_tokens=7, temperature=0.5, seed=3)
    assert w.prompts == ((300, 97), (300, 98, 99))
    assert (w.max_new_tokens, w.temperature, w.seed, w.stop_at_eos) == (7, 0.5, 3, True)


def test_a_text_file_is_one_prompt_and_jsonl_is_many(tmp_path):
    (tmp_path / "a.txt").write_text("héllo\n", encoding="utf-8")
    lines = [json.dumps({"text": "one\u2028line", "id": 1}, ensure_ascii=False), "", json.dumps({"text": "two"})]
    (tmp_path / "b.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    one = from_file(tmp_path / "a.txt", Bytes())
    assert (one.name, Bytes.decode(one.prompts[0])) == ("a", "héllo\n")
    assert [Bytes.decode(p) for p in from_file(str(tmp_path / "b.jsonl"), Bytes()).prompts] == [
        "one\u2028line", "two"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "né".encode("latin-1"), "not UTF-8 text: byte 1"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"\n\n", "is empty"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("foreign.jsonl", b'{"prompt": "a"}', 'line 1 is not an object with a non-empty "text"'),
        ("list.jsonl", b'["a"]', "line 1 is not an object"),
    ],
)
def test_a_file_that_holds_no_prompts_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*") as error:
        from_file(tmp_path / name, Bytes())
    assert message in str(error.value)


def test_a_missing_file_and_a_folder_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="cannot read prompts from .*gone.txt: No such file"):
        from_file(tmp_path / "gone.txt", Bytes())
    with pytest.raises(ValueError, match="cannot read prompts from"):
        from_file(tmp_path, Bytes())


@pytest.mark.parametrize("kind", HELD_OUT_KINDS)
@pytest.mark.parametrize("cell", [Cell(3, 64), Cell(5, 1000), Cell(2, 8192)], ids=str)
def test_held_out_prompts_have_exactly_the_length_asked_for_and_differ(kind, cell):
    w = held_out(kind, cell, Bytes(), seed=4)
    assert w.cell == cell
    assert {len(p) for p in w.prompts} == {cell.length}
    assert len(set(w.prompts)) == cell.batch
    assert w.labels == ()
    assert not w.stop_at_eos  # the end of text does not shorten a load


def test_the_seed_decides_which_places_are_drawn():
    draws = [held_out("code", Cell(4, 300), Bytes(), seed=seed).prompts for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize(("kind", "source"), [("prose", "manual"), ("code", "code")])
def test_a_held_out_prompt_is_one_place_of_one_document_with_text_left_after_it(kind, source):
    texts = [t.text.encode() for t in read_held_out() if t.source == source]
    homes = []
    for prompt in held_out(kind, Cell(9, 1300), Bytes()).prompts:
        home = next(i for i, text in enumerate(texts) if bytes(prompt) in text)
        end = texts[home].index(bytes(prompt)) + len(prompt)
        assert len(texts[home]) - end >= workload.CONTINUATION_TOKENS
        homes.append(home)
    assert len(set(homes)) == 9  # enough documents: every row has its own


def test_a_conversation_continues_its_own_document():
    w = held_out("conversation", Cell(2, 500), Bytes(), follow_ups=2, follow_up_tokens=40, max_new_tokens=10)
    assert [len(row) for turn in w.turns for row in turn] == [40] * 4
    assert w.max_tokens == 500 + 2 * 40 + 3 * 10
    texts = [t.text.encode() for t in read_held_out() if t.source == "manual"]
    for row in range(2):
        text = next(t for t in texts if bytes(w.prompts[row]) in t)
        place = text.index(bytes(w.prompts[row])) + 500 + workload.CONTINUATION_TOKENS
        assert text[place : place + 40] == bytes(w.turns[0][row])


@pytest.mark.parametrize("length", [64, 700, 8192])
def test_a_revision_prompt_ends_inside_a_copy_of_its_own_beginning(length):
    for prompt in held_out("revision", Cell(4, length), Bytes(), seed=2).prompts:
        text = Bytes.decode(prompt)
        beginning = text[: length // 4]
        copied = sum(line in text[len(text) // 2 :] for line in beginning.splitlines())
        assert copied >= 0.5 * len(beginning.splitlines())


def test_a_beginning_of_text_token_leads_every_prompt_and_is_counted():
    for kind in HELD_OUT_KINDS:
        w = held_out(kind, Cell(3, 200), Bytes(bos=256), seed=1)
        assert all(p[0] == 256 and 256 not in p[1:] and len(p) == 200 for p in w.prompts)
        assert all(256 not in row for turn in w.turns for row in turn)


def test_what_cannot_be_had_is_said_in_the_labels():
    documents = [t for t in read_held_out() if t.source == "code"]
    longest = max(len(t.text.encode()) for t in documents)
    assert held_out("code", Cell(1, longest), Bytes()).labels == ("joined documents",)
    places = sum(max(0, len(t.text.encode()) - workload.CONTINUATION_TOKENS) // 8192 for t in documents)
    crowded = held_out("code", Cell(places + 1, 8192), Bytes())
    assert crowded.labels == ("overlapping prompts",)
    assert len(set(crowded.prompts)) == places + 1
    total = sum(len(t.text.encode()) for t in documents)
    repeated = held_out("code", Cell(3, total - workload.CONTINUATION_TOKENS), Bytes())
    assert repeated.labels == ("joined documents", "repeated prompts")
    assert len(set(repeated.prompts)) == 1


def test_lengths_and_kinds_that_do_not_exist_are_clear_errors():
    with pytest.raises(ValueError, match="holds no prompt of 9000000 tokens"):
        held_out("prose", Cell(1, 9_000_000), Bytes())
    with pytest.raises(ValueError, match="must be one of prose, code, revision, conversation, got 'poems'"):
        held_out("poems", Cell(1, 64), Bytes())
    with pytest.raises(ValueError, match="no room for text"):
        held_out("prose", Cell(1, 1), Bytes(bos=1))


def test_importing_workloads_loads_no_torch():
    program = "import sys, specdec_lab.workload; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_overlapping_excerpts_never_repeat_a_disjoint_one():
    rng = random.Random(0)
    for length in (64, 97, 500):
        document = tuple(range(2111))
        disjoint, overlapping = (list(part) for part in shipped_text._excerpts(document, length, rng))
        starts = [e[0] for e in disjoint + overlapping]
        assert len(set(starts)) == len(starts)
        assert all(b - a >= length for a, b in pairwise(sorted(e[0] for e in disjoint)))
        assert max(starts) + length + workload.CONTINUATION_TOKENS <= len(document)
