"""Models by shape: random weights, random context, and what fits."""

from __future__ import annotations

import pytest
import torch

import specdec_lab as sd
from specdec_lab.commands.mistakes import UserMistake
from specdec_lab.costs.shapes import SHAPES
from specdec_lab.engine import cache as cache_module
from specdec_lab.engine.cache import CacheTooLarge, KvCache
from specdec_lab.engine.memory import MemoryPlan, slots_of
from specdec_lab.engine.models import random_weights
from specdec_lab.engine.models.fast_llama import why_not
from specdec_lab.engine.models.loading import ModelPair
from specdec_lab.engine.models.random_weights import CONFIGS, ModelTooLarge, RandomWeights, config_of
from specdec_lab.engine.models.runner import shape_of
from specdec_lab.records import Cell
from specdec_lab.stream import record
from specdec_lab.workload import random_context

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine():
    return sd.Engine(sd.load("random:tiny", "random:tiny-draft", device="cpu", dtype="float32"))


@pytest.mark.parametrize(("name", "published"), [
    ("llama-3.1-8b", "Llama-3.1-8B"), ("llama-2-7b-32k", "Llama-2-7B-32K"), ("qwen3-1.7b", "1.7B"), ("draft-1b", "1B"),
])  # fmt: skip
def test_a_named_shape_has_the_sizes_of_the_published_model(name, published):
    assert shape_of(config_of(name)) == SHAPES[published]


@pytest.mark.parametrize("name", CONFIGS)
def test_our_runner_runs_every_named_shape_in_bfloat16_on_a_device(name):
    config = config_of(name)
    assert why_not(config) is None
    assert config.dtype == torch.bfloat16


def test_every_rotary_table_covers_the_positions_of_its_configuration():
    assert config_of("llama-3.1-8b").rope_parameters["rope_type"] == "llama3"
    assert config_of("llama-2-7b-32k").rope_parameters["factor"] == 8.0
    assert config_of("qwen3-1.7b").max_position_embeddings == 131072


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no random-weight model is called 'llama-9'.*llama-3\.1-8b.*tiny"):
        sd.load("random:llama-9")
    with pytest.raises(ValueError, match="runs on our own runner only"):
        sd.load("random:tiny", runner="hf")


def test_a_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (RandomWeights(config_of("tiny"), CPU, torch.float32, seed) for seed in (3, 3, 4))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["model.layers.0.mlp.down_proj.weight"])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_weights_are_made_in_their_dtype():
    weights = RandomWeights(config_of("tiny"), CPU, torch.bfloat16, 0)
    assert {weights[name].dtype for name in weights} == {torch.bfloat16}


def test_logits_stay_finite_and_of_order_one_through_32_layers():
    config = config_of("tiny")
    config.num_hidden_layers = 32
    made = random_weights.make("deep", config, seed=0, device=CPU, dtype=torch.bfloat16, kv_dtype=None)
    engine = sd.Engine(ModelPair("deep", made, None, None, ()), backend="sdpa")
    seen = []
    forward = made.forward
    made.forward = lambda *a, **k: seen.append(forward(*a, **k)) or seen[-1]
    engine.generate([list(range(1, 40))], "off", max_new_tokens=4)
    logits = torch.cat([s.logits.flatten() for s in seen if s.logits.numel()]).float()
    assert torch.isfinite(logits).all()
    assert 0.3 < float(logits.std()) < 3


def test_headers_say_random_weights(engine):
    run = engine.generate([[1, 2, 3]], "off", max_new_tokens=3).run
    assert "random-weights" in run.header.labels


def test_a_tiny_model_speculates_without_changing_its_text(engine):
    prompts = [list(range(5, 45)), list(range(100, 120))]
    plain = engine.generate(prompts, "off", max_new_tokens=12).tokens
    for config in ("self:4+12/chain3", "model:4+12/chain2", "self:full/2,1"):
        assert engine.generate(prompts, config, max_new_tokens=12).tokens == plain


@pytest.mark.parametrize("config", ["off", "self:4+28/chain3", "model:4+28/chain2", "self:snapkv16+8/chain2", "self:full/2,1"])
def test_a_random_context_is_decoded_without_reading_a_prompt(engine, config):
    workload = random_context(Cell(2, 300), 512, max_new_tokens=6)
    run = record(engine.steps(workload, config))
    assert "random context" in run.header.labels
    assert all(step.kind == "round" or step.query_tokens <= 32 for step in run.steps)  # SnapKV scores its last queries
    assert run.rounds[0].context_tokens == (299, 299)
    assert [len(row) for row in run.tokens()] == [6, 6]


def test_self_drafts_through_the_whole_random_context_are_accepted(engine):
    run = record(engine.steps(random_context(Cell(2, 300), 512, max_new_tokens=9), "self:full/chain2"))
    assert all(step.accepted == step.drafted for step in run.rounds[:-1])


def test_a_rewound_random_context_gives_the_same_text(engine):
    opened = engine.open(random_context(Cell(2, 120), 512, max_new_tokens=6))
    assert record(opened.steps("off")).tokens() == record(opened.steps("self:4+28/chain3")).tokens()


def test_noise_fills_every_row_to_its_length_and_no_further():
    cache = KvCache(2, 2, 1, 50, 4, torch.float32, CPU)
    cache.fill_noise([20, 20], 0)
    assert (cache.kv[..., :20, :] != 0).all()
    assert (cache.kv[..., 20:, :] == 0).all()
    assert 0.8 < float(cache.kv[..., :20, :].std()) < 1.2
    assert cache.committed.tolist() == [20, 20]


def test_a_context_is_read_or_noise():
    with pytest.raises(ValueError, match=r"context must be read or noise, got 'zeros'"):
        sd.Workload("x", ((1,),), 4, context="zeros")
    assert sd.Workload("x", ((1,),), 4, context="noise").labels == ("random context",)


def test_a_plan_names_the_bytes_and_the_largest_batch_and_length_that_fit():
    slot = SHAPES["Llama-3.1-8B"].kv_bytes_per_token(2)
    plan = MemoryPlan(32, 32768, slot, 100 << 30, weight_bytes=16 << 30)
    reason = plan.why_not("cuda:0")
    assert reason is not None
    for number in (plan.kv_bytes, plan.weight_bytes, plan.largest_batch, plan.largest_length):
        assert f"{number:,}" in reason
    assert MemoryPlan(plan.largest_batch, 32768, slot, 100 << 30).why_not("cuda:0") is None
    assert MemoryPlan(plan.largest_batch + 1, 32768, slot, 100 << 30).why_not("cuda:0") is not None
    assert MemoryPlan(32, plan.largest_length, slot, 100 << 30).why_not("cuda:0") is None
    assert MemoryPlan(32, plan.largest_length + 1, slot, 100 << 30).why_not("cuda:0") is not None


def test_planned_bytes_are_the_bytes_that_a_cache_takes():
    cache = KvCache(2, 3, 4, 700, 8, torch.bfloat16, CPU)
    assert cache.slots == slots_of(700)
    assert cache.kv.numel() * 2 == MemoryPlan(3, 700, 2 * 2 * 4 * 8 * 2, 0).kv_bytes


def test_weights_that_do_not_fit_are_refused_before_any_is_made(monkeypatch):
    monkeypatch.setattr(random_weights, "available_bytes", lambda device: 10 << 30)
    monkeypatch.setattr(RandomWeights, "__getitem__", lambda self, name: pytest.fail("a tensor was made"))
    with pytest.raises(ModelTooLarge, match=r"16,059,990,016 bytes in bfloat16, 10,737,418,240 are free .*131,072 bytes"):
        sd.load("random:llama-3.1-8b", dtype="bfloat16", device="cpu")


def test_a_random_context_that_does_not_fit_is_refused_before_its_ids_are_made(engine, monkeypatch):
    from specdec_lab.bench import sessions as module

    monkeypatch.setattr(cache_module, "available_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(module, "random_context", lambda *a, **k: pytest.fail("prompts were drawn"))
    with pytest.raises(CacheTooLarge, match=r"needs [\d,]+ bytes beside [\d,]+ bytes of weights; 1,048,576 are free"):
        module.Sessions(engine, "random").open(Cell(64, 4000))


def test_the_shell_runs_a_random_model_on_a_random_context(capsys):
    from specdec_lab.cli import main

    line = "run --random-weights tiny --device cpu --workload random --cell 1x64 --max-new-tokens 3 --json"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert "random-weights" in out
    assert "random context" in out


def test_two_models_cannot_be_asked_for_at_once():
    from specdec_lab.commands.lab import Lab
    from specdec_lab.commands.parser import build_parser

    args = build_parser().parse_args(["doctor", "--model", "demo", "--random-weights", "tiny"])
    with pytest.raises(UserMistake, match="leave demo out"):
        Lab().engine_for(args)
