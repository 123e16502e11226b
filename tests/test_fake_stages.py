"""The stages of the GPU script on the GPU that is not there: everything that they launch, capture and time goes through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from specdec_lab.bench.gpu import attention_calls, round_calls, session, timing
from specdec_lab.bench.gpu.context import NOT_CAPTURED, Context
from specdec_lab.bench.gpu.ledger import RED
from specdec_lab.bench.gpu.run import stage_of
from specdec_lab.bench.gpu.sizes import TINY
from specdec_lab.bench.gpu.stages import calibrate, rounds
from test_fake_rounds import machine

SMALL = replace(TINY, repeats=2, most_layers=2, rounds=4, overhead_rounds=2, overhead_blocks=1, energy_s=1e-9, most_cases=1,
                batches=(2,), headline=(24,), tune_s=0.1)  # fmt: skip
LAUNCHED = {
    "calibrate": {"read_kernel", "nothing_kernel", "ticks_kernel"},
    "kernels": {"split_kernel", "rope_kernel", "compact_kernel", "stats_kernel", "chain_kernel", "residual_kernel"},
    "exposed": {"split_kernel"}, "rounds": {"list_kernel", "stamp_kernel"}, "headline": {"list_kernel", "stamp_kernel"},
    "overhead": {"list_kernel"}, "tune": {"list_kernel"},
}  # fmt: skip
COMPUTING = ("kernels", "rounds")  # what looks at results, or divides by times


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_stage_runs_on_a_gpu(name, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "COUNTED_WORDS", 1 << 10)
    monkeypatch.setattr(calibrate, "STEADY_S", 1e-4)
    monkeypatch.setattr(attention_calls, "_flex", lambda stage: "torch.compile asks for a real GPU")
    monkeypatch.setattr(rounds, "_profiled", lambda *_: ())  # the profiler is the driver's
    for module in (timing, round_calls):
        monkeypatch.setattr(module, "MOST_SETS", 2)
    with machine(computes=name in COMPUTING) as fake:
        ledger, found = session.gpu_ledger(tmp_path, "r1"), []
        for row in stage_of(name)(Context(torch.device("cuda"), SMALL, ledger, 300.0, lambda line: None)):
            ledger.write(name, row)
            found.append(row)
        assert found
        assert not [row for row in found if row.verdict == RED and name in COMPUTING]
        assert not [row for row in found if NOT_CAPTURED in str(row.values) and "sdpa" not in row.what], "all of ours can be"
        assert {launch.variant.name for launch in fake.launched} >= LAUNCHED[name]
