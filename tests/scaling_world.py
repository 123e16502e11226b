"""An engine whose times follow a known cost line and whose drafts are accepted at a known rate; nothing is computed or real.

Only what `measure` asks of an engine is here. The token at a place is the same whoever decodes, so greedy runs agree.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import builders
from specdec_lab.costs import ModelShape
from specdec_lab.records import Cell, SpecConfig, StepRecord, UnsupportedConfig
from specdec_lab.stream import Stream
from specdec_lab.workload import Workload

TARGET = ModelShape(4, 192, 3, 3, 64, 512, 2048, tied=True)
DRAFT = ModelShape(2, 96, 2, 2, 48, 256, 2048, tied=True)
SLOTS = 512  # new tokens of a run


@dataclass(frozen=True)
class Line:
    """seconds = fixed + per_token * tokens + per_byte * KV bytes."""

    fixed: float
    per_token: float
    per_byte: float

    def __call__(self, tokens: int, kv_bytes: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_byte * kv_bytes


@dataclass
class World:
    """engine-like: `pair`, `open`. `rates` is the chance of a drafted token, by drafter."""

    target: Line = Line(8e-4, 3e-5, 1 / 12e9)
    drafts: dict[str, Line] = field(
        default_factory=lambda: {"self": Line(8e-4, 3e-5, 1 / 12e9), "model": Line(2e-4, 1e-5, 1e-10)}
    )
    overhead: tuple[float, float] = (3e-4, 2e-5)
    plain_overhead: tuple[float, float] = (1e-4, 1e-5)
    rates: dict[str, float] = field(default_factory=lambda: {"self": 0.85, "model": 0.7, "ngram": 0.4})
    noise: float = 0.0
    has_draft: bool = True
    cache_bytes: float = 0.0  # cells with less KV say that it fits in cache
    liars: frozenset[str] = frozenset()
    hooks: dict[tuple[str, str], BaseException] = field(default_factory=dict)  # (cell, config): raised in its third round
    max_length: int = 8192
    calls: Counter = field(default_factory=Counter)

    @property
    def pair(self):
        def network(name, shape):
            float32 = SimpleNamespace(itemsize=4)
            return SimpleNamespace(
                name=name, shape=shape, dtype=float32, kv_dtype=float32, device=SimpleNamespace(type="cpu"),
                max_length=self.max_length,
            )

        draft = network("small", DRAFT) if self.has_draft else None
        return SimpleNamespace(name="world", target=network("large", TARGET), draft=draft, tokenizer=None)

    def open(self, workload: Workload):
        return SimpleNamespace(steps=lambda config, block=None: self._stream(workload, config, block))

    def rate(self, config: SpecConfig) -> float:
        """A wider window is accepted a little more often."""
        if config.view is None or config.view.max_tokens is None:
            return self.rates[config.drafter]
        return min(0.98, self.rates[config.drafter] * (1 + 0.02 * math.log2(config.view.max_tokens / 64)))

    def omega(self, config: SpecConfig) -> float:
        return sum(self.rate(config) ** i for i in range(config.depth + 1))

    def plain_s(self, cell: Cell) -> float:
        """A step of plain decoding at this context."""
        kv_bytes = cell.batch * (cell.length + 1) * TARGET.kv_bytes_per_token(4)
        return self.target(cell.batch, kv_bytes) + self._over(True, cell.batch)

    def _over(self, is_off: bool, batch: int) -> float:
        fixed, per_row = self.plain_overhead if is_off else self.overhead
        return fixed + per_row * batch

    def _stream(self, workload: Workload, config, block):
        config = config if isinstance(config, SpecConfig) else SpecConfig.parse(config)
        if config.tree is not None and not config.tree.is_chain:
            raise UnsupportedConfig(f"{config}: this world drafts chains")
        if config.drafter == "model" and not self.has_draft:
            raise UnsupportedConfig(f"{config}: no draft model is loaded")
        kv = TARGET.kv_bytes_per_token(4)
        fits = sum(map(len, workload.prompts)) * kv < self.cache_bytes
        header = builders.header(
            cell=workload.cell, config=str(config), workload=workload.name, block=block, labels=("KV fits in cache",) * fits,
            machine={"device": "TEST_2t", "cpu": "Test CPU", "threads": 2, "torch_device": "cpu"},
            versions={"torch": "2.13.0"}, temperature=workload.temperature, verifier=workload.verifier,
            target={"name": "large", "dtype": "float32", "kv_bytes_per_token": kv},
            draft={"name": "small", "kv_bytes_per_token": DRAFT.kv_bytes_per_token(4)} if self.has_draft else None,
            ceilings={"read_bytes_per_s": 16e9, "gemm_flops_per_s": 1.5e11},
        )  # fmt: skip
        return Stream(header, self._rounds(workload, config))

    def _rounds(self, workload: Workload, config: SpecConfig):
        cell, key = workload.cell, (str(workload.cell), str(config))
        self.calls[key] += 1
        noise = random.Random(f"{key}/{self.calls[key]}")
        places, index, start = [0] * cell.batch, 0, 0.0
        while min(places) < min(SLOTS, workload.max_new_tokens):
            if index == 2 and key in self.hooks:
                raise self.hooks.pop(key)
            step = self._round(cell, config, places, index, start, math.exp(noise.gauss(0, self.noise)))
            places = [p + len(t) for p, t in zip(places, step.tokens, strict=True)]
            start += step.wall_s
            index += 1
            yield step

    def _round(self, cell: Cell, config: SpecConfig, places, index: int, start: float, slow: float) -> StepRecord:
        batch, q, context = cell.batch, config.num_nodes + 1, [cell.length - 1 + p for p in places]
        accepted = tuple(self._accepted(config, index * batch + row) for row in range(batch))
        if config.drafter == "ngram" and index % 3 == 0:
            q, accepted = 1, (0,) * batch
        kv_bytes = sum(n + q for n in context) * TARGET.kv_bytes_per_token(4)
        draft_s, draft_bytes = self._draft(config, context)
        over = self._over(config.is_off, batch)
        lie = str(config) in self.liars
        tokens = [tuple(1000 * row + places[row] + i + lie for i in range(a + 1)) for row, a in enumerate(accepted)]
        verify = slow * self.target(batch * q, kv_bytes)
        parts = {
            "draft_s": slow * draft_s, "linear_s": 0.4 * verify, "attention_s": 0.6 * verify, "commit_s": 0.25 * over,
            "accept_s": 0.25 * over, "host_s": 0.5 * over,
        }  # fmt: skip
        return StepRecord(
            index=index, kind="round", config=str(config), start_s=start, wall_s=sum(parts.values()), **parts,
            cpu_s=sum(parts.values()), context_tokens=tuple(context), drafted=(q - 1,) * batch, accepted=accepted,
            tokens=tuple(tokens),
            censored=(False,) * batch, kv_read_bytes=int(kv_bytes), draft_kv_read_bytes=draft_bytes, query_tokens=q,
        )  # fmt: skip

    def _accepted(self, config: SpecConfig, turn: int) -> int:
        """Low-discrepancy draws: the mean of many rounds is the expectation."""
        if config.is_off:
            return 0
        even = (0.5 + 0.6180339887498949 * turn) % 1
        return sum(even < self.rate(config) ** depth for depth in range(1, config.depth + 1))

    def _draft(self, config: SpecConfig, context) -> tuple[float, int]:
        if config.drafter in ("off", "ngram"):
            return 0.0, 0
        shape = TARGET if config.drafter == "self" else DRAFT
        keys = sum(min(n + 1, config.view.max_tokens or n + 1) for n in context)
        read = keys * shape.kv_bytes_per_token(4)
        return config.depth * self.drafts[config.drafter](len(context), read), config.depth * read


def text(cell: Cell) -> Workload:
    """Prompts for the world: only their lengths matter."""
    return Workload("prose", ((1,) * cell.length,) * cell.batch, SLOTS, stop_at_eos=False)
