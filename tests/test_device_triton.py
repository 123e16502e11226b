"""Rounds on the device with the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("config", "law"),
    [("model:full/chain1", {}), ("self:2+5/chain2", {"temperature": 0.8, "seed": 3}),
     ("self:2+5/2,1", {"temperature": 0.8, "seed": 3}), ("off", {"temperature": 0.8, "seed": 3, "verifier": "coupled"}),
     ("self:snapkv3+2r2/chain2", {}), ("self:snapkv3+2/2,1", {"temperature": 0.8, "seed": 3}),
     ("ngram/chain2", {"temperature": 0.8, "seed": 3})],
)  # fmt: skip
def test_rounds_of_kernels_give_the_records_of_rounds_on_the_host(config, law):
    import specdec_lab as sd
    import tiny

    pair = sd.load(tiny.model("qwen3", **SMALL), tiny.model("llama", seed=1, **SMALL))
    prompts = [[5, 6, 7], [3, 4] * 3] if "ngram" in config else tiny.prompts([4, 9])
    asked = sd.Workload("test", prompts, 3, stop_at_eos=False, **law)
    host, device = (sd.Engine(pair, "sdpa", rounds=rounds) for rounds in ("host", "device"))
    run = sd.record(device.steps(asked, config))
    assert run.header.target["rounds"] == "eager, triton operations: no CUDA"
    expected = sd.record(host.steps(asked, config))
    assert [(s.tokens, s.drafted) for s in run.rounds] == [(s.tokens, s.drafted) for s in expected.rounds]
    assert config == "off" or any(map(any, (s.drafted for s in run.rounds)))
