"""`bench race` from the shell: what it prints, what it writes and when, its exit code, and mistakes in one line."""

from __future__ import annotations

import io
import json

import pytest

import letters
import tiny
from specdec_lab.bench import sessions
from specdec_lab.bench.race import ours
from specdec_lab.bench.race.peer import Decoded
from specdec_lab.cli import main
from specdec_lab.commands.bench_parser import DEFAULT_ACTION, GRIDS, PeerOption
from specdec_lab.commands.parser import build_parser


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a saved tiny model and its draft, as the working folder; random prompts for every cell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sessions, "_held_out", lambda pair, kind, max_new_tokens, sampling: letters.random_text(max_new_tokens))
    for name in ("model", "draft"):
        tiny.model().save_pretrained(tmp_path / name)
    return tmp_path


def call(*words):
    out, err = io.StringIO(), io.StringIO()
    code = main(["bench", *(str(word) for word in words)], load=letters.loader(), out=out, err=err)
    return code, out.getvalue(), err.getvalue()


SMALL = ("race", "--model", "./model", "--draft", "./draft", "--blocks", 2, "--new-tokens", 5)
OURS = ("--configs", "ngram/chain3", "--peers", "ours")


def test_race_is_what_bench_alone_does():
    assert DEFAULT_ACTION == "race"
    args = build_parser().parse_args(["bench"])
    assert (args.action, args.grid, args.cells, args.blocks, args.new_tokens) == ("race", "small", None, 5, 32)
    assert [str(cell) for cell in GRIDS["small"]] == ["1x1024", "1x4096", "8x4096"]
    assert len(GRIDS["full"]) == 16


def test_the_command_prints_a_table_and_writes_only_what_was_asked(place):
    code, out, err = call(*SMALL, *OURS, "--cells", "1x20,2x33")
    assert code == 0
    assert "ours/ngram/chain3" in out
    assert "2x33" in out
    assert "the tokens of plain decoding" in err
    assert not (place / "db").exists()
    code, out, _ = call(*SMALL, *OURS, "--cells", "1x20,2x33", "--save", "--db", "db", "--json", "--markdown", "race.md")
    assert code == 0
    lines = [json.loads(line) for line in (place / "db" / "bench" / "race.jsonl").read_text().splitlines()]
    assert [(line["cell"], line["peer"]) for line in lines] == [
        (cell, peer) for cell in ("1x20", "2x33") for peer in ("ours/off", "ours/ngram/chain3")
    ]
    assert len({line["run"] for line in lines}) == 1
    assert json.loads(out)["cells"][1]["rows"][0]["peer"] == "ours/off"
    assert "| 1x20 | ours/off |" in (place / "race.md").read_text()


def test_an_interrupt_keeps_every_finished_cell(place, monkeypatch):
    honest = ours.OurPeer.prepare

    def prepare(self, prompts, new_tokens):
        if len(prompts) == 2:
            raise KeyboardInterrupt
        return honest(self, prompts, new_tokens)

    monkeypatch.setattr(ours.OurPeer, "prepare", prepare)
    code, out, _ = call(*SMALL, *OURS, "--cells", "1x20,2x33,1x40", "--save", "--db", "db")
    assert code == 130
    assert "interrupted: the cells above are complete" in out
    lines = [json.loads(line) for line in (place / "db" / "bench" / "race.jsonl").read_text().splitlines()]
    assert {line["cell"] for line in lines} == {"1x20"}


def test_a_finished_cell_is_on_disk_before_the_next_begins(place, monkeypatch):
    honest, seen = ours.OurPeer.prepare, []

    def prepare(self, prompts, new_tokens):
        path = place / "db" / "bench" / "race.jsonl"
        seen.append((len(prompts), len(path.read_text().splitlines()) if path.exists() else 0))
        return honest(self, prompts, new_tokens)

    monkeypatch.setattr(ours.OurPeer, "prepare", prepare)
    call(*SMALL, *OURS, "--cells", "1x20,2x33", "--save", "--db", "db")
    assert seen == [(1, 0), (1, 0), (2, 2), (2, 2)]


def test_a_red_check_is_the_exit_code(place, monkeypatch):
    honest = ours.OurPeer.decode

    def decode(self):
        decoded = honest(self)
        bent = [[(token + 1) % 61 for token in row] for row in decoded.tokens]
        return decoded if self.name == "ours/off" else Decoded(bent, decoded.seconds, decoded.extra)

    monkeypatch.setattr(ours.OurPeer, "decode", decode)
    code, out, _ = call(*SMALL, *OURS, "--cells", "1x20")
    assert code == 1
    assert "ours/ngram/chain3, red: row 0 emits token" in out


def test_a_cell_that_does_not_fit_is_said_and_the_exit_code_too(place):
    code, out, _ = call(*SMALL, *OURS, "--cells", "1x5000")
    assert code == 2
    assert "1x5000  skipped: " in out


@pytest.mark.parametrize(("words", "message"), [
    (("--dtype", "bfloat16"), "float32, and this engine runs in bfloat16"),
    (("--peer", "vllm=python"), "NAME=PYTHON with a name of llama.cpp, openvino"),
    (("--peer", "llama.cpp=/nowhere/python"), "there is no program /nowhere/python"),
    (("--policy", "gone.json"), "gone.json"),
    (("--markdown", "race.txt"), "must end in .md"),
    (("--cells", "3"), "BATCHxLENGTH"),
])  # fmt: skip
def test_a_mistake_is_one_line(place, words, message):
    code, out, err = call(*SMALL, *words, *(() if "--peer" in words else ("--peers", "ours")))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_peer_option_has_a_python_and_maybe_a_folder_of_models():
    assert PeerOption.parse("llama.cpp=venv/bin/python") == PeerOption("llama.cpp", "venv/bin/python")
    assert PeerOption.parse("openvino=py,models") == PeerOption("openvino", "py", "models")
    with pytest.raises(ValueError, match="NAME=PYTHON"):
        PeerOption.parse("llama.cpp")
