"""The GPU run's comparison of rounds: every configuration passes on a CPU, and tokens or drafts that differ are told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import builders
from specdec_lab.bench.gpu import round_checks
from specdec_lab.bench.gpu.context import Context
from specdec_lab.bench.gpu.ledger import PASS, RED, Ledger
from specdec_lab.bench.gpu.sizes import FULL, TINY


@pytest.fixture
def context(tmp_path):
    sizes = replace(TINY, laws=1, round_configs=FULL.round_configs)
    return Context(torch.device("cpu"), sizes, Ledger(tmp_path / "gpu.jsonl", "r", {}), 60.0)


def test_every_configuration_is_compared_and_right(context, monkeypatch):
    found = []
    original = round_checks._run
    monkeypatch.setattr(round_checks, "_run", lambda *given: found.append(original(*given)) or found[-1])
    rows = list(round_checks.round_rows(context))
    assert [row.verdict for row in rows] == [PASS] * len(round_checks.CONFIGS)
    assert len(round_checks.CONFIGS) == FULL.round_configs
    for run in found:
        drafted = [any(step.drafted) for step in run.rounds]
        assert any(drafted) == (run.header.config != "off"), "n-grams are found"


@pytest.mark.parametrize("other", [{"drafted": (3, 2)}, {"accepted": (0, 2)}, {"tokens": ((0, 1), (7, 8, 9))}], ids=str)
def test_a_round_that_differs_is_red(context, monkeypatch, other):
    runs = iter([builders.run_of(builders.round_step()), builders.run_of(builders.round_step(**other))] * 100)
    monkeypatch.setattr(round_checks, "_run", lambda *_: next(runs))
    first = next(iter(round_checks.round_rows(context)))
    assert first.verdict == RED
    assert "eager" in first.reason
