"""Paced synthetic streams for browser tests: a made-up machine whose costs follow the textbook, none of them measured."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

from specdec_lab.records import Cell, RunHeader, SpecConfig, StepRecord
from specdec_lab.stream import Stream

LABELS = ("forced", "KV fits in cache")


def header(cell: str, config: str, block: int | None = None) -> RunHeader:
    """A header whose every word says that nothing was measured."""
    return RunHeader(
        run_id=f"{cell}-{config}-{block}",
        created="2026-01-02T03:04:05Z",
        cell=Cell.parse(cell),
        config=config,
        workload="synthetic",
        target={"name": "synthetic-target"},
        draft=None,
        backend="sdpa",
        refused={"triton": "no CUDA device"},
        machine={"device": "SYNTHETIC"},
        versions={"python": "3"},
        commit="unknown",
        seed=0,
        temperature=0.0,
        verifier="rejection",
        instrumented=True,
        ceilings={"read_bytes_per_s": 2.1e10},
        labels=LABELS,
        block=block,
    )


def rounds(cell: str, config: str, count: int, seed: int, start: int = 0) -> Iterator[StepRecord]:
    """Rounds that cost and accept what a seeded model says."""
    dice = random.Random(f"{cell}{config}{seed}")
    batch, length = Cell.parse(cell).batch, Cell.parse(cell).length
    depth = SpecConfig.parse(config).depth
    for i in range(count):
        context = length + start + i * (1 + 0.7 * depth)
        floor = batch * context * 4e-7 * (1 + 0.02 * depth)
        noise = dice.lognormvariate(0, 0.05) * (4 if dice.random() < 0.01 else 1)
        attention, linear = floor * (1.25 + 0.1 * dice.random()) * noise, 2.4e-3 * (1 + 0.06 * depth) * noise
        draft, host = (
            depth * (5e-5 if config.startswith("ngram") else 0.9e-3) * noise,
            1.2e-4 * dice.lognormvariate(0, 0.3),
        )
        commit, accept = 6e-5 * batch**0.5, (2e-4 if depth else 5e-5)
        accepted = tuple(
            next((n for n in range(depth) if dice.random() > (0.6 if config.startswith("ngram") else 0.8)), depth)
            for _ in range(batch)
        )
        parts = {
            "draft_s": draft,
            "linear_s": linear,
            "attention_s": attention,
            "commit_s": commit,
            "accept_s": accept,
            "host_s": host,
        }
        yield StepRecord(
            index=i,
            kind="round",
            config=config,
            start_s=float(i),
            wall_s=sum(parts.values()),
            **parts,
            cpu_s=0.0,
            context_tokens=(round(context),) * batch,
            drafted=(depth,) * batch,
            accepted=accepted,
            tokens=tuple(tuple(range(n + 1)) for n in accepted),
            censored=(False,) * batch,
            kv_floor_s=floor,
            kv_read_bytes=round(floor * 2.1e10),
        )


def stream(cell: str, config: str, count: int, *, block: int | None = None, pace_s: float = 0.0) -> Stream:
    """One stream that hands out a step every `pace_s` seconds."""

    def paced() -> Iterator[StepRecord]:
        for step in rounds(cell, config, count, seed=block or 0):
            if pace_s:
                time.sleep(pace_s)
            yield step

    return Stream(header(cell, config, block), paced())


def profile(cells: list[str], configs: list[str], *, blocks: int, count: int, pace_s: float = 0.0) -> Iterator[Stream]:
    """Interleaved blocks, as the profiler runs them."""
    for cell in cells:
        for block in range(blocks):
            for config in configs:
                yield stream(cell, config, count, block=block, pace_s=pace_s)


def fallen_back(cell: str, draft: str, stand_in: str, at: int, count: int, *, pace_s: float = 0.0) -> Stream:
    """One stream of a policy that gives up on `draft` before round `at`."""

    def steps() -> Iterator[StepRecord]:
        for i, step in enumerate([*rounds(cell, draft, at, seed=1), *rounds(cell, stand_in, count - at, seed=1, start=at)]):
            if pace_s:
                time.sleep(pace_s)
            flags = (*step.flags, f"fell back from {draft}") if i == at else step.flags
            yield replace(step, index=i, flags=flags)

    return Stream(header(cell, "policy"), steps())
