"""Whole rounds on the device against rounds on the host: the shipped pair, the same prompts, token for token.

In float32, where a tie does not flip by rounding. Three ways: on the host, on the device run anew each time (eager), and on the
device as they are played (captured as graphs on a GPU). Lists that are chosen again and n-grams are among them: what is
drafted must be equal too. Not known here: how rounds are played.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ...engine.loop import Engine
from ...engine.models.loading import ModelPair, load
from ...records import Run, SpecConfig
from ...stream import record
from ...workload import Workload
from .attempts import one_by_one
from .context import Context
from .ledger import PASS, RED, Row

CONFIGS = (
    "off", "self:4+60/chain3", "model:4+60/chain3", "self:4+60/2,2,1", "ngram/chain3", "self:snapkv24+8r16/chain3",
    "self:snapkv24+8/2,2,1",
)
LAWS = (("greedy", 0.0, "rejection"), ("coupled", 0.8, "coupled"), ("rejection", 0.8, "rejection"))
LENGTHS = (3, 40, 131)  # ragged
PERIOD = 20  # of the second text, so that an n-gram is found in it
NEW_TOKENS = 24
NO_FLAGS = ("attention-above-forward", "floor-above-measured")


def round_rows(context: Context) -> Iterator[Row]:
    """A row per configuration and law."""
    pair = load("demo", device=context.device.type, dtype="float32")
    engines = {rounds: Engine(pair, rounds=rounds) for rounds in ("host", "eager", "device")}
    laws, configs = LAWS[: context.sizes.laws], CONFIGS[: context.sizes.round_configs]
    for name, temperature, verifier in laws:
        for config in map(SpecConfig.parse, configs):
            context.checkpoint(f"rounds of {config}, {name}")
            rows = _compared(engines, pair, config, name, temperature, verifier)
            yield from one_by_one(context, f"device rounds {config} {name}", rows)


def _compared(
    engines: dict[str, Engine], pair: ModelPair, config: SpecConfig, name: str, temperature: float, verifier: str
) -> Iterator[Row]:
    runs = {rounds: _run(engine, pair, config, temperature, verifier) for rounds, engine in engines.items()}
    wrong = [rounds for rounds, run in runs.items() if said(run) != said(runs["host"])]
    flags = tuple(dict.fromkeys(f for step in runs["device"].rounds for f in step.flags if f in NO_FLAGS))
    reason = f"other tokens or drafts than rounds on the host: {', '.join(wrong)}" if wrong else ""
    yield Row("device rounds", f"{config} {name}", {"rounds": len(runs["device"].rounds)}, RED if wrong else PASS,
              "the tokens and drafts of rounds on the host", flags=flags, reason=reason)


def said(run: Run) -> list[tuple[object, ...]]:
    """What every round drafted, accepted and emitted."""
    return [(step.config, step.drafted, step.accepted, step.tokens) for step in run.rounds]


def _run(engine: Engine, pair: ModelPair, config: SpecConfig, temperature: float, verifier: str) -> Run:
    draw = random.Random(0)
    prompts = [[draw.randrange(1, pair.target.shape.vocab) for _ in range(n)] for n in LENGTHS]
    prompts[1][PERIOD:] = prompts[1][: LENGTHS[1] - PERIOD]
    texts = tuple(map(tuple, prompts))
    text = Workload("random", texts, NEW_TOKENS, temperature=temperature, verifier=verifier, stop_at_eos=False)
    return record(engine.steps(text, config))
