"""The shipped pair: its text, its training script, the gates that judge it, and the card that tells."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

import specdec_lab as sd
import tiny
from specdec_lab.demo import card, corpus, evaluate, gates, streams, train_demo, training
from specdec_lab.demo import held_out as writer
from specdec_lab.records import KvView
from specdec_lab.workload import HELD_OUT, read_held_out

HOME = Path(train_demo.__file__).parent
MANIFEST = json.loads((HOME / "CORPUS.json").read_text())["documents"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small are fastest on one core, and agree with themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- text


def test_the_split_of_every_document_is_a_function_of_its_content():
    assert all(corpus.split_of(e["sha256"]) == e["split"] for e in MANIFEST)
    shares = {s: sum(e["split"] == s for e in MANIFEST) / len(MANIFEST) for s in ("train", "dev", "held_out")}
    assert shares["train"] > 0.85
    assert 0.01 < shares["held_out"] < 0.1


def test_shipped_held_out_text_is_exactly_the_held_out_split_unchanged():
    shipped = {(t.source, t.name): t for t in read_held_out() if t.source != "revision"}
    assert {k: t.sha256 for k, t in shipped.items()} == {
        (e["source"], e["name"]): e["sha256"] for e in MANIFEST if e["split"] == "held_out"
    }
    assert all(hashlib.sha256(t.text.encode()).hexdigest() == t.sha256 for t in shipped.values())


def test_shipped_revisions_are_held_out_text_followed_by_an_edited_copy_of_it():
    shipped = {f"{t.source}/{t.name}": t.text for t in read_held_out() if t.source != "revision"}
    revisions = [t for t in read_held_out() if t.source == "revision"]
    assert len(revisions) >= 20
    for revision in revisions:
        original = revision.text[: revision.original_characters]
        edited = revision.text[revision.original_characters :]
        assert shipped[revision.name].startswith(original)
        assert edited.startswith("\n\n")
        assert edited[2:] != original
        assert hashlib.sha256(revision.text.encode()).hexdigest() == revision.sha256


def test_no_shipped_file_holds_a_path_of_this_machine():
    names = ("CORPUS.json", "README.md", "LICENSE-PSF.txt", "TRAINING.json", "EVALUATION.json")
    texts = [p.read_text() for name in names if (p := HOME / name).exists()]
    texts += [t.text for t in read_held_out()]
    assert not [s for s in evaluate.private_strings() for text in texts if s in text]


def test_the_shipped_held_out_file_is_what_its_script_writes(tmp_path):
    documents = corpus.collect(corpus.find_manual())
    try:
        corpus.check_manifest(documents, HOME / "CORPUS.json")
    except ValueError as error:
        pytest.skip(f"another Python or no manual here: {error}")
    texts = writer.held_out_texts(documents)
    assert texts == read_held_out()
    writer.write(texts, tmp_path / "a.gz")
    writer.write(texts, tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert read_held_out(tmp_path / "a.gz") == texts


def test_a_manifest_of_other_text_names_the_files_that_differ(tmp_path):
    one = corpus.Document("code", "a.py", "00", "train", "x")
    corpus.write_manifest([one], tmp_path / "CORPUS.json")
    corpus.check_manifest([one], tmp_path / "CORPUS.json")
    changed = corpus.Document("code", "a.py", "11", "train", "y")
    added = corpus.Document("code", "b.py", "22", "train", "z")
    with pytest.raises(ValueError, match="2 corpus files differ from CORPUS.json, first: code/a.py, code/b.py"):
        corpus.check_manifest([changed, added], tmp_path / "CORPUS.json")


def test_a_revision_is_deterministic_and_mostly_equal_to_its_original():
    names = ["renamed_one", "renamed_two"]
    ratios = []
    for text in [t.text[:20_000] for t in read_held_out() if t.source == "manual" and len(t.text) > 20_000]:
        edits = [corpus.revise(text, random.Random(seed), names) for seed in (3, 3, 4)]
        assert edits[0] == edits[1] != edits[2]
        assert edits[0] != text
        ratios.append(difflib.SequenceMatcher(None, text.splitlines(), edits[0].splitlines(), autojunk=False).ratio())
    assert min(ratios) > 0.5
    assert sum(ratios) / len(ratios) > 0.75


# ---------------------------------------------------------------- training


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The committed recipe on a model and batches small enough for a test."""
    monkeypatch.setitem(
        train_demo.SHAPES, "tiny",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
    )  # fmt: skip
    monkeypatch.setattr(train_demo, "BATCH_TOKENS", 512)


def tiny_documents() -> list[corpus.Document]:
    texts = [t for t in read_held_out() if t.source == "manual"][:4]
    return [corpus.Document(t.source, t.name, t.sha256, "train", t.text[:8000]) for t in texts]


def train_tiny(seed: int = 5, steps: int = 30):
    documents = tiny_documents()
    tokenizer = train_demo.make_tokenizer(d.text for d in documents)
    crops = train_demo.Crops(documents, tokenizer, seed)
    model = LlamaForCausalLM(train_demo.make_config("tiny"))
    training.init_weights(model, torch.Generator().manual_seed(seed))

    def loss(inputs, targets, done, bf16):
        return train_demo.text_loss(model, inputs, targets, bf16)

    plan = train_demo.Plan(((0.5, 64, 0.3), (0.5, 128, 0.0)))
    losses = train_demo.train(model, loss, crops, plan, steps * train_demo.BATCH_TOKENS, bf16=False, report=lambda _: None)
    return model, tokenizer, losses


@pytest.mark.usefixtures("tiny_recipe")
def test_thirty_steps_lower_the_loss_and_the_files_load_as_float32(tmp_path):
    model, tokenizer, losses = train_tiny()
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < losses[0] - 0.5
    train_demo.save(model, tokenizer, tmp_path / "target")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "target")
    assert loaded.dtype == torch.float32
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name].bfloat16().float(), rtol=0, atol=0)
    text = "def round_trip():\n\treturn 'é\u2028'\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "target").decode(tokenizer.encode(text)) == text


@pytest.mark.usefixtures("tiny_recipe")
def test_two_trainings_with_one_seed_agree():
    one, two, other = train_tiny(seed=5, steps=6)[2], train_tiny(seed=5, steps=6)[2], train_tiny(seed=6, steps=6)[2]
    assert one == pytest.approx(two, rel=1e-6)
    assert one != pytest.approx(other, rel=1e-3)


# ---------------------------------------------------------------- gates

VIEWS = [KvView.window(4, 16), KvView.window(0, 1), KvView.window(3, 1), KvView.window(1, 23)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(streams, "QUERY_CHUNK", 7)  # several chunks, the last one ragged


@pytest.mark.usefixtures("small_chunks")
def test_a_window_as_long_as_the_text_changes_nothing():
    model, tokens = tiny.model(), torch.tensor(tiny.prompts([53])[0])
    wanted, cache = streams.full(model, tokens)
    for view in (KvView.full(), KvView.window(4, 53), KvView.window(0, 99), KvView.window(60, 1)):
        torch.testing.assert_close(streams.windowed(model, tokens, view), wanted)
        torch.testing.assert_close(streams.windowed(model, tokens, view, cache), wanted)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_restricted_weights_equal_transformers_with_the_window_as_its_mask(view):
    model, tokens = tiny.model(num_hidden_layers=3), torch.tensor(tiny.prompts([53], seed=1)[0])
    row, column = torch.arange(53)[:, None], torch.arange(53)
    seen = (column <= row) & ((column < view.sink) | (column > row - view.recent))
    mask = torch.zeros(53, 53).masked_fill(~seen, float("-inf"))[None, None]
    with torch.no_grad():
        wanted = model(input_ids=tokens[None], attention_mask=mask).logits[0]
    torch.testing.assert_close(streams.windowed(model, tokens, view), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_the_second_stream_equals_one_draft_step_over_the_targets_own_cache_at_every_position(view):
    model, tokens = tiny.model(num_hidden_layers=3), torch.tensor(tiny.prompts([40], seed=2)[0])
    _, written = streams.full(model, tokens)
    found = streams.windowed(model, tokens, view, written)
    for place in range(40):
        kept = [j for j in range(place) if j < view.sink or j > place - view.recent]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(written):
            cache.update(keys[None, :, kept], values[None, :, kept], layer)
        with torch.no_grad():
            step = model(
                input_ids=tokens[None, place : place + 1], past_key_values=cache, position_ids=torch.tensor([[place]])
            )
        torch.testing.assert_close(found[place], step.logits[0, 0], rtol=1e-4, atol=1e-4)


def test_first_position_acceptance_in_one_forward_agrees_with_the_engines_rounds():
    model, (prompt,) = tiny.model(seed=3), tiny.prompts([37], seed=3)
    out = sd.Engine(sd.load(model)).generate(
        [prompt], config="self:2+6/chain1", max_new_tokens=80, temperature=0.0, stop_at_eos=False
    )
    tokens = torch.tensor(prompt + out.tokens[0])
    wanted, cache = streams.full(model, tokens)
    same, _ = gates.agreement(wanted, streams.windowed(model, tokens, KvView.window(2, 6), cache))
    rounds = [s for s in out.run.rounds if not s.censored[0]]
    assert len(rounds) > 20
    accepted = [s.accepted[0] for s in rounds]
    assert set(accepted) == {0, 1}  # both ways of a round were taken
    assert accepted == [int(same[s.context_tokens[0]]) for s in rounds]


def test_agreement_is_one_for_equal_and_zero_for_disjoint_predictions():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    same, overlap = gates.agreement(logits, logits)
    assert same.tolist() == [1] * 5
    torch.testing.assert_close(overlap, torch.ones(5))
    left, right = torch.full((1, 4), -50.0), torch.full((1, 4), -50.0)
    left[0, 0] = right[0, 3] = 50.0
    assert [float(v) for v in gates.agreement(left, right)] == pytest.approx([0, 0])
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    assert float(gates.agreement(p.log(), q.log())[1]) == pytest.approx(1 - 0.5 * (p - q).abs().sum().item())


@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 40)), min_size=1, max_size=12))
def test_an_estimate_weighs_tokens_and_its_interval_is_over_files(files):
    found = gates.estimate([(mean * count, count) for mean, count in files])
    total = sum(count for _, count in files)
    assert found.mean == pytest.approx(sum(m * c for m, c in files) / total, abs=1e-9)
    assert (found.tokens, found.files) == (total, len(files))
    if len(files) == 1:
        assert found.low is found.high is None
    else:
        means = [m for m, _ in files]
        assert min(means) - 1e-9 <= found.low <= found.high <= max(means) + 1e-9


def test_files_without_tokens_in_a_bucket_do_not_count():
    assert gates.estimate([(0.0, 0)]) is None
    assert gates.estimate([(6.0, 3), (0.0, 0)]).files == 1


def test_repeated_grams_are_counted_where_they_recur():
    assert gates.repeated_share(list(range(100))) == 0
    assert gates.repeated_share([1] * 27) == 0.95  # 20 equal grams, the first of them is new
    assert gates.repeated_share([1, 2, 3]) == 0


def test_context_is_worth_reading_only_if_no_length_says_otherwise():
    def say(four, eight):
        return {"4K": {"mean": four}, "8K": {"mean": eight}}

    assert gates.is_context_worth_reading(say(-0.1, 0.0))
    assert not gates.is_context_worth_reading(say(-0.1, 0.01))
    assert not gates.is_context_worth_reading({"4K": {"mean": -0.1}})  # nothing is known about 8K


@pytest.fixture
def tiny_pair(tmp_path, tiny_recipe, monkeypatch):
    """A folder with an untrained pair and its card; sampling is short."""
    documents = tiny_documents()
    tokenizer = train_demo.make_tokenizer(d.text for d in documents)
    for seed, name in enumerate(("target", "draft")):
        model = LlamaForCausalLM(train_demo.make_config("tiny"))
        training.init_weights(model, torch.Generator().manual_seed(seed))
        train_demo.save(model, tokenizer, tmp_path / name)
    shutil.copy(HOME / "README.md", tmp_path)
    monkeypatch.setattr(evaluate, "SAMPLED_ROWS", 2)
    monkeypatch.setattr(evaluate, "NUM_LOOPS", 2)
    monkeypatch.setattr(evaluate, "NUM_REVISIONS", 3)
    return tmp_path


def test_the_gates_run_write_their_results_and_fill_the_card(tiny_pair, monkeypatch, capsys):
    few = [t for i, t in enumerate(read_held_out()) if t.source == "revision" or i % 9 == 0]
    monkeypatch.setattr(evaluate, "read_held_out", lambda: few)
    arguments = ["--folder", str(tiny_pair), "--tokens-limit", "1024"]
    assert evaluate.main([*arguments, "--gates", "1,3"]) == 0
    results = json.loads((tiny_pair / "EVALUATION.json").read_text())
    assert set(results["gates"]) == {"1", "3"}
    loss = results["gates"]["1"]
    assert loss["target"]["all"]["all"]["mean"] == pytest.approx(np.log(2048), abs=1.0)
    assert loss["texts"] == sum(t.source != "revision" for t in few)
    assert loss["target"]["all"]["all"]["tokens"] == sum(loss["target"][s]["all"]["tokens"] for s in ("code", "manual"))
    assert loss["reproduce"]["tokens"] <= evaluate.REPRODUCED_TOKENS
    accepted = results["gates"]["3"]
    assert set(accepted["text"]) == {"self:4+64", "self:4+256", "self:4+512", "model:4+128", "model:full"}
    revisions = accepted["revision"]["self:4+64"]["T=0"]
    assert set(revisions) == {"1K"}
    assert (revisions["1K"]["tokens"], revisions["1K"]["files"]) == (3 * 256, 3)
    assert "nats per token" in capsys.readouterr().out
    text = (tiny_pair / "README.md").read_text()
    assert "| target, code |" in text
    assert "Only the first 1024 tokens of each text were read" in text


def test_gates_that_have_a_result_are_not_run_again_until_the_weights_change(tiny_pair, monkeypatch):
    runs = []
    for gate in evaluate.GATES:
        monkeypatch.setitem(evaluate.GATES, gate, lambda pair, gate=gate: runs.append(gate) or {"passes": True})
    monkeypatch.setattr(evaluate, "fill_card", lambda folder: "")
    monkeypatch.setattr(evaluate, "passes", lambda results: True)
    arguments = ["--folder", str(tiny_pair), "--tokens-limit", "64"]
    evaluate.main([*arguments, "--gates", "2"])
    evaluate.main(arguments)
    assert runs == ["2", "1", "3", "4", "5"]
    evaluate.main(arguments)
    evaluate.main([*arguments, "--gates", "4"])
    assert runs[5:] == ["4"]
    shutil.copy(tiny_pair / "draft" / "model.safetensors", tiny_pair / "target" / "model.safetensors")
    evaluate.main(arguments)
    assert runs[6:] == ["1", "2", "3", "4", "5"]


def test_the_text_checks_find_a_private_path_and_a_tokenizer_that_loses_text(tiny_pair, monkeypatch):
    pair = evaluate.Pair(tiny_pair, 64)
    clean = evaluate.gate_4(pair)
    assert clean["passes"]
    assert clean["round_trip"] == {"texts": len(read_held_out()), "differing": []}
    leak = [pair.encode("open('/home/jdoe/secret')"), pair.encode(evaluate.private_strings().pop())]
    monkeypatch.setattr(gates, "continuations", lambda *args, **kwargs: leak)
    found = evaluate.gate_4(pair)
    assert not found["passes"]
    assert found["sampled"]["private_strings"] >= 1
    assert "/home/jdoe" in found["sampled"]["home_folders"]
    monkeypatch.setattr(pair, "decode", lambda tokens: "lost")
    assert len(evaluate.gate_4(pair)["round_trip"]["differing"]) == len(read_held_out())


def test_greedy_continuations_have_their_length_and_sampling_follows_its_seed(tiny_pair):
    model = evaluate.Pair(tiny_pair, 64).target
    prompts = [[1, 2, 3], [4, 5, 6]]
    greedy = gates.continuations(model, prompts, 9, temperature=0.0)
    assert [len(row) for row in greedy] == [9, 9]
    assert greedy[0] == gates.continuations(model, prompts[:1], 9, temperature=0.0)[0]
    draws = [gates.continuations(model, prompts, 9, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gates", "1,7"], "there is no gate 7; gates are 1, 2, 3, 4, 5"),
        (["--tokens-limit", "10"], "--tokens-limit must be at least 64, got 10"),
        ([], "has no target/: train one"),
    ],
)
def test_bad_arguments_of_the_gates_are_clear_errors(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        evaluate.main(["--folder", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- card


def one(mean, low=None, high=None):
    return {"mean": mean, "low": low, "high": high, "tokens": 9, "files": 2}


def test_a_failed_gate_is_told_in_the_card_with_its_consequence(tmp_path):
    bands = {"1K": one(-0.1, -0.2, 0.0), "4K": one(0.04, 0.01, 0.07), "8K": one(0.09, 0.05, 0.2)}
    part = {"full": bands, "4+512": bands, "difference": bands, "passes": False}
    good = {**part, "difference": {"4K": one(-0.5), "8K": one(-0.7)}, "passes": True}
    results = {"weights": {}, "tokens_limit": 8192, "gates": {"2": {"text": part, "revision": good}}}
    (tmp_path / "EVALUATION.json").write_text(json.dumps(results))
    told = card.fill_card(tmp_path)
    assert "Code and manual: **not passed**. At 4K and 8K the same weights predict better through `4+512`" in told
    assert "no acceptance at that length is a property of windowing" in told
    assert "Revisions: **passed**" in told
    assert "0.040 [0.010, 0.070]" in told
    assert not (tmp_path / "README.md").exists()  # a folder without a card gets none


def test_filling_the_card_twice_changes_nothing_and_what_is_unknown_says_so(tmp_path):
    shutil.copy(HOME / "README.md", tmp_path)
    card.fill_card(tmp_path)
    first = (tmp_path / "README.md").read_text()
    assert first.count(card.NOT_YET) == len(card.PLACE.findall(first)) == 5
    card.fill_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


def test_the_card_says_what_the_pair_is_and_is_not():
    text = " ".join((HOME / "README.md").read_text().split())
    assert (
        "A toy: 2 M parameters trained for minutes on Python's source and manuals. Its text is nonsense, its statistics are "
        "real: a trained target and draft on text neither has seen. A load, not a language model; nothing transfers to large "
        "models."
    ) in text
    assert "LICENSE-PSF.txt" in text
    assert (HOME / "LICENSE-PSF.txt").read_text().count("PYTHON SOFTWARE FOUNDATION LICENSE") >= 1


# ---------------------------------------------------------------- shipped weights

shipped = pytest.mark.skipif(not (HOME / "target").exists(), reason="the pair has not been trained yet")


@shipped
@pytest.mark.parametrize(("name", "parameters", "tensors"), [("target", 2_164_416, 38), ("draft", 426_368, 11)])
def test_the_shipped_weights_load_as_float32_with_tied_embeddings(name, parameters, tensors):
    from safetensors import safe_open

    with safe_open(HOME / name / "model.safetensors", "pt") as file:
        assert len(file.keys()) == tensors
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    model = LlamaForCausalLM.from_pretrained(HOME / name)
    assert model.dtype == torch.float32
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.num_parameters() == parameters
    assert model.config.max_position_embeddings == 8192


@shipped
def test_target_and_draft_share_one_tokenizer_byte_for_byte():
    files = sorted(p.name for p in (HOME / "target").glob("tokenizer*"))
    assert "tokenizer.json" in files
    assert all((HOME / "target" / f).read_bytes() == (HOME / "draft" / f).read_bytes() for f in files)


@shipped
def test_the_tokenizer_gives_every_held_out_text_back():
    tokenizer = AutoTokenizer.from_pretrained(HOME / "target")
    assert all(tokenizer.decode(tokenizer.encode(t.text, verbose=False)) == t.text for t in read_held_out())


@shipped
def test_the_shipped_pair_is_what_was_evaluated_and_its_loss_is_reproduced():
    results = json.loads((HOME / "EVALUATION.json").read_text())
    assert results["weights"] == evaluate.weights_digests(HOME)
    assert results["tokens_limit"] == 8192
    pair = evaluate.Pair(HOME, 8192)
    wanted = results["gates"]["1"]["reproduce"]
    found = gates.sample_loss(pair.models, pair.texts(), evaluate.REPRODUCED_TOKENS)
    assert found["texts"] == wanted["texts"]
    assert 15_000 < found["tokens"] <= 20_000
    assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-3)


@shipped
def test_the_engine_continues_real_text_exactly_as_transformers_does():
    pair = sd.load("demo")
    assert {pair.target.dtype, pair.draft.dtype} == {torch.float32}
    prompt = evaluate.Pair(HOME, 8192).encode(next(t.text for t in read_held_out() if t.source == "code"))[:700]
    oracle = LlamaForCausalLM.from_pretrained(HOME / "target").eval()
    wanted = gates.continuations(oracle, [prompt], 100, temperature=0.0)
    for config in ("off", "self:4+60/chain3", "model:4+124/chain3"):
        out = sd.Engine(pair).generate([prompt], config=config, max_new_tokens=100, stop_at_eos=False)
        assert out.tokens == wanted, config


def test_the_held_out_file_is_small_enough_to_ship():
    assert HELD_OUT.stat().st_size < 500_000
