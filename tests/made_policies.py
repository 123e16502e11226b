"""Policies with chosen numbers, and a strategy for random ones: the tests decide what wins where."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from specdec_lab.policy import Policy

FINGERPRINT = "0123456789ab"
CHAINS = ("model:full/chain1", "model:full/chain3", "model:4+60/chain5", "model:0+128/chain2")
OTHERS = ("self:4+60/chain4", "ngram/chain6", "model:full/2,2", "model:snapkv64+32/chain4")
OFF_TABLE = {"batch_above": "off", "batch_below": "clamp", "length_above": "clamp", "length_below": "off"}


def row(cell: str, speedups: dict[str, float] | str) -> dict[str, Any]:
    """A tuned row whose best configuration won, or a row of a state that decides nothing."""
    if isinstance(speedups, str):
        return {"cell": cell, "state": speedups, "reason": "KV 256 GiB > 115 GiB free"}
    winner = max(speedups, key=speedups.__getitem__, default="off")
    value = speedups.get(winner, 1.0)
    estimates = {c: {"speedup": s * 1.1, "ci95": [s, s * 1.2], "how": "measured"} for c, s in speedups.items()}
    return {
        "cell": cell, "state": "tuned", "config": winner if value >= 1.03 else "off", "speedup": value,
        "speedup_ci95": [value, value], "baseline_tokens_per_s": 10.0, "estimates": estimates,
    }  # fmt: skip


def policy(table: dict[str, dict[str, float] | str], labels: tuple[str, ...] = (), **outside: str) -> Policy:
    """A policy with these lower bounds of the speed-up: cell -> configuration -> bound."""
    used = dict.fromkeys(c for entry in table.values() if not isinstance(entry, str) for c in entry)
    return Policy.from_dict({
        "schema": "specdec_lab.policy/1",
        "header": {
            "created": "2026-01-02T03:04:05Z", "device": "TEST_2t", "versions": {}, "base": FINGERPRINT,
            "target": FINGERPRINT, "drafters": dict.fromkeys(("self", "model", "ngram"), FINGERPRINT),
            "dtype": "float32", "workload": "prose", "labels": list(labels), "objective": "tokens_per_s", "evidence": [],
        },
        "lookup": {"method": "interp", "value": "ci_low", "min_speedup": 1.03, "outside": {**OFF_TABLE, **outside}},
        "portfolio": ["off", *used],
        "table": [row(cell, entry) for cell, entry in table.items()],
    })  # fmt: skip


FALLING = policy({
    "1x4096": {"model:full/chain3": 1.5, "model:4+60/chain5": 1.9},
    "4x4096": {"model:full/chain3": 1.4, "model:4+60/chain5": 1.2},
    "16x4096": {"model:full/chain3": 0.9, "model:4+60/chain5": 0.7},
})  # fmt: skip
LOOKUP = policy({"1x512": {"ngram/chain6": 1.7}, "4x512": {"ngram/chain6": 1.2}})


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    batches = sorted(draw(st.sets(st.sampled_from([1, 2, 3, 4, 8, 13, 64]), min_size=1, max_size=4)))
    lengths = sorted(draw(st.sets(st.sampled_from([60, 512, 1000, 8192]), min_size=1, max_size=3)))
    configs = draw(st.lists(st.sampled_from(CHAINS + OTHERS), min_size=1, max_size=5, unique=True))
    speedups = st.dictionaries(st.sampled_from(configs), st.integers(80, 200).map(lambda n: n / 100), max_size=5)
    entries = st.one_of(speedups, speedups, speedups, st.sampled_from(["infeasible", "not_visited"]))
    table = {f"{b}x{n}": draw(entries) for b in batches for n in lengths}
    edges = {name: draw(st.sampled_from(["off", "clamp"])) for name in ("batch_above", "batch_below")}
    return policy(table, **edges)
