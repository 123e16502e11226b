"""Exports: what an engine reads from our artefact is what the policy says, and whatever is lost is said."""

from __future__ import annotations

import json
import math
import shlex
from bisect import bisect_left, bisect_right
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_policies import FALLING, LOOKUP, policies, policy
from specdec_lab.export import TARGETS, Exported, ExportError, export, tensorrt_llm, vllm
from specdec_lab.export.column import NGRAM_MATCH
from specdec_lab.policy import Policy
from specdec_lab.records import Cell, SpecConfig

# How the engines read a table; written from their sources, not from our exporters.


def vllm_drafts(config: dict[str, Any], batch: int) -> int:
    """The last range that starts at or below the batch; clamped to num_speculative_tokens."""
    reached = [k for first, _, k in config["num_speculative_tokens_per_batch_size"] if first <= batch]
    return min(reached[-1], config["num_speculative_tokens"])


def sglang_drafts(table: dict[str, Any], batch: int) -> int:
    """The largest key that is not above the batch, else the first; one candidate pins the draft length."""
    keys = sorted(map(int, table))
    (steps,) = table[str(keys[max(0, bisect_right(keys, batch) - 1)])]["candidate_steps"]
    return steps


def trtllm_drafts(schedule: dict[int, int], batch: int, upper: bool) -> int:
    """Upper bounds: nothing above the largest key. Lower bounds: the last key at or below the batch."""
    keys = sorted(schedule)
    if not upper:
        return schedule[keys[bisect_right(keys, batch) - 1]]
    at = bisect_left(keys, batch)
    return schedule[keys[at]] if at < len(keys) else 0


def only_file(out: Exported) -> Any:
    (content,) = out.files.values()
    return json.loads(content)


def can_run(config: SpecConfig, drafter: str) -> bool:
    return config.drafter == drafter and config.tree is not None and config.tree.is_chain


def expected_depth(made: Policy, batch: int, length: int, drafter: str = "model") -> int:
    """The winner's draft length; where the engine cannot run the winner, that of the best that it can run, or 0."""
    winner = made.lookup(batch, length)
    if winner.is_off or can_run(winner, drafter):
        return winner.depth
    values = {SpecConfig.parse(name): value for name, value in made.choice(batch, length).values.items()}
    able = {config: value for config, value in values.items() if can_run(config, drafter)}
    top = max(able, key=able.__getitem__, default=SpecConfig.off())
    return top.depth if top in able and able[top] >= math.log(made.rules.min_speedup) else 0


def expected_at(made: Policy, batch: int, length: int, drafter: str = "model") -> int:
    """The same for any batch: the next larger tabled one decides, and outside of the table the policy's rules do."""
    tabled, rules = made.grid.batches, made.rules.outside
    if (batch > tabled[-1] and rules.batch_above == "off") or (batch < tabled[0] and rules.batch_below == "off"):
        return 0
    return expected_depth(made, min((b for b in tabled if b >= batch), default=tabled[-1]), length, drafter)


BATCHES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 14, 63, 64, 65, 200)


@settings(deadline=None)
@given(policies(), st.data())
def test_vllm_drafts_what_the_policy_says_at_the_chosen_length(made: Policy, data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(made.grid.lengths))
    out = export(made, "vllm", length=length, draft_model="d")
    assert_every_loss_is_said(made, out, length)
    if not out.files:
        assert all(expected_at(made, batch, length) == 0 for batch in made.grid.batches)
        return
    config = only_file(out)
    vllm.validate(config)
    assert [vllm_drafts(config, b) for b in BATCHES] == [expected_at(made, b, length) for b in BATCHES]


@settings(deadline=None)
@given(policies(), st.data())
def test_sglang_drafts_what_the_policy_says_at_the_chosen_length(made: Policy, data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(made.grid.lengths))
    out = export(made, "sglang", length=length, draft_model="d", algorithm="EAGLE")
    assert_every_loss_is_said(made, out, length)
    if out.files:
        table = only_file(out)
        assert [sglang_drafts(table, b) for b in BATCHES] == [expected_at(made, b, length) for b in BATCHES]


@settings(deadline=None)
@given(policies(), st.data(), st.sampled_from(["1.2", "1.3"]))
def test_tensorrt_llm_drafts_what_the_policy_says_or_is_refused(made: Policy, data: st.DataObject, version: str) -> None:
    length = data.draw(st.sampled_from(made.grid.lengths))
    depths = [expected_at(made, b, length) for b in BATCHES]
    if depths[0] < max(depths):  # TensorRT-LLM wants the longest draft at the smallest key
        with pytest.raises(ExportError, match="smallest batch"):
            export(made, "tensorrt_llm", length=length, draft_model="d", version=version)
        return
    out = export(made, "tensorrt_llm", length=length, draft_model="d", version=version)
    assert_every_loss_is_said(made, out, length)
    if out.files:
        config = read_yaml(out)
        tensorrt_llm.validate(config, version)
        schedule = config["draft_len_schedule"]
        assert [trtllm_drafts(schedule, b, version == "1.3") for b in BATCHES] == depths


@settings(deadline=None)
@given(policies(), st.data())
def test_one_setting_engines_draft_what_the_policy_says_at_their_batch(made: Policy, data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(made.grid.lengths))
    batch = data.draw(st.sampled_from(BATCHES))
    llama = flags_of(export(made, "llama_cpp", length=length, draft_model="d.gguf", batch=batch))
    assert int(llama.get("--spec-draft-n-max", 0)) == expected_at(made, batch, length)
    assisted = export(made, "transformers", length=length, draft_model="d")
    settings_of = only_file(assisted) if assisted.files else {"num_assistant_tokens": 0}
    assert settings_of["num_assistant_tokens"] == expected_at(made, 1, length)


@settings(deadline=None)
@given(policies(), st.data())
def test_traffic_at_one_length_is_that_length(made: Policy, data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(made.grid.lengths))
    by_traffic = export(made, "vllm", traffic={str(length): 3.0}, draft_model="d")
    by_length = export(made, "vllm", length=length, draft_model="d")
    assert by_traffic.command == by_length.command


def assert_every_loss_is_said(made: Policy, out: Exported, length: int) -> None:
    said = "\n".join(out.dropped)
    for other in made.grid.lengths:
        assert str(other) in said
    assert "hysteresis" in said
    for batch in made.grid.batches:
        winner = made.lookup(batch, length)
        kept = next((line for line in out.dropped if line.startswith(f"batch {batch}:")), "")
        assert (str(winner) in kept) == (not winner.is_off and not can_run(winner, "model"))
        if Cell(batch, length) in made.grid.infeasible:
            assert f"row {batch}x{length}: infeasible (KV 256 GiB" in said
        elif out.files and out.target != "sglang" and can_run(winner, "model") and winner.view.kind != "full":
            assert f"{winner.view}" in said


def read_yaml(out: Exported) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    (content,) = out.files.values()
    config = yaml.safe_load(content)["speculative_config"]
    assert isinstance(config, dict)
    return config


def flags_of(out: Exported) -> dict[str, str]:
    words = shlex.split(out.command or "")
    return {w: after for w, after in zip(words, [*words[1:], ""], strict=True) if w.startswith("--spec")}


# Examples, one per engine, in the engine's own words.


def test_vllm_table_has_closed_ranges_and_plain_decoding_above_the_last_batch() -> None:
    out = export(FALLING, "vllm", draft_model="my/draft", max_num_seqs=256)
    config = only_file(out)
    assert config == {
        "method": "draft_model", "model": "my/draft", "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [[1, 1, 5], [2, 4, 3], [5, 256, 0]],
    }  # fmt: skip
    assert list(out.files) == ["speculative-config.len4096.json"]
    words = shlex.split(out.command or "")
    assert words[:3] == ["vllm", "serve", "TARGET_MODEL"]
    assert json.loads(words[words.index("--speculative-config") + 1]) == config


def test_sglang_adaptive_pins_one_step_per_slot_and_sets_the_window() -> None:
    out = export(FALLING, "sglang", draft_model="my/draft", algorithm="EAGLE")
    assert {key: slot["candidate_steps"] for key, slot in only_file(out).items()} == {"1": [5], "2": [3], "5": [0]}
    flags = flags_of(out)
    assert (flags["--speculative-num-steps"], flags["--speculative-num-draft-tokens"]) == ("5", "6")
    assert flags["--speculative-adaptive-config"] in out.files
    assert "--speculative-draft-window-size" not in flags  # the row of batch 4 drafts with the full context
    assert any("the widest of 4+60, full" in line for line in out.dropped)


def test_sglang_takes_the_window_and_says_when_the_sink_is_lost() -> None:
    made = policy({"1x4096": {"model:4+60/chain5": 1.9}})
    flags = flags_of(export(made, "sglang", draft_model="d", algorithm="EAGLE"))
    assert (flags["--speculative-draft-window-size"], flags["--speculative-draft-sink-size"]) == ("60", "4")
    out = export(made, "sglang", draft_model="d", algorithm="EAGLE3")
    assert "--speculative-draft-sink-size" not in flags_of(out)
    assert any(line.startswith("sink 4") for line in out.dropped)
    out = export(made, "sglang", draft_model="d", batch=1)  # STANDALONE ignores a window
    assert "--speculative-draft-window-size" not in flags_of(out)
    assert any(line.startswith("window 4+60") for line in out.dropped)


def test_sglang_static_keeps_a_tree_that_fits_and_drops_one_that_does_not() -> None:
    made = policy({"1x512": {"model:full/2,2": 1.9, "model:full/2,1": 1.8, "model:full/chain3": 1.7}})
    out = export(made, "sglang", draft_model="d", batch=1)
    flags = flags_of(out)
    shape = [flags[f"--speculative-{name}"] for name in ("num-steps", "eagle-topk", "num-draft-tokens")]
    assert shape == ["2", "2", "5"]  # 2,1: four nodes and the root; 2,2 has six nodes where 2 x 2 fit
    assert any("model:full/2,2 is dropped" in line for line in out.dropped)
    assert any(line.startswith("tree 2,1") for line in out.dropped)


def test_sglang_standalone_needs_a_batch() -> None:
    with pytest.raises(ExportError, match="Pass batch="):
        export(FALLING, "sglang", draft_model="d")


def test_tensorrt_llm_keys_follow_the_version() -> None:
    upper = read_yaml(export(FALLING, "tensorrt_llm", draft_model="d", version="1.3.0"))
    assert upper["draft_len_schedule"] == {1: 5, 4: 3}  # nothing is drafted above the largest key
    lower = read_yaml(export(FALLING, "tensorrt_llm", draft_model="d", version="1.2"))
    assert lower["draft_len_schedule"] == {1: 5, 2: 3, 5: 0}
    assert lower["decoding_type"] == "Draft_Target"


@pytest.mark.parametrize("version", ["", "latest", "1.0", "1.3.0rc2", "0.21"])
def test_tensorrt_llm_version_is_never_guessed(version: str) -> None:
    with pytest.raises(ExportError, match="TensorRT-LLM"):
        export(FALLING, "tensorrt_llm", draft_model="d", version=version)


def test_tensorrt_llm_keeps_drafting_above_the_table_where_the_policy_clamps() -> None:
    made = policy({"1x64": {"model:full/chain3": 1.5}}, batch_above="clamp")
    config = read_yaml(export(made, "tensorrt_llm", draft_model="d", version="1.3", max_batch_size=99))
    assert config["draft_len_schedule"] == {99: 3}


def test_llama_cpp_names_the_type_and_fixes_the_draft_length() -> None:
    words = shlex.split(export(FALLING, "llama_cpp", draft_model="d.gguf", target_model="t.gguf", batch=3).command or "")
    assert words[:3] == ["llama-server", "-m", "t.gguf"]
    assert shlex.join(words[3:]) == (
        "--spec-type draft-simple --spec-draft-model d.gguf --spec-draft-n-max 3 --spec-draft-n-min 0 --spec-draft-p-min 0"
    )
    words = shlex.split(export(LOOKUP, "llama_cpp").command or "")
    assert shlex.join(words[3:]) == "--spec-type ngram-simple --spec-ngram-simple-size-n 4 --spec-ngram-simple-size-m 6"


def test_ngram_becomes_the_lookup_of_each_engine() -> None:
    assert only_file(export(LOOKUP, "vllm")) == {
        "method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4, "num_speculative_tokens": 6,
        "num_speculative_tokens_per_batch_size": [[1, 4, 6], [5, 1024, 0]],
    }  # fmt: skip
    assert only_file(export(LOOKUP, "transformers")) == {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 4}
    config = read_yaml(export(LOOKUP, "tensorrt_llm", version="1.3"))
    assert (config["decoding_type"], config["max_draft_len"], config["draft_len_schedule"]) == ("NGram", 6, {4: 6})
    flags = flags_of(export(LOOKUP, "sglang", batch=2))
    assert (flags["--speculative-algorithm"], flags["--speculative-num-draft-tokens"]) == ("NGRAM", "7")
    for to, options in {"vllm": {}, "sglang": {"batch": 2}, "transformers": {}, "llama_cpp": {}}.items():
        assert any(line.startswith("ngram") for line in export(LOOKUP, to, **options).dropped)


def test_the_default_ngram_match_is_that_of_our_drafter() -> None:
    drafters = pytest.importorskip("specdec_lab.engine.drafters")
    assert (min(drafters.NGRAM_SIZES), max(drafters.NGRAM_SIZES)) == NGRAM_MATCH


def test_transformers_drafts_as_many_tokens_as_the_export_says() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, eos_token_id=None)
    model, assistant = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    drafted: list[int] = []
    generator = transformers.generation.candidate_generator.AssistedCandidateGenerator
    propose = generator.get_candidates

    def counted(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        candidates = propose(self, input_ids, **kwargs)
        drafted.append(candidates[0].shape[1] - input_ids.shape[1])
        return candidates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "get_candidates", counted)
        calls = [line for line in (export(FALLING, "transformers", draft_model="d").command or "").splitlines()
                 if "from_pretrained" not in line and "import" not in line]  # fmt: skip
        inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 24, "do_sample": False}
        exec("\n".join(calls), {"model": model, "assistant": assistant, "inputs": inputs})
    assert drafted[0] == 5
    assert max(drafted) == 5  # the schedule is constant


# Collapsing lengths.


@pytest.mark.parametrize(("short", "long", "depth"), [(95, 5, 1), (50, 50, 3), (5, 95, 5)])
def test_traffic_picks_what_pays_on_average_and_never_the_best_column(short: int, long: int, depth: int) -> None:
    made = policy({
        "1x512": {"model:full/chain1": 1.3, "model:full/chain3": 1.2, "model:4+60/chain5": 0.8},
        "1x8192": {"model:full/chain1": 0.8, "model:full/chain3": 1.2, "model:4+60/chain5": 1.6},
    })  # fmt: skip
    out = export(made, "vllm", traffic={"512": short, "8k": long}, draft_model="d")
    assert vllm_drafts(only_file(out), 1) == depth
    assert any(f"{short}% at 512, {long}% at 8192" in line for line in out.dropped)


def test_a_batch_that_does_not_fit_at_a_length_is_judged_by_the_lengths_at_which_it_fits() -> None:
    made = policy({"1x512": {"model:full/chain3": 1.2}, "1x8192": {"model:full/chain3": 1.2},
                   "8x512": {"model:full/chain3": 1.4}, "8x8192": "infeasible"})  # fmt: skip
    out = export(made, "vllm", traffic={"512": 1, "8192": 1}, draft_model="d")
    assert vllm_drafts(only_file(out), 8) == 3
    assert any(line.startswith("row 8x8192: infeasible") for line in out.dropped)


def test_the_nearest_length_is_nearest_in_log2() -> None:
    made = policy({"1x512": {"model:full/chain1": 1.3}, "1x8192": {"model:full/chain3": 1.3}})
    for asked, depth in ((2000, 1), ("2200", 3), ("8k", 3), (10000, 3), (400, 1)):
        assert only_file(export(made, "vllm", length=asked, draft_model="d"))["num_speculative_tokens"] == depth
    for outside in (300, 12000):
        with pytest.raises(ExportError, match="outside of the tuned lengths"):
            export(made, "vllm", length=outside, draft_model="d")


def test_each_length_gets_its_own_table() -> None:
    made = policy({"1x512": {"model:full/chain1": 1.3}, "1x8192": {"model:full/chain3": 1.3}})
    out = export(made, "vllm", length="each", draft_model="d")
    assert sorted(out.files) == ["speculative-config.len512.json", "speculative-config.len8192.json"]
    assert [line for line in (out.command or "").splitlines() if line.startswith("#")] == ["# len512", "# len8192"]


def test_where_an_engine_cannot_run_the_winner_the_next_best_measured_configuration_takes_its_place() -> None:
    made = policy({"1x512": {"self:4+60/chain4": 1.9, "model:full/chain3": 1.3, "model:full/2,2": 1.5},
                   "4x512": {"self:4+60/chain4": 1.4, "model:full/chain3": 1.02}})  # fmt: skip
    out = export(made, "vllm", draft_model="d")
    config = only_file(out)
    assert (vllm_drafts(config, 1), vllm_drafts(config, 4)) == (3, 0)
    said = "\n".join(out.dropped)
    assert "batch 1: self:4+60/chain4 is dropped" in said
    assert "model:full/chain3, takes its place" in said
    assert "batch 4: self:4+60/chain4 is dropped" in said
    assert "plain decoding takes its place" in said


def test_a_policy_that_never_speculates_exports_a_plain_server() -> None:
    made = policy({"1x512": {"self:4+60/chain4": 1.9}, "8x512": {}})
    options: dict[str, dict[str, Any]] = {"tensorrt_llm": {"version": "1.3"}, "sglang": {"batch": 1}}
    for to in TARGETS:
        out = export(made, to, **options.get(to, {}))
        assert not out.files
        assert "spec" not in (out.command or "")
        assert any("nothing speculates" in note for note in out.notes)


# Refusals.


@pytest.mark.parametrize("label", ["forced", "random-weights", "modelled"])
def test_numbers_that_are_not_measurements_are_not_deployed(label: str) -> None:
    made = policy({"1x512": {"ngram/chain6": 1.7}}, labels=("busy", label))
    with pytest.raises(ExportError, match=label):
        export(made, "vllm")
    assert any(label in note for note in export(made, "vllm", allow_labelled=True).notes)


@pytest.mark.parametrize(("to", "options", "message"), [
    ("sglangg", {}, "no exporter"),
    ("vllm", {"draft": "d"}, "takes no option draft"),
    ("vllm", {}, "Pass draft_model="),
    ("vllm", {"drafter": "self"}, "engines load model or ngram"),
    ("vllm", {"draft_model": "d", "method": "suffix"}, "may ignore a batch table"),
    ("vllm", {"draft_model": "d", "length": 4096, "traffic": {"4096": 1}}, "each alone picks the table"),
    ("vllm", {"draft_model": "d", "traffic": {"4096": -1}}, "no usable weights"),
    ("vllm", {"draft_model": "d", "traffic": {}}, "no usable weights"),
    ("vllm", {"draft_model": "d", "length": 0}, "at least 1 token"),
    ("llama_cpp", {"draft_model": "d", "batch": 0}, "batch must be at least 1"),
    ("tensorrt_llm", {"draft_model": "d", "method": "Eagle3", "version": "1.2"}, "reads no schedule"),
])  # fmt: skip
def test_bad_options_are_named_with_what_to_do(to: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(FALLING, to, **options)


def test_several_lengths_need_a_choice() -> None:
    made = policy({"1x512": {"ngram/chain6": 1.3}, "1x8192": {"ngram/chain6": 1.3}})
    with pytest.raises(ExportError, match="knows 2 lengths"):
        export(made, "vllm")


def test_tensorrt_llm_refuses_a_draft_that_grows_with_the_batch() -> None:
    made = policy({"1x512": {"model:full/chain1": 1.3}, "8x512": {"model:full/chain3": 1.3}})
    for version in ("1.2", "1.3"):
        with pytest.raises(ExportError, match="at its smallest batch"):
            export(made, "tensorrt_llm", draft_model="d", version=version)
