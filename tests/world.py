"""A synthetic world for the tuner: costs from a model, acceptance from the text, time from the records. Nothing is real.

The truth is known in closed form. All configurations read the same text: the token at a place is accepted by a drafter
iff the place's fixed random number lies below the drafter's rate, so a lucky place is lucky for everybody.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

from specdec_lab.records import Cell, Identity, SpecConfig, StepRecord, UnsupportedConfig
from specdec_lab.tune import Database, Protocol, make_plan, tune

IDENTITY = Identity(
    "TEST_CPU_2t",
    {"device": "TEST_CPU_2t", "target": "f" * 12, "dtype": "float32", "threads": 2, "engine": "0.1", "count": 1},
    {"self": {"kind": "self"}, "ngram": {"kind": "ngram", "sizes": [4, 3]}, "model": {"kind": "model", "draft": "d" * 12}},
    {"torch": "2.13.0"},
)


@dataclass
class World:
    """measure(cell, config); `seconds` is its clock, advanced by every round."""

    noise: float = 0.0
    seed: int = 0
    is_even: bool = False  # acceptance at its expectation over few rounds: no luck with the text
    per_token: float = 2e-4
    rates: dict[str, float] = field(default_factory=lambda: {"self": 0.9, "model": 0.8, "ngram": 0.35})
    unsupported: set[str] = field(default_factory=set)
    too_large: set[str] = field(default_factory=set)
    liars: set[str] = field(default_factory=set)
    late_liars: set[str] = field(default_factory=set)  # wrong from the 16th token on
    busy_calls: set[int] = field(default_factory=set)
    max_new_tokens: int = 100_000
    on_call: object = None
    seconds: float = 0.0
    calls: Counter = field(default_factory=Counter)
    num_calls: int = 0
    closed: int = 0

    def clock(self) -> float:
        return self.seconds

    def rate(self, cell: Cell, config: SpecConfig) -> float:
        """Chance that a drafted token is accepted: windows lose what they cannot see."""
        rate = self.rates[config.drafter]
        if config.view is None:
            return rate
        seen = min(config.view.max_tokens or cell.length, cell.length)
        return rate * (1 - 0.3 * (1 - math.log2(seen + 1) / math.log2(cell.length + 1)))

    def step_s(self, cell: Cell, config: SpecConfig) -> tuple[float, float]:
        """Seconds of drafting and of the target's forward in one round."""
        weights, per_token, per_kv = 4e-3, self.per_token, 1.5e-7
        verify = weights + per_token * cell.batch * (config.num_nodes + 1) + per_kv * cell.batch * cell.length * 8
        if config.drafter in ("off", "ngram"):
            return 0.0, verify
        window = min(config.view.max_tokens or cell.length, cell.length)
        share = 1.0 if config.drafter == "self" else 0.15
        return config.depth * share * (weights + per_token * cell.batch + per_kv * cell.batch * window * 8), verify

    def speedup(self, cell: Cell, config: SpecConfig) -> float:
        """The truth."""
        if config.is_off:
            return 1.0
        rate = self.rate(cell, config)
        yields = sum(rate**i for i in range(config.depth + 1))
        return yields * self.step_s(cell, OFF)[1] / sum(self.step_s(cell, config))

    def __call__(self, cell: Cell, config: SpecConfig):
        spelling = str(config)
        self.calls[str(cell), spelling] += 1
        self.num_calls += 1
        if self.on_call is not None:
            self.on_call(self)
        if spelling in self.unsupported:
            raise UnsupportedConfig(f"{spelling}: not here")
        if spelling in self.too_large:
            raise MemoryError(f"{spelling} needs 123 bytes")
        return self._rounds(cell, config, self.num_calls)

    def _rounds(self, cell: Cell, config: SpecConfig, call: int):
        noise = random.Random(f"{self.seed}/{call}" if self.noise else 0)
        text = [random.Random(f"{self.seed}/{cell}/{row}") for row in range(cell.batch)]
        luck: list[list[float]] = [[] for _ in range(cell.batch)]
        places = [0] * cell.batch
        index, rate = 0, 0.0 if config.is_off else self.rate(cell, config)
        flags = ("busy",) if call in self.busy_calls else ()
        try:
            while min(places) < self.max_new_tokens:
                accepted, tokens = [], []
                for row, place in enumerate(places):
                    while len(luck[row]) < place + config.depth + 1:
                        luck[row].append(text[row].random())
                    count = 0
                    if self.is_even:
                        even = (0.5 + 0.6180339887 * (index + 1) + 0.37 * row) % 1
                        count = sum(even < rate**depth for depth in range(1, config.depth + 1))
                    else:
                        while count < config.depth and luck[row][place + count] < rate:
                            count += 1
                    lie = str(config) in self.liars or (str(config) in self.late_liars and place > 15)
                    tokens.append(tuple(int(1e6 * luck[row][p]) + lie for p in range(place, place + count + 1)))
                    accepted.append(count)
                    places[row] += count + 1
                draft, verify = (part * math.exp(noise.gauss(0, self.noise)) for part in self.step_s(cell, config))
                wall = draft + verify
                self.seconds += wall
                yield StepRecord(
                    index, "round", str(config), self.seconds, wall, draft, 0.6 * verify, wall - draft - 0.6 * verify, 0.0, 0.0,
                    0.0, wall, tuple(cell.length + p for p in places), (config.num_nodes,) * cell.batch, tuple(accepted),
                    tuple(tokens), (False,) * cell.batch, flags=flags,
                )  # fmt: skip
                index += 1
        finally:
            self.closed += 1


OFF = SpecConfig.off()
QUICK = Protocol(race_run_s=0.05, duel_run_s=0.2, race_blocks=2, pilot_blocks=2, max_trials=4)


def spec(text):
    return SpecConfig.parse(text)


def small_plan(budget_s=1e6, batches=(2,), lengths=(512, 2048), drafters=("model", "ngram"), protocol=QUICK, **options):
    return make_plan(batches, lengths, budget_s, drafters, protocol=protocol, **options)


def run(tmp_path, world, plan, name="run", database=None, **options):
    database = Database(tmp_path / "db", IDENTITY, "tiny") if database is None else database
    options = {"workload": "prose", "clock": world.clock, "now": lambda: "2026-01-02T03:04:05Z", **options}
    return tune(plan, world, IDENTITY, database, run_dir=tmp_path / "runs" / name, **options)


def keys(tmp_path):
    return sorted(m.key for m in Database(tmp_path / "db", IDENTITY, "tiny") if m.config != "off")


def identifiers(tmp_path):
    """Of all records but repeats of the sentinel, with which every call minds its machine."""
    return {m.id for m in Database(tmp_path / "db", IDENTITY, "tiny") if m.kind != "sentinel" or not m.design.block}
