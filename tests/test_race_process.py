"""Workers of the race: what they are asked, and that whatever becomes of one is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import racers
from racers import CELL, Fake, raced
from specdec_lab.bench.race import lineup
from specdec_lab.bench.race.peer import Decoded, PeerFailed
from specdec_lab.bench.race.process import Patience, ProcessPeer
from specdec_lab.commands.bench_parser import PEERS
from specdec_lab.records import Cell


@pytest.fixture
def worker(tmp_path):
    """A peer around the fake worker with a fault."""
    path, made = tmp_path / "worker.py", []
    path.write_text(racers.WORKER)

    def make(fault="", **options):
        names = ("hello_s", "prepare_s", "decode_s", "close_s")
        patience = Patience(**{name: options.pop(name, 20.0) for name in names})
        made.append(ProcessPeer("fake/plain", [sys.executable, str(path), fault], patience=patience, **options))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


def test_a_worker_continues_prompts_and_says_its_settings(worker):
    peer = worker()
    assert peer.why_not(CELL) is None
    assert peer.name == "fake/plain"
    assert peer.settings()["threads"] == 3
    assert peer.prepare([[1, 2], [3, 4]], 3) == 0.25
    assert peer.settings() == {"threads": 3, "rows": 2}
    assert peer.decode() == Decoded([[3, 4, 5], [5, 6, 7]], 0.5, {"rounds": 3})
    assert peer.decode().tokens == [[3, 4, 5], [5, 6, 7]]


def test_a_worker_does_not_see_our_import_path(worker, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    peer = worker()
    assert peer.why_not(CELL) is None
    assert peer.settings()["stray"] is False


def test_a_worker_that_takes_fewer_rows_says_so(worker):
    assert worker().why_not(Cell(3, 3)) == "fake/plain takes at most 2 rows"


def test_a_closed_worker_has_ended_and_starts_again_when_asked(worker):
    peer = worker()
    peer.prepare([[1]], 1)
    process = peer._worker._process
    peer.close()
    assert process.poll() == 0
    assert peer.why_not(CELL) is None
    assert peer.prepare([[1]], 1) == 0.25


def test_a_worker_that_dies_is_one_sentence_with_its_last_words(worker):
    peer = worker("dies at decode")
    peer.prepare([[1]], 1)
    with pytest.raises(PeerFailed, match=r"fake/plain died when asked to decode \(exit code 1\): the model is broken"):
        peer.decode()


def test_a_worker_that_dies_at_once_is_a_reason_and_is_not_started_again(worker):
    peer = worker("dies at hello")
    assert "died when asked to hello" in peer.why_not(CELL)
    started = peer._worker
    assert "died when asked to hello" in peer.why_not(CELL)
    assert peer._worker is started


def test_a_worker_that_gives_no_answer_is_stopped(worker):
    peer = worker("hangs at decode", decode_s=0.3)
    peer.prepare([[1]], 1)
    process = peer._worker._process
    with pytest.raises(PeerFailed, match=r"gave no answer to decode in 0.3 s and was stopped"):
        peer.decode()
    assert process.wait(timeout=10) != 0


def test_a_worker_that_does_not_even_greet_is_stopped_at_once(worker):
    peer = worker("hangs at hello", hello_s=0.3)
    assert "gave no answer to hello in 0.3 s" in peer.why_not(CELL)
    assert peer._worker._process.wait(timeout=10) != 0


def test_a_worker_that_does_not_close_is_stopped(worker):
    peer = worker("hangs at close", close_s=0.3)
    peer.prepare([[1]], 1)
    process = peer._worker._process
    peer.close()
    assert process.poll() not in (None, 0)


@pytest.mark.parametrize(("fault", "words"), [
    ("refuses prepare", "fake/plain: no room"), ("babbles at prepare", "no JSON object: b'loading ...")
])  # fmt: skip
def test_a_refusal_and_a_babbling_library_are_one_sentence(worker, fault, words):
    with pytest.raises(PeerFailed, match=words):
        worker(fault).prepare([[1]], 1)


def test_a_worker_that_needs_no_time_is_not_believed(worker):
    peer = worker("lies")
    peer.prepare([[1]], 1)
    with pytest.raises(PeerFailed, match="decoded in 0"):
        peer.decode()


def test_a_program_that_does_not_exist_is_a_reason():
    assert "could not be started" in ProcessPeer("x/plain", ["/nowhere/python"]).why_not(CELL)


def test_a_dying_worker_in_a_race_loses_nothing(worker):
    plain = Fake("ours/off", tokens=[[[4, 5, 6, 7]] * 2])
    results, _ = raced(worker("dies at decode"), worker(), plain=plain)
    assert [row.state for row in results[0].rows] == ["ok", "failed", "ok"]
    assert results[0].rows[2].speed.median == 16


def test_workers_get_their_mode_and_the_draft_only_where_it_drafts():
    found = lineup.worker_peers("openvino", "py", "target", "draft", 2)
    assert [peer.name for peer in found] == ["openvino/plain", "openvino/draft", "openvino/lookup"]
    assert all(peer.goes_last for peer in found)
    commands = [peer._command for peer in found]
    assert [("--draft" in command) for command in commands] == [False, True, False]
    assert all(command[command.index("--threads") + 1] == "2" for command in commands)
    alone = lineup.worker_peers("llama.cpp", "py", "target", None, 2)
    assert [peer.name for peer in alone] == ["llama.cpp/plain", "llama.cpp/lookup"]
    assert not any(peer.goes_last for peer in alone)
    assert tuple(lineup.WORKERS) == PEERS


def test_models_are_converted_once_by_the_peers_own_python(tmp_path, monkeypatch):
    copy = tmp_path / "copy.py"
    copy.write_text("import shutil, sys\nif sys.argv[1] == 'broken': sys.exit('no such layer')\nshutil.copy(*sys.argv[1:])\n")
    monkeypatch.setattr(lineup, "script", lambda name: copy)
    (tmp_path / "source").write_text("weights")
    (tmp_path / "target-unfinished.gguf").write_text("half of them")
    made = lineup.convert("llama.cpp", sys.executable, str(tmp_path / "source"), tmp_path, "target")
    assert Path(made).read_text() == "weights"
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["target.gguf"]
    assert lineup.convert("llama.cpp", "no-python", "gone", tmp_path, "target") == made
    with pytest.raises(ValueError, match="could not be converted: no such layer"):
        lineup.convert("llama.cpp", sys.executable, "broken", tmp_path, "draft")
