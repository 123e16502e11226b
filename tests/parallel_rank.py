"""One rank of a two-process run, started by torchrun; writes what it decided as JSON."""

import dataclasses
import json
import os
import sys

import specdec_lab as sd

PROMPTS = [list(range(5, 45)), list(range(100, 120))]
HOST = (("off", {}), ("model:4+12/chain2", {}), ("self:full/2,1", {}),
        ("self:4+12/chain3", {"temperature": 0.8, "seed": 5}))  # fmt: skip
COUPLED = {"temperature": 0.8, "verifier": "coupled", "seed": 3}
EAGER = (("off", {}), ("off", COUPLED), ("self:4+12/chain3", COUPLED), ("model:4+12/chain2", {}), ("model:4+12/2,1", COUPLED),
         ("self:4+12/2,1", {}), HOST[-1])  # fmt: skip


def decided(ranks):
    """Tokens of every run, what was accepted, and the KV bytes per token of this rank."""
    pair = sd.load("random:tiny", "random:tiny-draft", device="cpu", dtype="float64", tensor_parallel=ranks)
    tokens, steps = {}, {}
    for rounds, runs in (("host", HOST), ("eager", EAGER)):
        engine = sd.Engine(pair, backend="sdpa", rounds=rounds)
        made = [engine.generate(PROMPTS, config, max_new_tokens=8, **sampling) for config, sampling in runs]
        tokens[rounds] = [output.tokens for output in made]
        steps[rounds] = [[[list(step.accepted), step.config] for step in output.run.rounds] for output in made]
        spelled = made[0].run.header.target["rounds"]
    chosen = engine.generate(PROMPTS, _Clocked(), max_new_tokens=24).run
    other = sd.Engine(_with_own_draft(pair), backend="sdpa", rounds="eager")
    own = other.generate(PROMPTS, "model:full/chain2", max_new_tokens=8).tokens
    kv = engine.open(sd.Workload("x", ((1, 2),), 4))._session._cache.kv.numel()
    return {"tokens": tokens, "steps": steps, "rounds": spelled, "chosen": [step.config for step in chosen.rounds],
            "own draft": own, "kv": kv, "per_token": pair.target.shape.kv_bytes_per_token(8)}  # fmt: skip


def _with_own_draft(pair):
    """A draft network that is another one on every rank."""
    own = sd.load("random:tiny-draft", device="cpu", dtype="float64", seed=7 + int(os.environ.get("RANK", "0"))).target
    return dataclasses.replace(pair, draft=own)


class _Clocked:
    """Chooses by something that differs between processes."""

    def __init__(self):
        self.asked = 0

    def __call__(self, live, length):
        self.asked += 1
        return ("off", "self:4+12/chain3")[self.asked > 6 + 3 * int(os.environ.get("RANK", "0"))]


if __name__ == "__main__":
    found = decided(2)
    with open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w") as out:
        json.dump(found, out)
