"""One rank of a two-process run, started by torchrun; prints what it decided as JSON."""

import json
import os
import sys

import specdec_lab as sd

PROMPTS = [list(range(5, 45)), list(range(100, 120))]
RUNS = (("off", {}), ("self:4+12/chain3", {}), ("model:4+12/chain2", {}), ("self:full/2,1", {}),
        ("self:4+12/chain3", {"temperature": 0.8, "seed": 5}))  # fmt: skip


def decided(ranks):
    """Tokens of every run, and the KV bytes per token of this rank."""
    pair = sd.load("random:tiny", "random:tiny-draft", device="cpu", dtype="float64", tensor_parallel=ranks)
    engine = sd.Engine(pair, backend="sdpa")
    tokens = [engine.generate(PROMPTS, config, max_new_tokens=10, **sampling).tokens for config, sampling in RUNS]
    kv = engine.open(sd.Workload("x", ((1, 2),), 4))._session._cache.kv.numel()
    return {"tokens": tokens, "kv": kv, "per_token": pair.target.shape.kv_bytes_per_token(8)}


if __name__ == "__main__":
    found = decided(2)
    with open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w") as out:
        json.dump(found, out)
