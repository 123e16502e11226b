"""Tensor parallelism: two processes decide what one does, with half the KV each; one shard alone is labelled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdec_lab as sd
import tiny
from parallel_rank import decided
from ranks_world import run_ranks
from specdec_lab.costs.shapes import SHAPES
from specdec_lab.engine.models.groups import Alone
from specdec_lab.engine.models.parallel import ParallelError, Shard, ShardedWeights, why_not_cut

HERE = Path(__file__).parent
AMONG_TWO = ("--random-weights", "tiny", "--tensor-parallel", "2", "--device", "cpu", "--backend", "sdpa")


def test_two_processes_emit_what_one_does_with_half_the_kv_each(tmp_path):
    (first, second), _ = run_ranks(HERE / "parallel_rank.py", tmp_path)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    alone = decided(1)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["tokens"] == alone["tokens"]
        assert found["steps"] == alone["steps"]
        assert found["rounds"] == "eager, reference operations, 2 ranks over gloo: no CUDA"
        assert 2 * found["kv"] == alone["kv"]
        assert 2 * found["per_token"] == alone["per_token"]
        assert found["chosen"] == alone["chosen"], "a choice that differs between ranks is the first one's"
        assert found["own draft"] == alone["tokens"]["eager"][0], "a draft network that differs decides nothing"
    assert any(sum(accepted) for run in alone["steps"]["eager"] for accepted, _ in run)
    assert len(set(alone["chosen"])) == 2


@pytest.mark.parametrize(("way", "words"), [("fault", "rank 1 fails here"), ("exits", "rank 1 has nothing to read")])
def test_a_rank_that_ends_early_ends_the_other_within_seconds_and_its_words_are_shown_once(way, words):
    (first, second), _ = run_ranks(HERE / "parallel_failing.py", way)
    assert (first.code, second.code) == (1, 1)
    assert second.err.count(f"Error: {words}" if way == "fault" else words) == 1
    assert "frame #" not in first.err + second.err
    assert "Traceback" not in first.err
    assert first.err.strip().splitlines()[-1:] == (
        ["specdec_lab: error: rank 1 ended while rank 0 still waited for it"] if way == "exits" else []
    )  # fmt: skip


def test_a_mistake_that_all_ranks_make_is_told_once():
    ends, _ = run_ranks(
        "-m", "specdec_lab", "run", *AMONG_TWO, "--workload", "random", "--cell", "1x64", "--config", "self:nonsense"
    )
    assert [end.code for end in ends] == [2, 2]
    assert sorted(end.err.count("'self:nonsense': the tree is missing") for end in ends) == [0, 1]


def test_torchrun_sees_a_rank_that_fails_though_the_other_waits_for_it():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, str(HERE / "parallel_failing.py"), "mistake"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("no random-weight model is called 'nobody'") == 1


def test_profile_and_tune_under_two_ranks_measure_what_they_measure_in_one_process(tmp_path):
    """The first rank reads the clock, decides and writes; the second one only follows."""
    (first, second), _ = run_ranks(
        "-m", "specdec_lab", "profile", *AMONG_TWO, "--rounds", "eager", "--workload", "random", "--cells", "2x64", "--configs",
        "self:4+12/chain3", "--blocks", "1", "--block-seconds", "0.01", "--trace", "traces", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert (first.code, second.code, second.out.strip()) == (0, 0, ""), first.err + second.err
    said = json.loads(first.out)
    assert {c["config"] for c in said["comparisons"]} == {"off", "self:4+12/chain3"}
    assert not said["mismatches"]
    assert "2 ranks over gloo" in said["header"]["target"]["rounds"]
    assert len(list((tmp_path / "traces").iterdir())) >= 2
    (first, second), _ = run_ranks(
        "-m", "specdec_lab", "tune", *AMONG_TWO, "--workload", "random", "--batches", "2", "--lengths", "64", "--budget", "1s",
        "--db", "db", cwd=tmp_path,
    )  # fmt: skip
    assert (first.code, second.code) in {(code, 0) for code in (0, 3, 4)}, first.err + second.err
    assert json.loads((tmp_path / "policy.json").read_text())["table"]
    assert list((tmp_path / "db").rglob("*.jsonl"))


def test_shards_put_side_by_side_are_the_whole_tensor():
    whole = {"a.q_proj.weight": torch.randn(8, 4), "a.o_proj.weight": torch.randn(4, 8), "a.o_proj.bias": torch.randn(4),
             "n.weight": torch.ones(4)}  # fmt: skip
    parts = [ShardedWeights(whole, Shard(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([p["a.q_proj.weight"] for p in parts], 0), whole["a.q_proj.weight"])
    assert torch.equal(torch.cat([p["a.o_proj.weight"] for p in parts], 1), whole["a.o_proj.weight"])
    assert torch.equal(parts[0]["a.o_proj.bias"] + parts[1]["a.o_proj.bias"], whole["a.o_proj.bias"])
    assert torch.equal(parts[1]["n.weight"], whole["n.weight"])


def test_one_shard_of_eight_runs_alone_and_says_so():
    whole, shard = (sd.load("random:tiny", device="cpu", dtype="float32", shard=s) for s in (None, "1/8"))
    engine = sd.Engine(shard, backend="sdpa")
    run = engine.generate([list(range(40))], "self:4+12/chain2", max_new_tokens=6).run
    assert "one shard of 8" in run.header.labels
    assert 8 * shard.target.shape.kv_bytes_per_token(4) == whole.target.shape.kv_bytes_per_token(4)
    assert 8 * shard.target.shape.weight_bytes(4) == whole.target.shape.weight_bytes(4)
    assert 8 * shard.target.shape.linear_flops(3) == whole.target.shape.linear_flops(3)
    assert len(run.tokens()[0]) == 6


@pytest.mark.parametrize("options", [{"shard": "1/3"}, {"shard": "9/8"}, {"shard": "first"}, {"tensor_parallel": 0},
                                     {"tensor_parallel": 2, "shard": "1/2"}])  # fmt: skip
def test_what_cannot_be_cut_is_refused(options):
    with pytest.raises(ParallelError):
        sd.load("random:tiny", device="cpu", **options)


def test_reasons_name_what_does_not_divide():
    assert why_not_cut(SHAPES["Llama-3.1-8B"], 8) is None
    assert why_not_cut(SHAPES["Llama-3.1-8B"], 16) == "8 key-value heads cannot be divided among 16 ranks"


def test_ranks_without_torchrun_or_of_another_number_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ParallelError, match="torchrun --nproc-per-node 2"):
        sd.load("random:tiny", device="cpu", tensor_parallel=2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ParallelError, match="4 processes were started"):
        sd.load("random:tiny", device="cpu", tensor_parallel=2)


def test_only_our_runner_is_cut():
    with pytest.raises(ParallelError, match="runner hf"):
        sd.load(tiny.model("llama"), runner="hf", device="cpu", shard="1/2")


def test_a_shard_alone_gives_logits_as_wide_as_the_vocabulary():
    assert Alone(4).gather(torch.zeros(2, 3)).shape == (2, 12)
