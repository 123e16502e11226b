"""`bench lossless`: the table of chi-squares that a user can make on their own machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec_lab.bench import lossless as module
from specdec_lab.bench.lossless import CONTROL, ROWS, chi_square, exact_law, lossless, small_model
from specdec_lab.cli import main
from specdec_lab.engine import verify
from specdec_lab.engine.sampling import Processor

FEW = {"configs": ("off", "model:0+2/chain3", "model:full/2,2,1"), "processors": (Processor(0.9, 1.0, 0),), "samples": ROWS}


def test_every_configuration_follows_the_law_and_the_control_does_not():
    report = lossless(**FEW)
    assert report.faults == ()
    assert [c.config for c in report.controls] == [CONTROL]
    assert all(c.accepted > 0 for c in report.checks if c.config != "off")
    assert all(c.found.freedom > 50 for c in report.checks)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["limit"] == 1e-3 / 6


def test_an_engine_that_draws_corrections_from_the_wrong_law_is_found(monkeypatch):
    def wrong(proposal, target_law, accept_u, residual_u, forced=None):
        return original(proposal, target_law, accept_u * 0.7, residual_u, forced)  # accepts more than it may

    original = verify.accept_rejection
    monkeypatch.setattr(verify, "accept_rejection", wrong)
    report = lossless(**FEW, verifiers=("rejection",))
    assert any(fault.startswith("model:0+2/chain3") for fault in report.faults), report


def test_a_text_that_cannot_be_is_never_excused():
    law = [0.0] * 624 + [1.0]
    found = chi_square([[4, 4, 4, 4]] * 5000 + [[0, 0, 0, 0]], law)
    assert (found.statistic, found.p) == (None, 0.0)
    assert sum(exact_law(small_model(), Processor(0.9, 1.0, 3))) == pytest.approx(1)


def test_too_few_texts_are_refused(capsys):
    assert main(["bench", "lossless", "--samples", "10"]) == 2
    assert "ask for at least 3000" in capsys.readouterr().err


def test_the_table_is_printed_and_saved_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.lossless, "__defaults__", (FEW["configs"], ("coupled",), FEW["processors"]))
    assert main(["bench", "lossless", "--samples", "3000", "--save", "--db", "db"]) == 0
    assert "all 3 follow the target's law" in capsys.readouterr().out
    assert len(json.loads(Path("db/bench/lossless.jsonl").read_text())["checks"]) == 3
