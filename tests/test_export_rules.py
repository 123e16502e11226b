"""Every rule of an engine has an artefact that breaks it and nothing else; the engine's validator must refuse it."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from specdec_lab.export import ExportError, hf, llama_cpp, sglang, tensorrt_llm, vllm

TABLE = vllm.TABLE
VLLM: dict[str, Any] = {"method": "draft_model", "model": "d", "num_speculative_tokens": 5, TABLE: [[1, 4, 5], [5, 9, 0]]}
VLLM_MUTANTS: dict[str, dict[str, Any]] = {
    "dict of ranges": {TABLE: {"1-4": 5}},
    "5-item entry": {TABLE: [[1, 4, 1, 4096, 5]]},
    "string entry": {TABLE: ["1-4"]},
    "bool": {TABLE: [[1, 4, True], [5, 9, 5]]},
    "empty": {TABLE: []},
    "missing": {TABLE: None},
    "starts at 2": {TABLE: [[2, 4, 5]]},
    "starts at 0": {TABLE: [[0, 4, 5]]},
    "overlap": {TABLE: [[1, 4, 5], [4, 8, 3]]},
    "ends before it starts": {TABLE: [[1, 4, 5], [9, 8, 3]]},
    "negative": {TABLE: [[1, 4, 5], [5, 8, -1]]},
    "clamped": {"num_speculative_tokens": 3},
    "wasted": {"num_speculative_tokens": 9},
    "no tokens": {"num_speculative_tokens": 0},
    "no draft": {"model": None},
    "suffix": {"method": "suffix"},
    "typo": {"num_speculative_tokens_per_batch": []},
    "ngram without bounds": {"method": "ngram"},
    "ngram bounds crossed": {"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4},
}


@pytest.mark.parametrize("name", VLLM_MUTANTS)
def test_vllm_validator_kills(name: str) -> None:
    vllm.validate(VLLM)
    with pytest.raises(ExportError):
        vllm.validate({**VLLM, **VLLM_MUTANTS[name]})


EAGLE: dict[str, str | int | None] = {
    sglang.ALGORITHM: "EAGLE", sglang.DRAFT: "d", sglang.STEPS: 5, sglang.TOPK: 1, sglang.TOKENS: 6,
    sglang.WINDOW: 60, sglang.SINK: 4, sglang.SWITCH: None, sglang.TABLE_PATH: "f.json",
}  # fmt: skip
SLOTS: dict[str, Any] = {"1": {"candidate_steps": [3, 5], "ema_alpha": 0.2}, "9": {"candidate_steps": [0]}, "ema_alpha": 0.1}
SGLANG_MUTANTS: dict[str, dict[str, Any]] = {
    "algorithm that ignores the window": {sglang.ALGORITHM: "STANDALONE"},
    "unknown algorithm": {sglang.ALGORITHM: "LOOKAHEAD"},
    "sink that is dropped": {sglang.ALGORITHM: "EAGLE3"},
    "window of 0": {sglang.WINDOW: 0},
    "sink without window": {sglang.WINDOW: None},
    "negative sink": {sglang.SINK: -1},
    "tokens that would be adjusted": {sglang.TOKENS: 5},
    "no steps": {sglang.STEPS: None},
    "tree that does not fit": {sglang.TOPK: 2, sglang.TOKENS: 12},
    "adaptive tree": {sglang.TOPK: 2},
    "steps not in the union": {sglang.STEPS: 4, sglang.TOKENS: 5},
    "no draft": {sglang.DRAFT: None},
    "one token": {sglang.TOKENS: 1},
}
SLOT_MUTANTS: dict[str, Any] = {
    "no batches": {"ema_alpha": 0.2},
    "not from 1": {"2": {"candidate_steps": [5]}},
    "range as key": {"1": {"candidate_steps": [5]}, "2-8": {"candidate_steps": [3]}},
    "empty list": {"1": {"candidate_steps": []}},
    "number": {"1": {"candidate_steps": 5}},
    "negative": {"1": {"candidate_steps": [5, -1]}},
    "typo": {"1": {"candidate_steps": [5], "alpha": 0.2}},
    "bare list": {"1": [5]},
}


@pytest.mark.parametrize("name", SGLANG_MUTANTS)
def test_sglang_validator_kills(name: str) -> None:
    sglang.validate(EAGLE, SLOTS)
    with pytest.raises(ExportError):
        sglang.validate({**EAGLE, **SGLANG_MUTANTS[name]}, SLOTS)


@pytest.mark.parametrize("name", SLOT_MUTANTS)
def test_sglang_validator_kills_table(name: str) -> None:
    with pytest.raises(ExportError):
        sglang.validate(EAGLE, SLOT_MUTANTS[name])


def test_sglang_validator_wants_table_and_switch_together() -> None:
    with pytest.raises(ExportError, match="adaptive table"):
        sglang.validate(EAGLE)
    with pytest.raises(ExportError, match="adaptive table"):
        sglang.validate({k: v for k, v in EAGLE.items() if k != sglang.SWITCH}, SLOTS)
    lookup: dict[str, str | int | None] = {sglang.ALGORITHM: "NGRAM", sglang.TOKENS: 7, sglang.BREADTH: 1}
    sglang.validate(lookup)
    with pytest.raises(ExportError, match="drafts a tree"):
        sglang.validate({**lookup, sglang.BREADTH: 10})


TRTLLM = {"decoding_type": "Draft_Target", "max_draft_len": 4, "speculative_model": "d",
          "draft_len_schedule": {1: 4, 8: 2, 32: 0}}  # fmt: skip
TRTLLM_MUTANTS: dict[str, dict[str, Any]] = {
    "max_concurrency": {"max_concurrency": 8},
    "string keys": {"draft_len_schedule": {"1": 4}},
    "key 0": {"draft_len_schedule": {0: 4}},
    "negative": {"draft_len_schedule": {1: 4, 8: -1}},
    "list": {"draft_len_schedule": [[1, 4]]},
    "empty": {"draft_len_schedule": {}},
    "smallest key is not the maximum": {"draft_len_schedule": {1: 2, 8: 4}},
    "smallest key below max_draft_len": {"draft_len_schedule": {1: 2}},
    "above max_draft_len": {"draft_len_schedule": {1: 4, 8: 5}},
    "no draft": {"speculative_model": None},
    "ngram with a draft": {"decoding_type": "NGram"},
    "Medusa": {"decoding_type": "Medusa"},
    "no length": {"max_draft_len": 0},
}


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("name", TRTLLM_MUTANTS)
def test_tensorrt_llm_validator_kills(name: str, version: str) -> None:
    tensorrt_llm.validate(TRTLLM, version)
    with pytest.raises(ExportError):
        tensorrt_llm.validate({**TRTLLM, **TRTLLM_MUTANTS[name]}, version)


def test_tensorrt_llm_lower_bounds_need_key_1() -> None:
    config = {**TRTLLM, "draft_len_schedule": {4: 4, 8: 2}}
    tensorrt_llm.validate(config, "1.3")
    with pytest.raises(ExportError, match="needs the key 1"):
        tensorrt_llm.validate(config, "1.2")


@pytest.mark.parametrize("mutant", [
    {"num_assistant_tokens": 0}, {"num_assistant_tokens": True}, {"num_assistant_tokens_schedule": "heuristic"},
    {"assistant_confidence_threshold": 0.4}, {"prompt_lookup_num_tokens": 3},
])  # fmt: skip
def test_transformers_validator_kills(mutant: dict[str, Any]) -> None:
    good = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    hf.validate(good)
    with pytest.raises(ExportError):
        hf.validate({**good, **mutant})


def test_transformers_validator_kills_what_would_be_filled_with_defaults() -> None:
    for config in ({"num_assistant_tokens": 5}, {"prompt_lookup_num_tokens": 5}, {}):
        with pytest.raises(ExportError, match="defaults"):
            hf.validate(config)


@pytest.mark.parametrize(("old", "new"), [
    ("--spec-type draft-simple ", ""),  # loads the draft and never uses it
    ("draft-simple", "none"),
    ("--spec-draft-n-max", "--draft-max"),
    ("--spec-draft-n-max 3", "--spec-draft-n-max 0"),
    ("--spec-draft-n-max 3", "--spec-draft-n-max"),
    ("--spec-draft-n-max 3 ", ""),
    ("--spec-draft-n-min 0", "--spec-draft-n-min 2"),
    ("--spec-draft-p-min 0", "--spec-draft-p-min 0.75"),
    ("--spec-draft-p-min 0", "--spec-draft-p-min 0 -cd 512"),
    ("draft-simple", "ngram-simple"),
])  # fmt: skip
def test_llama_cpp_validator_kills(old: str, new: str) -> None:
    good = "--spec-type draft-simple --spec-draft-model d --spec-draft-n-max 3 --spec-draft-n-min 0 --spec-draft-p-min 0"
    llama_cpp.validate(shlex.split(good))
    assert old in good
    with pytest.raises(ExportError):
        llama_cpp.validate(shlex.split(good.replace(old, new)))
