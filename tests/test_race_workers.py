"""The stand-alone workers that run other engines, without these engines: fakes that fail where the real ones would be wrong."""

from __future__ import annotations

import ast
import importlib
import io
import json
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_engines import VOCAB, FakeGenAi, FakeLlama, continuation

ROOT = Path(__file__).parents[1]
WORKERS = ROOT / "specdec_lab" / "bench" / "race" / "workers"
DEMO = ROOT / "specdec_lab" / "demo"


def script(name):
    """A worker's module by its plain name, as the scripts import one another."""
    sys.path.insert(0, str(WORKERS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(WORKERS))


protocol, speculation, probing, convert_gguf = map(script, ("protocol", "speculation", "probing", "convert_gguf"))
llama_api, llama_cpp_worker, openvino_worker = map(script, ("llama_api", "llama_cpp_worker", "openvino_worker"))

PROMPTS = [[1, 2, 3, 4, 1, 2], [5], [7, 7, 1]]  # ragged, with a single token among them
NEW_TOKENS = 29


# ---- conversion


def rotate_halves(x, position):
    """transformers' rotation of one head: element i with element i + half."""
    half = len(x) // 2
    angles = position * 100.0 ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)])


def rotate_neighbours(x, position):
    """llama.cpp's rotation of one head: element 2 i with element 2 i + 1."""
    half = len(x) // 2
    angles = position * 100.0 ** (-np.arange(half) / half)
    a, b = x[0::2], x[1::2]
    out = np.empty_like(x)
    out[0::2], out[1::2] = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
    return out


def test_attention_scores_do_not_change_when_rows_are_paired():
    heads, dim, hidden = 3, 10, 7
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, heads * dim, hidden))
    x, y = rng.normal(size=(2, hidden))
    paired_query, paired_key = (convert_gguf.pair_rows(w, heads) for w in (query, key))
    for head in range(heads):
        rows = slice(head * dim, (head + 1) * dim)
        ours = rotate_halves(query[rows] @ x, 9) @ rotate_halves(key[rows] @ y, 4)
        theirs = rotate_neighbours(paired_query[rows] @ x, 9) @ rotate_neighbours(paired_key[rows] @ y, 4)
        unpaired = rotate_neighbours(query[rows] @ x, 9) @ rotate_neighbours(key[rows] @ y, 4)
        assert theirs == pytest.approx(ours, rel=1e-12)
        assert unpaired != pytest.approx(ours, rel=1e-3)


def test_every_tensor_of_the_shipped_pair_has_a_place_in_a_gguf_file():
    for name in ("target", "draft"):
        config = json.loads((DEMO / name / "config.json").read_text())
        state = convert_gguf.read_safetensors(DEMO / name / "model.safetensors")
        out = dict(convert_gguf.converted(state, config))
        layers = config["num_hidden_layers"]
        assert len(out) == 9 * layers + 2
        assert {"token_embd.weight", "output_norm.weight", "blk.0.ffn_down.weight"} <= out.keys()
        assert {values.dtype for values in out.values()} == {np.dtype("float32")}
        assert out["blk.0.attn_v.weight"] is state["model.layers.0.self_attn.v_proj.weight"]
        assert not np.array_equal(out["blk.0.attn_q.weight"], state["model.layers.0.self_attn.q_proj.weight"])


def test_a_head_of_its_own_is_written_and_a_tied_one_is_not():
    state = {"lm_head.weight": np.zeros((2, 2), np.float32)}
    config = {"num_attention_heads": 1, "num_key_value_heads": 1}
    assert [name for name, _ in convert_gguf.converted(state, config | {"tie_word_embeddings": False})] == ["output.weight"]
    assert not list(convert_gguf.converted(state, config | {"tie_word_embeddings": True}))


def test_what_a_llama_of_llama_cpp_does_not_have_is_refused_by_name():
    with pytest.raises(convert_gguf.CannotConvert, match=r"self_attn\.q_norm"):
        convert_gguf.gguf_name("model.layers.0.self_attn.q_norm.weight")
    config = json.loads((DEMO / "target" / "config.json").read_text())
    convert_gguf.check(config)
    with pytest.raises(convert_gguf.CannotConvert, match="llama3"):
        convert_gguf.check(config | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5}})
    with pytest.raises(convert_gguf.CannotConvert, match="'qwen2'"):
        convert_gguf.check(config | {"model_type": "qwen2"})


def test_bfloat16_weights_are_read_exactly():
    import torch
    from safetensors.torch import load_file

    path = DEMO / "draft" / "model.safetensors"
    ours, theirs = convert_gguf.read_safetensors(path), load_file(path)
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name], tensor.float().numpy()), name


def test_the_vocabulary_is_in_the_order_of_its_ids():
    tokenizer = json.loads((DEMO / "target" / "tokenizer.json").read_text())
    tokens, kinds, merges = convert_gguf.vocabulary(tokenizer, 2048)
    assert [tokenizer["model"]["vocab"].get(token, 0) for token in tokens] == list(range(2048))
    assert kinds[0] == convert_gguf.CONTROL
    assert set(kinds[1:]) == {convert_gguf.NORMAL}
    assert merges[0] == " ".join(tokenizer["model"]["merges"][0])
    with pytest.raises(convert_gguf.CannotConvert, match="2048 tokens, the model 2049"):
        convert_gguf.vocabulary(tokenizer, 2049)


def test_a_written_file_says_the_sizes_of_the_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    convert_gguf.write(DEMO / "draft", tmp_path / "draft.gguf")
    reader = gguf.GGUFReader(tmp_path / "draft.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == 100_000
    assert fields["llama.context_length"] == 8192
    assert fields["llama.attention.head_count"] == fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(fields["tokenizer.ggml.tokens"]) == 2048
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert len(reader.tensors) == 11


# ---- speculation


TOKENS = st.lists(st.integers(0, 3), max_size=12)


@given(TOKENS, TOKENS)
def test_what_stands_of_a_draft_is_its_longest_equal_prefix(draft, choices):
    choices = [*choices, *[0] * len(draft)]  # the target says something after every drafted token
    kept = speculation.equal_prefix(draft, choices)
    assert draft[:kept] == choices[:kept]
    assert kept == len(draft) or draft[kept] != choices[kept]


def latest_continuation(tokens, length, shortest):
    """What lookup means, by search."""
    for size in range(speculation.LONGEST_NGRAM, shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if size <= len(tokens) and tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + length]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 2))
def test_lookup_proposes_what_followed_the_latest_equal_ngram(tokens, prompt_tokens, length, shortest):
    prompt = tokens[:prompt_tokens]
    places = speculation.Places()
    places.read_prompt(prompt)
    for _ in range(2):  # the second time after a rewind
        places.rewind(len(prompt))
        for end in range(len(prompt), len(tokens) + 1):
            assert places.propose(tokens[:end], length, shortest) == latest_continuation(tokens[:end], length, shortest)


# ---- llama.cpp, over a fake of its C interface


@pytest.fixture
def llama(monkeypatch):
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(llama_api.Library, "facts", lambda self: {"llama_cpp_python": "0-fake"})
    return fake


@pytest.fixture
def llama_engine(llama, tmp_path):
    def make(mode, threads=2):
        for name in ("target", "draft"):
            (tmp_path / f"{name}.gguf").touch()
        draft = str(tmp_path / "draft.gguf") if mode == "draft" else None
        return llama_cpp_worker.LlamaCpp(
            Namespace(model=str(tmp_path / "target.gguf"), draft=draft, mode=mode, threads=threads)
        )

    return make


EXPECTED = [continuation(prompt, NEW_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("mode", protocol.MODES)
def test_llama_cpp_emits_the_targets_own_tokens_from_the_end_of_the_prompts_every_time(llama_engine, mode):
    engine = llama_engine(mode)
    assert engine.prepare(PROMPTS, NEW_TOKENS) > 0
    for _ in range(3):
        decoded = engine.decode()
        assert decoded.tokens == EXPECTED
        assert 0 < decoded.extra["library_s"] <= decoded.seconds
        assert (decoded.extra["rounds"] == NEW_TOKENS) == (mode == "plain")
    if mode != "plain":
        assert 0 < decoded.extra["accepted"] < decoded.extra["drafted"]
        assert 1 < decoded.extra["tokens_per_round"] <= 1 + engine.settings()["knobs"]["draft_length"]


@pytest.mark.parametrize("mode", ["draft", "lookup"])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_every_length_of_a_draft_gives_the_same_tokens(llama_engine, mode, length):
    engine = llama_engine(mode)
    engine.prepare(PROMPTS, NEW_TOKENS)
    knobs = llama_cpp_worker.replace(engine._knobs, draft_length=length)
    for new_tokens in (1, 2, NEW_TOKENS):
        decoded = llama_cpp_worker.continued(engine._session, knobs, new_tokens)
        assert decoded.tokens == [row[:new_tokens] for row in EXPECTED]


def test_a_plain_step_is_one_decode_of_all_rows_with_one_row_of_logits_each(llama, llama_engine):
    engine = llama_engine("plain")
    engine.prepare(PROMPTS, NEW_TOKENS)
    llama.decodes = llama.logit_rows = 0
    engine.decode()
    assert llama.decodes == NEW_TOKENS
    assert llama.logit_rows == NEW_TOKENS * len(PROMPTS)


def test_prompts_are_read_once_and_without_logits(llama):
    library = llama_api.Library()
    model = SimpleNamespace(api=library.api, handle=lambda tokens: 0, vocab=VOCAB)
    context = llama_api.Context(model, 1, 6000, 1, unified=False)
    context.read(0, [1] * 5000)
    assert llama.contexts[0].kv == [[1] * 5000]
    assert llama.decodes == 3  # pieces of n_batch
    assert llama.logit_rows == 0


def test_what_was_tried_and_chosen_is_in_the_settings_and_the_rest_is_freed(llama, llama_engine):
    engine = llama_engine("draft")
    engine.prepare(PROMPTS, NEW_TOKENS)
    settings = engine.settings()
    json.dumps(settings)
    tried = settings["tried"]
    assert {k["unified_kv"] for k in tried} == {True, False}
    assert {k["draft_length"] for k in tried} == set(llama_cpp_worker.DRAFT_LENGTHS)
    assert {k["draft_threads"] for k in tried} == {1, 2}
    assert settings["knobs"] in [{name: value for name, value in k.items() if name != "seconds_per_step"} for k in tried]
    assert sum(context.open for context in llama.contexts) == 2  # target and draft
    engine.prepare(PROMPTS[:1], 5)
    assert not any(k["unified_kv"] for k in engine.settings()["tried"])  # alike with one row
    engine.close()
    assert not any(context.open for context in llama.contexts)


def test_one_kv_for_many_long_rows_is_not_tried():
    assert llama_cpp_worker.is_unified_worth_trying(8, llama_cpp_worker.UNIFIED_TOKENS)
    assert not llama_cpp_worker.is_unified_worth_trying(8, llama_cpp_worker.UNIFIED_TOKENS + 1)


# ---- OpenVINO, over a fake of GenAI


@pytest.fixture
def openvino_engine(monkeypatch, tmp_path):
    def make(mode, genai):
        monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array, get_version=lambda: "0-fake"))
        monkeypatch.setitem(sys.modules, "openvino_genai", genai)
        (tmp_path / "openvino_model.xml").touch()
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCAB, "max_position_embeddings": 512}))
        draft = str(tmp_path) if mode == "draft" else None
        return openvino_worker.OpenVino(Namespace(model=str(tmp_path), draft=draft, mode=mode, threads=2))

    return make


@pytest.mark.parametrize("mode", protocol.MODES)
@pytest.mark.parametrize("with_prompt", [1, 3])
def test_openvino_times_exactly_the_new_tokens_of_every_row(openvino_engine, mode, with_prompt):
    genai = FakeGenAi(with_prompt)
    engine = openvino_engine(mode, genai)
    assert engine.prepare(PROMPTS, NEW_TOKENS) > 0
    for _ in range(2):
        decoded = engine.decode()
        assert decoded.tokens == EXPECTED
        assert decoded.extra == {"rounds": -(-NEW_TOKENS // 2), "tokens_with_the_prompts": [with_prompt] * len(PROMPTS)}
    asked = genai.pipelines[-1].asked[-1]
    assert asked.max_new_tokens == NEW_TOKENS + with_prompt
    assert asked.ignore_eos
    assert hasattr(asked, "num_assistant_tokens") == (mode != "plain")
    assert hasattr(asked, "max_ngram_size") == (mode == "lookup")


@pytest.mark.parametrize("mode", protocol.MODES)
def test_openvino_is_asked_for_float32_and_for_its_own_speculation(openvino_engine, mode):
    genai = FakeGenAi()
    engine = openvino_engine(mode, genai)
    engine.prepare(PROMPTS, NEW_TOKENS)
    (pipeline,) = genai.pipelines
    wanted = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": 2}
    assert wanted.items() <= pipeline.properties.items()
    assert ("draft_model" in pipeline.properties, "prompt_lookup" in pipeline.properties) == (mode == "draft", mode == "lookup")
    assert pipeline.scheduler.max_num_batched_tokens >= sum(map(len, PROMPTS))
    settings = engine.settings()
    json.dumps(settings)
    assert settings["kv_bytes_per_token"] == 100
    assert len(settings["tried"]) == {"plain": 0, "draft": 6, "lookup": 8}[mode]


# ---- probing


def test_a_probe_is_the_best_of_a_few_short_decodes_and_of_fewer_where_they_are_long():
    spent = [0.5, 0.25, 1.0]
    asked = []
    assert probing.seconds_per_step(lambda tokens: asked.append(tokens) or spent[len(asked) - 1], 500) == 0.25 / probing.TOKENS
    assert asked == [probing.TOKENS] * probing.RUNS
    asked.clear()
    assert probing.seconds_per_step(lambda tokens: asked.append(tokens) or 99.0, 3) == 33.0
    assert asked == [3]


# ---- the conversation


class Echo:
    """An engine whose every row repeats its last prompt token."""

    name, max_batch, positions, vocab = "echo/plain", 2, 10, 5

    def __init__(self):
        self.is_open = True

    def settings(self):
        return {"threads": 1}

    def prepare(self, prompts, new_tokens):
        if prompts[0] == [4, 4]:
            raise protocol.CannotRun("two fours\n  are too many")
        self.rows = [[prompt[-1]] * new_tokens for prompt in prompts]
        return 0.5

    def decode(self):
        return protocol.Decoded(self.rows, 0.25, {"rounds": 1})

    def close(self):
        self.is_open = False


def talk(*requests):
    """(answers, engine) of a conversation; a string is sent as it is."""
    engine, out = Echo(), io.StringIO()
    protocol.serve(engine, [r if isinstance(r, str) else json.dumps(r) for r in requests], out)
    return [json.loads(line) for line in out.getvalue().splitlines()], engine


def test_a_conversation_goes_hello_prepare_decode_close():
    prepare = {"do": "prepare", "prompts": [[1, 2], [3]], "new_tokens": 3}
    answers, engine = talk({"do": "hello"}, prepare, {"do": "decode"}, {"do": "decode"}, {"do": "close"}, {"do": "hello"})
    decoded = {"ok": True, "tokens": [[2, 2, 2], [3, 3, 3]], "seconds": 0.25, "extra": {"rounds": 1}}
    assert answers == [
        {"ok": True, "name": "echo/plain", "settings": {"threads": 1}, "max_batch": 2},
        {"ok": True, "prefill_s": 0.5, "settings": {"threads": 1}}, decoded, decoded, {"ok": True},
    ]  # fmt: skip
    assert not engine.is_open


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ("{oops", "not JSON"),
        ("", "not JSON"),
        ("[1, 2]", "a request is a JSON object, got list"),
        ({"do": "sing"}, "unknown command 'sing': use hello, prepare, decode, close"),
        ({}, "unknown command None"),
        ({"do": ["hello"]}, "unknown command"),
        ({"do": "decode"}, "nothing is prepared"),
        ({"do": "prepare", "prompts": [[1]], "new_tokens": 0}, "new_tokens must be an integer of at least 1, got 0"),
        ({"do": "prepare", "prompts": [[1]]}, "new_tokens must be an integer of at least 1, got None"),
        ({"do": "prepare", "prompts": [], "new_tokens": 1}, "prompts must be a list of at least one row"),
        ({"do": "prepare", "prompts": "text", "new_tokens": 1}, "prompts must be a list of at least one row"),
        ({"do": "prepare", "prompts": [[1], []], "new_tokens": 1}, "row 1 is not a list of at least one token id"),
        ({"do": "prepare", "prompts": [["a"]], "new_tokens": 1}, "row 0 is not a list of at least one token id"),
        ({"do": "prepare", "prompts": [[1, 5]], "new_tokens": 1}, "row 0 holds token 5, ids run from 0 to 4"),
        ({"do": "prepare", "prompts": [[1]] * 3, "new_tokens": 1}, "3 rows were sent, echo/plain takes at most 2"),
        ({"do": "prepare", "prompts": [[1] * 8], "new_tokens": 3}, "row 0 needs 8 + 3 positions, the model was trained for 10"),
        ({"do": "prepare", "prompts": [[4, 4]], "new_tokens": 1}, "two fours are too many"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_sentence_and_the_worker_goes_on(request_, why):
    (refusal, hello), _ = talk(request_, {"do": "hello"})
    assert refusal["ok"] is False
    assert why in refusal["why"]
    assert "\n" not in refusal["why"]
    assert hello["ok"]


def test_after_a_refused_prepare_there_is_nothing_to_decode():
    fine, bad = ({"do": "prepare", "prompts": [prompt], "new_tokens": 1} for prompt in ([1], [4, 4]))
    answers, _ = talk(fine, bad, {"do": "decode"})
    assert [answer["ok"] for answer in answers] == [True, False, False]


def test_the_end_of_the_input_closes_the_engine():
    answers, engine = talk({"do": "hello"})
    assert len(answers) == 1
    assert not engine.is_open


LOUD = """
import ctypes, os, subprocess, sys
sys.path.insert(0, {folder!r})
from protocol import CannotRun, Decoded, run

class Loud:
    name, max_batch, positions, vocab = "loud/plain", 1, 9, 9
    def settings(self): return {{}}
    def prepare(self, prompts, new_tokens):
        print("python says", flush=True)
        os.write(1, b"C says\\n")
        subprocess.run([sys.executable, "-c", "print('a child says')"], check=True)
        return 0.0
    def decode(self): return Decoded([[1]], 0.0)
    def close(self): print("bye")

def build(options):
    print("loading")
    if options.threads == 7:
        raise CannotRun("seven threads are one too many")
    return Loud()

run(build, "A worker that talks too much.")
"""


def start(tmp_path, *words, say):
    loud = tmp_path / "loud.py"
    loud.write_text(LOUD.format(folder=str(WORKERS)))
    lines = "".join(json.dumps(request) + "\n" for request in say)
    return subprocess.run([sys.executable, loud, *words], input=lines, capture_output=True, text=True, timeout=60)


def test_stdout_carries_the_protocol_and_nothing_else(tmp_path):
    prepare = {"do": "prepare", "prompts": [[1]], "new_tokens": 1}
    say = [{"do": "hello"}, prepare, {"do": "decode"}, {"do": "close"}]
    done = start(tmp_path, "--model", "m", "--threads", "1", say=say)
    assert done.returncode == 0
    assert [json.loads(line)["ok"] for line in done.stdout.splitlines()] == [True] * 4
    for noise in ("loading", "python says", "C says", "a child says", "bye"):
        assert noise in done.stderr


def test_an_engine_that_cannot_be_built_is_the_answer_to_the_first_request(tmp_path):
    done = start(tmp_path, "--model", "m", "--threads", "7", say=[{"do": "hello"}, {"do": "hello"}])
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"ok": False, "why": "seven threads are one too many"}
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [(["--mode", "draft"], "needs --draft"), (["--draft", "d"], "no other mode takes one"), (["--threads", "0"], "at least 1")],
)
def test_options_that_make_no_sense_are_refused(capsys, words, why):
    with pytest.raises(SystemExit):
        protocol.options("A worker.", ["--model", "m", "--threads", "2", *words])
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(("worker", "library"), [("llama_cpp_worker", "llama_cpp"), ("openvino_worker", "openvino")])
def test_a_worker_in_the_wrong_environment_says_what_is_missing(worker, library):
    if find_spec(library):
        pytest.skip(f"{library} is installed here")
    done = subprocess.run(
        [sys.executable, WORKERS / f"{worker}.py", "--model", "m", "--threads", "1"],
        input='{"do": "hello"}\n', capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert f"No module named '{library}'" in answer["why"]
    assert "Traceback" not in done.stderr


def test_workers_import_nothing_of_this_project():
    own = {path.stem for path in WORKERS.glob("*.py")}
    theirs = {"numpy", "llama_cpp", "gguf", "openvino", "openvino_genai", "optimum", "safetensors"}
    for path in WORKERS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            libraries = {name.split(".")[0] for name in names if name}
            assert libraries <= own | theirs | sys.stdlib_module_names, path
