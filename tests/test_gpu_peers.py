"""transformers as a peer of the GPU run: which settings may have a speed, and that what is said to be compiled is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specdec_lab.bench.gpu.context import Context
from specdec_lab.bench.gpu.ledger import PASS, RED, Ledger
from specdec_lab.bench.gpu.sizes import TINY
from specdec_lab.bench.gpu.stages import peers as peers_stage
from specdec_lab.bench.race.hf import TransformersPeer
from specdec_lab.bench.race.peer import Decoded, PeerFailed
from specdec_lab.records import Cell

CPU = torch.device("cpu")
SIZES = replace(TINY, gate_cells=(Cell(1, 32),))


def quiet(line):
    """Says nothing."""


@pytest.fixture
def context(tmp_path):
    return Context(CPU, SIZES, Ledger(tmp_path / "gpu.jsonl", "r", {}), 600.0, quiet)


@pytest.fixture
def compiled(monkeypatch):
    """What was handed to torch.compile, which here changes nothing."""
    seen = []

    def compile(function=None, **options):
        seen.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return seen


def changed(monkeypatch, name, change):
    """Let the transformers setting of this name decode otherwise."""
    usual = TransformersPeer.decode

    def decode(self):
        found = usual(self)
        return change(found) if self.name == f"transformers/{name}" else found

    monkeypatch.setattr(TransformersPeer, "decode", decode)


def test_every_setting_has_its_tokens_compared_before_any_of_it_is_timed(context, compiled):
    rows = list(peers_stage.stage(context))
    first = {}
    for row in rows:
        first.setdefault((row.kind, row.what.split(" ")[0]), rows.index(row))
    for name in ("plain", "static", "continuous", "assisted", "lookup", "compiled"):
        peer = f"transformers/{name}"
        assert rows[first["same tokens", peer]].verdict == PASS
        assert first["same tokens", peer] < first["decode", peer]
    large = [row for row in rows if row.kind == "decode" and row.labels]
    assert {row.what.split(" ")[0] for row in large} == {
        "ours/off", "transformers/plain", "transformers/static", "transformers/continuous", "transformers/compiled"
    }  # with random weights drafts mean nothing
    assert all(row.labels == ("random-weights",) and row.values["step_s"] > 0 for row in large)
    guessing = {row.what.split(" ")[0]: row for row in rows if "tokens_per_round" in row.values}
    assert guessing.keys() == {"ours/model:4+124/chain3", "ours/ngram/chain6", "transformers/assisted", "transformers/lookup"}
    assert len(compiled) == 1 + len(SIZES.peer_cells)  # nothing but the setting that says so compiles
    assert all(options["backend"] == "eager" for options in compiled)
    assert rows[-1].what == "gpt-fast"
    assert "--gpt-fast PATH" in rows[-1].reason


def test_wrong_tokens_and_a_break_take_the_speed_from_their_setting_alone(context, compiled, monkeypatch):
    def break_down(found):
        raise PeerFailed("gave no result")

    changed(monkeypatch, "static", lambda found: Decoded([[7] * len(row) for row in found.tokens], found.seconds, found.extra))
    changed(monkeypatch, "plain", break_down)
    rows = list(peers_stage.stage(context))
    static = [row for row in rows if row.what.startswith("transformers/static")]
    assert [(row.kind, row.verdict) for row in static] == [("same tokens", RED)]
    plain = [row for row in rows if row.what.startswith("transformers/plain")]
    assert [(row.kind, row.what, row.reason, row.verdict) for row in plain] == [
        ("failed", "transformers/plain demo-2M 1x32", "PeerFailed: gave no result", None)
    ]
    timed = {row.what.split(" ")[0] for row in rows if row.kind == "decode"}
    assert {"transformers/continuous", "transformers/assisted", "transformers/compiled"} <= timed


def test_without_time_for_its_compiler_it_is_left_out_in_words(context, compiled, monkeypatch):
    monkeypatch.setattr(context, "has_time_for", lambda seconds: False)
    shipped = peers_stage._shipped(context)
    (left,) = peers_stage._compiled(context, shipped, shipped)
    assert (left.kind, left.what) == ("left out", "transformers/compiled demo-2M 1x32")
    assert "compiling is taken to need 25 s (assumed)" in left.reason
    assert compiled == []
