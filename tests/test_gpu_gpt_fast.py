"""gpt-fast as a peer: a stand-in with its surface goes the way of the real one; the real one is never part of this house."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specdec_lab.bench.gpu import gpt_fast, plan
from specdec_lab.bench.gpu.context import Context, Skipped
from specdec_lab.bench.gpu.ledger import PASS, RED, Ledger
from specdec_lab.bench.gpu.session import REHEARSAL
from specdec_lab.bench.gpu.sizes import TINY
from specdec_lab.bench.gpu.stages import gpt_fast as gpt_fast_stage
from specdec_lab.cli import main
from specdec_lab.engine.models.loading import DEMO, read_weights
from specdec_lab.engine.models.random_weights import config_of

STAND_IN = Path(__file__).parent / "gpt_fast_stand_in"
CPU = torch.device("cpu")


def quiet(line):
    """Says nothing."""


def context(tmp_path, checkout):
    return Context(CPU, TINY, Ledger(tmp_path / "gpu.jsonl", "r", {}, (REHEARSAL,)), 600.0, quiet, gpt_fast=checkout)


@pytest.fixture
def compiled(monkeypatch):
    """What was handed to torch.compile, which here changes nothing: tracing is not what is tested."""
    seen = []

    def compile(function, **options):
        seen.append((function.__name__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return seen


@pytest.fixture
def changed_copy(tmp_path):
    """A checkout whose `generate` says `new` where the stand-in says `old`."""

    def make(old, new):
        path = tmp_path / "checkout"
        shutil.copytree(STAND_IN, path)
        text = (path / "generate.py").read_text()
        assert old in text
        (path / "generate.py").write_text(text.replace(old, new))
        return path

    return make


def test_both_paths_are_raced_after_their_tokens_were_found_to_be_ours(tmp_path, compiled):
    rows = list(gpt_fast_stage.stage(context(tmp_path, STAND_IN)))
    assert [(row.kind, row.verdict) for row in rows[:2]] == [("same tokens", PASS)] * 2
    assert [row.what.split(" ")[:2] for row in rows[2:]] == [
        ["ours", "plain"], ["ours", "speculation"], ["gpt-fast", "plain"], ["gpt-fast", "speculation"]
    ]
    theirs = {row.what.split(" ")[1]: row for row in rows[4:]}
    assert theirs["plain"].values["step_s"] > 0
    assert theirs["speculation"].values["round_s"] > 0
    assert theirs["speculation"].values["k"] == TINY.config.depth
    for row in rows[4:]:
        assert gpt_fast_stage.ONLY_TIME in row.reason
        assert row.labels == ("random-weights",)
        assert {"commit", "licence", "ours_over_it"} <= row.values.keys()
    assert [name for name, _ in compiled] == ["decode_one_token", "model_forward"] * 2
    assert all(options == {"fullgraph": True, "backend": "eager"} for _, options in compiled)


def test_a_path_with_other_tokens_is_red_and_gets_no_speed(tmp_path, compiled, changed_copy):
    wrong = changed_copy("best[: count + 1]", "best[:count] + [7]")
    rows = list(gpt_fast_stage.stage(context(tmp_path, wrong)))
    verdicts = {row.what.split(" ")[1]: row.verdict for row in rows if row.kind == "same tokens"}
    assert verdicts == {"plain": PASS, "speculation": RED}
    assert [row.what for row in rows if row.kind == "refused"] == ["gpt-fast speculation tiny-square 1x24"]
    assert not [row for row in rows if row.kind == "decode" and row.what.startswith("gpt-fast speculation")]
    assert [row for row in rows if row.kind == "decode" and row.what.startswith("gpt-fast plain")]


def test_a_path_that_breaks_is_a_row_with_its_words_and_the_other_path_goes_on(tmp_path, compiled, changed_copy):
    broken = changed_copy("guessed = [tokens[at]]", "raise RuntimeError('got 1 and 2')")
    rows = list(gpt_fast_stage.stage(context(tmp_path, broken)))
    (failed,) = [row for row in rows if row.kind == "failed"]
    assert (failed.what, failed.verdict) == ("gpt-fast speculation", None)  # theirs: nothing of ours is wrong
    assert failed.reason == "RuntimeError: got 1 and 2. Both paths run at bc04265"
    assert [row for row in rows if row.kind == "decode" and row.what.startswith("gpt-fast plain")]


def test_the_process_is_as_before_when_the_checkout_is_closed():
    import torch._inductor.config as inductor

    names = ("model", "generate", "tokenizer")
    before, paths, tuning = {name: sys.modules.get(name) for name in names}, list(sys.path), inductor.coordinate_descent_tuning
    with gpt_fast.opened(STAND_IN) as checkout:
        assert sys.modules["model"] is checkout.model
        assert inductor.coordinate_descent_tuning is True
    assert {name: sys.modules.get(name) for name in names} == before
    assert (sys.path, inductor.coordinate_descent_tuning) == (paths, tuning)


def test_logits_are_those_of_transformers_with_groups_and_pairs_in_another_order():
    from transformers import AutoModelForCausalLM

    config = config_of("tiny-square")
    torch.manual_seed(0)
    right = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(config.vocab_size, (1, 21))
    with gpt_fast.opened(STAND_IN) as checkout, torch.inference_mode():
        made, lost = checkout.transformer(config, 64, CPU, torch.float32)
        made.load_state_dict(gpt_fast.weights_of(config, right.state_dict()))
        made.setup_caches(max_batch_size=1, max_seq_length=32)
        torch.testing.assert_close(made(ids, torch.arange(21)), right(ids).logits, rtol=1e-4, atol=1e-5)
    assert lost == ""


def test_what_a_commit_cannot_say_of_a_shape_is_told_and_what_no_commit_has_is_refused():
    with gpt_fast.opened(STAND_IN) as checkout:
        _, lost = checkout.transformer(config_of("draft-1b"), 64, torch.device("meta"), torch.bfloat16)
        assert lost == "without rope_scaling"
        for name, says in (("qwen3-1.7b", "not qwen3's"), ("tiny", "not 16 of 16 in 64"), ("llama-2-7b-32k", "not linear")):
            with pytest.raises(ValueError, match=says):
                checkout.transformer(config_of(name), 64, torch.device("meta"), torch.bfloat16)


def test_weights_keep_their_number_and_their_names_are_all_taken():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DEMO / "target")
    with gpt_fast.opened(STAND_IN) as checkout:
        made, _ = checkout.transformer(config, 64, CPU, torch.float32)
        assert made.load_state_dict(gpt_fast.weights_of(config, read_weights(str(DEMO / "target")))) is not None


def test_a_commit_and_a_licence_are_told_as_far_as_the_checkout_tells_them(tmp_path):
    (tmp_path / "LICENSE").write_text("Redistribution and use in source and\n binary forms ... Neither the name")
    assert gpt_fast._licence(tmp_path) == "BSD-3-Clause"
    assert gpt_fast._licence(STAND_IN) == "no LICENSE beside it"
    assert gpt_fast._commit(tmp_path) == "unknown: not a git checkout"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = gpt_fast._commit(tmp_path)
    assert len(clean) == 7
    (tmp_path / "LICENSE").write_text("other")
    assert gpt_fast._commit(tmp_path) == f"{clean}, changed"


def test_without_a_checkout_it_says_in_words_what_to_do(tmp_path):
    for path in (None, tmp_path / "nowhere"):
        with pytest.raises(Skipped, match="git clone .* then --gpt-fast PATH"):
            list(gpt_fast_stage.stage(context(tmp_path, path)))
    with pytest.raises(FileNotFoundError, match=r"has no model.py and no generate.py\. gpt-fast is not a package"):
        list(gpt_fast_stage.stage(context(tmp_path, tmp_path)))


def test_compilers_are_not_begun_when_their_time_is_over(tmp_path, compiled):
    class Late(Context):
        def has_time_for(self, seconds):
            return False

    late = Late(CPU, TINY, Ledger(tmp_path / "gpu.jsonl", "r", {}), 600.0, quiet, gpt_fast=STAND_IN)
    rows = list(gpt_fast_stage._times(late, None, ["plain", "speculation"]))
    left = [row for row in rows if row.kind == "left out"]
    assert len(left) == 2
    assert all("(assumed)" in row.reason and "run this stage alone" in row.reason for row in left)


def test_the_stage_is_run_when_the_option_is_given_or_it_is_named():
    assert "gpt-fast" not in [stage.name for stage in plan.chosen(())]
    assert plan.chosen((), ("--gpt-fast",))[-1].name == "gpt-fast"
    assert [stage.name for stage in plan.chosen(("gpt-fast",))] == ["gpt-fast"]


def test_the_command_hands_the_checkout_to_the_stage(tmp_path, compiled, capsys):
    words = ["gpu", "gpt-fast", "--rehearse", "--out", str(tmp_path / "out"), "--gpt-fast", str(STAND_IN)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "gpt-fast     ok" in out
    assert "same tokens gpt-fast speculation demo-2M 1x32" in out
