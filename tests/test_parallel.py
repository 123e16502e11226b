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
from specdec_lab.costs.shapes import SHAPES
from specdec_lab.engine.models.parallel import Alone, ParallelError, Shard, ShardedWeights, why_not_cut


def test_two_processes_emit_what_one_does_with_half_the_kv_each(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(Path(__file__).with_name("parallel_rank.py")), str(tmp_path)], capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    alone = decided(1)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["tokens"] == alone["tokens"]
        assert 2 * found["kv"] == alone["kv"]
        assert 2 * found["per_token"] == alone["per_token"]


def test_a_rank_that_fails_ends_the_run_though_the_other_waits_for_it():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(Path(__file__).with_name("parallel_failing.py"))], capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode != 0
    assert "rank 1 fails here" in done.stderr


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
