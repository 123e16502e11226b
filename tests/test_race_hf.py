"""transformers as peers of the race: every setting takes its own path, reads the prompts once, and gives greedy tokens."""

from __future__ import annotations

import io
import json
import threading
from logging import ERROR

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

import letters
import tiny
from specdec_lab.bench import sessions
from specdec_lab.bench.race import continuous, hf, lineup
from specdec_lab.bench.race.continuous import ContinuousPeer
from specdec_lab.bench.race.hf import Prompted, Reference, TransformersPeer
from specdec_lab.bench.race.peer import PeerFailed
from specdec_lab.cli import main
from specdec_lab.records import Cell

CPU = torch.device("cpu")
NEW = 11


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target whose greedy text holds its own end-of-text token, and a draft that often agrees."""
    place = tmp_path_factory.mktemp("models")
    tiny.model().save_pretrained(place / "target")
    draft = tiny.model()
    with torch.no_grad():
        draft.model.layers[1].mlp.down_proj.weight *= 0.5
    draft.save_pretrained(place / "draft")
    return place


@pytest.fixture
def target(folders):
    return Prompted(str(folders / "target"), torch.float32, CPU)


@pytest.fixture
def assistant(folders):
    return Prompted(str(folders / "draft"), torch.float32, CPU)


def expected(prompts, new_tokens=NEW):
    return [tiny.plain_greedy(tiny.model(), prompt, new_tokens, eos=None) for prompt in prompts]


def peer_of(name, target, assistant=None):
    return next(peer for peer in hf.peers(target, assistant) if peer.name == f"transformers/{name}")


@pytest.fixture
def watched():
    """watched(model) -> the number of tokens of every forward, and the cache classes that it was given."""
    hooks = []

    def watch(model):
        lengths, caches = [], set()

        def look(module, arguments, kwargs):
            lengths.append(kwargs["input_ids"].shape[1])
            caches.add(type(kwargs.get("past_key_values")))

        hooks.append(model.register_forward_pre_hook(look, with_kwargs=True))
        return lengths, caches

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["plain", "static", "assisted", "lookup"])
def test_every_setting_gives_greedy_tokens_again_and_again(name, target, assistant):
    peer = peer_of(name, target, assistant)
    for prompts in (tiny.prompts([40]), tiny.prompts([23], seed=1), tiny.prompts([40])):
        peer.prepare(prompts, NEW)
        for _ in range(3):
            decoded = peer.decode()
            assert decoded.tokens == expected(prompts)
            assert decoded.seconds > 0
            assert decoded.extra["cpu_s"] > 0


@pytest.mark.parametrize("name", ["plain", "static"])
def test_batches_decode_together(name, target):
    peer = peer_of(name, target)
    prompts = tiny.prompts([33] * 3)
    peer.prepare(prompts, NEW)
    assert peer.why_not(Cell(3, 33)) is None
    assert peer.decode().tokens == expected(prompts)


@pytest.mark.parametrize("name", ["plain", "static", "assisted", "lookup"])
def test_end_of_text_ends_nothing_and_is_not_suppressed(name, folders, assistant):
    prompt = next(p for p in (tiny.prompts([20], seed=seed)[0] for seed in range(50)) if 0 in expected([p])[0][:-1])
    assert tiny.model().generation_config.eos_token_id == 0
    peer = peer_of(name, Prompted(str(folders / "target"), torch.float32, CPU), assistant)
    peer.prepare([prompt], NEW)
    assert peer.decode().tokens == expected([prompt])


@pytest.mark.parametrize("name", ["plain", "static", "assisted", "lookup"])
def test_prompts_are_read_once_and_no_decode_reads_them_again(name, target, assistant, watched):
    peer = peer_of(name, target, assistant)
    lengths, _ = watched(target.model)
    drafted, _ = watched(assistant.model)
    peer.prepare(tiny.prompts([40]), NEW)
    assert lengths == [39]
    peer.prepare(tiny.prompts([40]), NEW)
    assert lengths == [39]
    peer.decode()
    peer.decode()
    assert max(lengths[1:]) <= 1 + hf.LOOKUP_TOKENS
    assert [n for n in drafted if n > 2] == ([39] if name == "assisted" else [])


def test_peers_that_share_a_model_share_its_reading(target, watched):
    lengths, _ = watched(target.model)
    seconds = [peer.prepare(tiny.prompts([40] * 2), NEW) for peer in hf.peers(target, None)]
    assert lengths == [39]
    assert len(set(seconds)) == 1


def test_plain_decoding_costs_one_forward_of_one_token_each_with_a_growing_cache(target, watched):
    peer = peer_of("plain", target)
    peer.prepare(tiny.prompts([40]), NEW)
    lengths, caches = watched(target.model)
    decoded = peer.decode()
    assert lengths == [1] * NEW
    assert caches == {DynamicCache}
    assert decoded.extra["forwards"] == NEW
    assert "tokens_per_round" not in decoded.extra


def test_the_static_setting_decodes_in_one_allocated_cache(target, watched):
    peer = peer_of("static", target)
    peer.prepare(tiny.prompts([40]), NEW)
    lengths, caches = watched(target.model)
    peer.decode()
    place = peer._static.layers[0].keys.data_ptr()
    peer.decode()
    assert caches == {StaticCache}
    assert lengths == [1] * 2 * NEW
    assert peer._static.layers[0].keys.shape[2] == 40 + NEW
    assert peer._static.layers[0].keys.data_ptr() == place


def test_the_assisted_setting_calls_the_assistant_and_verifies_its_drafts(target, assistant, watched):
    peer = peer_of("assisted", target, assistant)
    peer.prepare(tiny.prompts([40]), NEW)
    lengths, _ = watched(target.model)
    drafted, _ = watched(assistant.model)
    decoded = peer.decode()
    assert 1 + hf.ASSISTANT_TOKENS in lengths
    assert len(lengths) < NEW  # something was accepted
    assert len(drafted) >= 2 * hf.ASSISTANT_TOKENS
    assert decoded.extra["assistant_forwards"] == len(drafted)
    assert decoded.extra["forwards"] == len(lengths)
    assert decoded.extra["tokens_per_round"] == NEW / len(lengths)
    assert peer.settings()["knobs"] == {
        "assistant_model": "LlamaForCausalLM", "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }  # fmt: skip


def test_the_lookup_setting_proposes_what_followed_in_the_prompt(target, watched):
    prompt = tiny.prompts([12])[0] * 4
    peer = peer_of("lookup", target)
    peer.prepare([prompt], NEW)
    lengths, _ = watched(target.model)
    decoded = peer.decode()
    assert 1 + hf.LOOKUP_TOKENS in lengths
    assert decoded.tokens == expected([prompt])
    assert decoded.extra["tokens_per_round"] == NEW / len(lengths)


@pytest.mark.parametrize("name", ["assisted", "lookup"])
def test_speculative_settings_take_one_row_and_say_so(name, target, assistant):
    peer = peer_of(name, target, assistant)
    assert peer.why_not(Cell(2, 40)) == "assisted generation of transformers is limited to batch 1"
    assert peer.why_not(Cell(1, 40)) is None
    assert "nothing to read" in peer.why_not(Cell(1, 1))


def test_without_a_draft_there_is_no_assisted_setting(target, assistant):
    assert [peer.name for peer in hf.peers(target, None)] == [f"transformers/{n}" for n in ("plain", "static", "lookup")]
    assert len(hf.peers(target, assistant)) == 4


def test_settings_say_type_threads_cache_and_versions(target):
    settings = peer_of("static", target).settings()
    assert {"transformers", "torch", "threads", "dtype", "kv_dtype", "attention", "cache", "knobs", "prompts"} == {*settings}
    assert (settings["dtype"], settings["attention"], settings["cache"]) == ("float32", "sdpa", "static")
    json.dumps(settings)


def test_weights_that_are_stored_in_16_bit_decode_in_float32(tmp_path):
    tiny.model().to(torch.bfloat16).save_pretrained(tmp_path)
    prompted = Prompted(str(tmp_path), torch.float32, CPU)
    prompted.read(tiny.prompts([9]))
    assert {kv.dtype for pair in prompted._kv for kv in pair} == {torch.float32}


def test_a_closed_peer_holds_no_keys(target):
    peer = TransformersPeer("static", target, cache="static")
    peer.prepare(tiny.prompts([40]), NEW)
    peer.close()
    assert target._kv == []
    assert peer._static is None


# Continuous batching.


@pytest.fixture
def batching(folders):
    peer = ContinuousPeer(str(folders / "target"), torch.float32, CPU)
    yield peer
    peer.close()


@pytest.mark.parametrize("length", [23, 64, 150])
def test_continuous_batching_gives_greedy_tokens_again_and_again(batching, length):
    prompts = tiny.prompts([length] * 3)
    assert batching.why_not(Cell(3, length)) is None
    assert batching.prepare(prompts, NEW) > 0
    for _ in range(12):
        assert batching.decode().tokens == expected(prompts)


def test_continuous_batching_packs_all_rows_and_times_one_forward_per_token(batching, watched):
    prompts = tiny.prompts([150] * 3)
    batching.prepare(prompts, NEW)
    lengths, _ = watched(batching._model)
    batching.decode()
    remainder = 150 % continuous.PAGE_TOKENS
    assert lengths == [3 * remainder] + [3] * NEW  # whole pages were kept; the first forward is not timed


def test_new_prompts_take_the_place_of_earlier_ones_and_closing_ends_the_thread(batching):
    before = threading.active_count()
    batching.prepare(tiny.prompts([30]), NEW)
    batching.prepare(tiny.prompts([20] * 2, seed=3), NEW)
    assert batching.decode().tokens == expected(tiny.prompts([20] * 2, seed=3))
    assert threading.active_count() == before + 1
    batching.close()
    assert threading.active_count() == before
    with pytest.raises(PeerFailed, match="before its prompts were read"):
        batching.decode()


def test_rows_that_do_not_decode_together_are_refused(batching, monkeypatch):
    batching.prepare(tiny.prompts([20] * 2), NEW)
    honest = batching._ask

    def late(prompts, new_tokens):
        rows = honest(prompts, new_tokens)
        rows[1].timestamps[0] = rows[1].timestamps[3]
        return rows

    monkeypatch.setattr(batching, "_ask", late)
    with pytest.raises(PeerFailed, match="rows did not decode together"):
        batching.decode()


def test_a_request_that_fails_is_one_sentence(batching, monkeypatch):
    batching.prepare(tiny.prompts([20]), NEW)
    monkeypatch.setattr(continuous, "ANSWER_S", 0.1)
    batching._model.forward = None  # the thread of the manager dies of it
    with pytest.raises(PeerFailed, match="transformers/continuous"):
        batching.decode()


def test_without_psutil_continuous_batching_says_what_it_needs(batching, monkeypatch):
    monkeypatch.setattr(continuous, "find_spec", lambda name: None)
    assert "psutil is not installed" in batching.why_not(Cell(1, 20))


# The judge.


def test_the_reference_finds_greedy_tokens_best_and_others_below(folders, monkeypatch):
    judge, (prompt,) = Reference(str(folders / "target")), tiny.prompts([40])
    (greedy,) = expected([prompt])
    assert max(judge(prompt, greedy)) < 1e-4
    wrong = [*greedy[:4], (greedy[4] + 1) % 61, *greedy[5:]]
    assert judge(prompt, wrong)[4] > 1e-2
    whole = judge(prompt, wrong)
    monkeypatch.setattr(hf, "REFERENCE_CHUNK", 7)
    assert judge(prompt, wrong) == pytest.approx(whole, abs=1e-9)


def test_the_reference_computes_in_float64_and_is_loaded_only_when_asked(folders):
    judge = Reference(str(folders / "target"))
    assert judge._model is None
    judge([1, 2, 3], [4])
    assert judge._model.dtype == torch.float64
    assert {kv.dtype for kv in judge._model.state_dict().values()} == {torch.float64}


def test_transformers_is_quiet_while_it_is_raced_and_as_before_afterwards():
    level = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    with hf.quiet():
        assert logging.get_verbosity() > ERROR
        assert not logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == ERROR
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity(level)


# All together.


def test_the_line_up_is_every_setting_and_continuous_batching(folders):
    found = lineup.transformers_peers(str(folders / "target"), str(folders / "draft"), torch.float32, CPU)
    names = [peer.name.removeprefix("transformers/") for peer in found]
    assert names == ["plain", "static", "assisted", "lookup", "continuous"]


def test_a_race_against_transformers_is_green_and_says_who_could_not_run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(sessions, "_held_out", lambda pair, kind, max_new_tokens, sampling: letters.random_text(max_new_tokens))
    out, err = io.StringIO(), io.StringIO()
    words = ["bench", "race", "--model", "./target", "--draft", "./draft", "--cells", "1x40,2x30", "--blocks", "2", "--json",
             "--new-tokens", str(NEW), "--configs", "self:4+12/chain3"]  # fmt: skip
    assert main(words, load=letters.loader(), out=out, err=err) == 0
    one, two = json.loads(out.getvalue())["cells"]
    theirs = [f"transformers/{name}" for name in ("plain", "static", "assisted", "lookup", "continuous")]
    names = ["ours/off", "ours/self:4+12/chain3", *theirs]
    assert {row["peer"]: row["state"] for row in one["rows"]} == dict.fromkeys(names, "ok")
    states = {row["peer"]: row["state"] for row in two["rows"]}
    assert {peer for peer, state in states.items() if state == "skipped"} == {"transformers/assisted", "transformers/lookup"}
    assert all(row["tokens_per_s"]["median"] > 0 for row in one["rows"])
    assert all("ours/off" in row["ratios"] for row in one["rows"][1:])
