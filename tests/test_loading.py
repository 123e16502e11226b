"""Loading models: what is accepted, and the words when something is not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import specdec_lab as sd
import tiny
from specdec_lab.engine.loop import PromptTooLong
from specdec_lab.engine.models.fast_llama import WeightsMismatch
from specdec_lab.engine.models.hf import ModelRefused
from specdec_lab.engine.models.loading import ModelNotFound, TokenizerMismatch


@pytest.fixture
def folder(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def tokenizer(words):
    level = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level))


@pytest.mark.parametrize("runner", ["fast", "hf"])
def test_a_folder_loads_and_equals_the_model_it_was_saved_from(folder, runner):
    prompts = tiny.prompts([5, 20])
    expected = [tiny.plain_greedy(tiny.model("llama"), p, 10) for p in prompts]
    pair = sd.load(str(folder), runner=runner)
    assert pair.target.kind == runner
    assert pair.target.dtype == torch.float32
    assert sd.Engine(pair).generate(prompts, max_new_tokens=10).tokens == expected


def test_an_untied_model_and_sharded_weights_load(tmp_path):
    made = tiny.model("llama", tie_word_embeddings=False)
    made.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    out = sd.Engine(sd.load(str(tmp_path))).generate(tiny.prompts([9]), max_new_tokens=10)
    assert out.tokens == [tiny.plain_greedy(made, tiny.prompts([9])[0], 10)]


def test_a_path_or_name_that_is_no_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="no model at the path or hub name 'no/such-model'.*Give a folder"):
        sd.load("no/such-model")
    with pytest.raises(ModelNotFound, match="no model at the folder"):
        sd.load(str(tmp_path))
    with pytest.raises(ModelNotFound, match="got int"):
        sd.load(3)


@pytest.mark.parametrize("runner", ["fast", "hf"])
def test_missing_and_extra_tensors_are_named(folder, runner):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.z_proj.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = r"missing model.layers.1.mlp.up_proj.weight.*unexpected model.layers.0.self_attn.z_proj"
    with pytest.raises(WeightsMismatch, match=words):
        sd.load(str(folder), runner=runner)


def test_a_tensor_of_another_shape_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"model.norm.weight has shape \(31,\), expected \(64,\)"):
        sd.load(str(folder), runner="fast")


def test_a_file_that_was_cut_short_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsMismatch, match="model.safetensors of .* damaged or incomplete"):
        sd.load(str(folder), runner="fast")


def test_weights_that_are_missing_altogether_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no safetensors"):
        sd.load(str(folder))


def test_target_and_draft_must_share_a_vocabulary(tmp_path):
    with pytest.raises(TokenizerMismatch, match="61 token ids, draft .* has 50"):
        sd.load(tiny.model("llama"), tiny.model("llama", vocab_size=50))
    for name, words in (("a", "xyz"), ("b", "xzy")):
        tiny.model("llama", vocab_size=3, bos_token_id=0).save_pretrained(tmp_path / name)
        tokenizer(list(words)).save_pretrained(tmp_path / name)
    with pytest.raises(TokenizerMismatch, match="differ in 2 entries, for example 'y': 1 against 2"):
        sd.load(str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_runner_that_cannot_says_why():
    with pytest.raises(ValueError, match="FastLlama knows llama, mistral, qwen2, qwen3, not 'olmo2'. Use runner='hf'"):
        sd.load(tiny.model("olmo2"), runner="fast")
    with pytest.raises(ValueError, match="runner must be auto, fast or hf"):
        sd.load("demo", runner="quick")
    with pytest.raises(ValueError, match="device 'cuda' asked for|not one that torch knows"):
        sd.load(tiny.model("llama"), device="cuda" if not torch.cuda.is_available() else "abacus")


def test_a_model_with_its_own_sliding_window_runs_through_transformers():
    made = tiny.model("mistral", sliding_window=16)
    prompts = tiny.prompts([40, 7])
    expected = [tiny.plain_greedy(made, p, 30) for p in prompts]
    pair = sd.load(made)
    assert pair.target.kind == "hf"
    for config in ("off", "self:2+6/chain3"):
        assert sd.Engine(pair).generate(prompts, config, max_new_tokens=30).tokens == expected


def test_a_model_in_an_engine_says_how_to_be_called_directly_again():
    made = tiny.model("olmo2")
    sd.load(made)
    with pytest.raises(ModelRefused, match="set_attn_implementation"):
        made(torch.tensor([[1, 2]]))


def test_prompts_that_cannot_run_are_refused_with_numbers():
    engine = sd.Engine(sd.load(tiny.model("llama")))
    with pytest.raises(PromptTooLong, match="prompt 1 has 1025 tokens; .* has 1024 positions"):
        engine.generate([[1], [1] * 1025])
    with pytest.raises(PromptTooLong, match="at most 1024 beyond"):
        engine.generate([[1] * 1000], max_new_tokens=5000)
    with pytest.raises(ValueError, match="token id 61.*ids 0 to 60"):
        engine.generate([[61]])
    with pytest.raises(ValueError, match="empty"):
        engine.generate([[]])
    with pytest.raises(ValueError, match="without a tokenizer"):
        engine.generate(["text"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("self:4+60/chan3", "column 11"), ("self:0+0/chain3", "at least 1 token"), ("self:4+60/chain0", "1 to 64"),
        ("self:4+60/chain1000", "1 to 64"), ("model:4+60/chain3", "no draft model is loaded"),
        ("model:snapkv64+8/chain3", "among the target.s own keys"), ("self:4+60/8,8,8", "the cache has 188 slots for drafts"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_run_say_why(config, words):
    engine = sd.Engine(sd.load(tiny.model("llama")))
    with pytest.raises(ValueError, match=words):
        engine.generate([[1, 2, 3]], config)


def test_the_identity_changes_with_weights_and_not_with_loading_again(folder):
    one, again = sd.Engine(sd.load(str(folder))), sd.Engine(sd.load(str(folder)))
    assert one.identity().base_fingerprint == again.identity().base_fingerprint
    other = sd.Engine(sd.load(tiny.model("llama", seed=3)))
    assert one.identity().base_fingerprint != other.identity().base_fingerprint
    with pytest.raises(KeyError):
        one.identity().drafter_fingerprint("model")


def test_the_run_header_says_what_a_number_needs():
    engine = sd.Engine(sd.load(tiny.model("llama")))
    out = engine.generate([[1, 2, 3], [4] * 9], "ngram/chain3", max_new_tokens=5)
    header = out.run.header
    assert str(header.cell) == "2x6"
    assert header.backend == engine.backend.name
    assert header.ceilings["read_bytes_per_s"] > 1e8
    assert header.target["runner"] == "fast"
    assert "KV fits in cache" in header.labels
    assert json.loads(json.dumps(header.to_dict()))["config"] == "ngram/chain3"
