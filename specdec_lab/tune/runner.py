"""Blocks with a memory: a recorded block is not measured again, a measured one is on disk before anybody sees it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..records import Cell, Identity, SpecConfig, UnsupportedConfig, forced_label
from .blocks import (
    MIN_SCORED,
    OFF,
    Block,
    Clock,
    Measure,
    RunSample,
    first_difference,
    log_speedup,
    measure_block,
    run_once,
    summarize_runs,
)
from .db import Database, Design, Measurement, measurement_id
from .grid import Protocol
from .probe import parts_of

FINAL_FAILURES = ("infeasible", "oom", "mismatch")


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all measurements of a tuning run.

    run    names the run in ids and records; its folder holds the raw samples
    now    UTC, ISO 8601
    """

    run: str
    folder: Path
    identity: Identity
    workload: str
    temperature: float
    seed: int
    protocol: Protocol
    clock: Clock
    now: Callable[[], str]


class BlockRunner:
    """Gives blocks of (cell, configuration), recorded or freshly measured; failures are records too."""

    def __init__(self, measure: Measure, database: Database, setting: Setting) -> None:
        self._measure, self._database, self._set = measure, database, setting
        self._warm: dict[tuple[Cell, SpecConfig], dict[str, float]] = {}
        self._patience = setting.protocol.busy_retries
        kinds = ("off", *setting.identity.drafters)
        base = setting.identity.base_fingerprint
        self._fp_of = {kind: f"{base}.{setting.identity.drafter_fingerprint(kind)}" for kind in kinds}
        self._failed: dict[tuple[Cell, str], Measurement] = {}
        for record in database:
            if self.is_ours(record) and self._is_final(record):
                self._failed[record.cell, record.config] = record

    def prepare(self, cell: Cell, seconds: float) -> Measurement:
        """Warm the cell up with plain decoding and record how fast that is; status says whether the cell can run."""
        blank = self._blank(cell, OFF, "sentinel", 0)
        known = self._database.find(blank.key)
        try:
            warm = self._warm_up(cell, OFF)
            if known is not None and known.status == "ok":
                return known
            sample = run_once(self._measure, cell, OFF, 2 * seconds, self._set.protocol, self._set.clock)
        except UnsupportedConfig as error:
            return self._record(replace(blank, status="infeasible", reason=str(error)))
        except MemoryError as error:
            return self._record(replace(blank, status="oom", reason=str(error) or "out of memory"))
        return self._record(replace(blank, summary=summarize_runs([sample]), warm=warm, env=self._env(sample.labels)))

    def block(self, cell: Cell, config: SpecConfig, kind: str, index: int, seconds: float) -> Measurement:
        """Block `index` of this kind: the recorded one, or four runs of about `seconds` each."""
        if failed := self._failed.get((cell, str(config))):
            return failed
        blank = self._blank(cell, config, kind, index)
        known = self._database.find(blank.key)
        if known is not None and known.status == "ok":
            return known
        try:
            record = self._fresh(blank, cell, config, seconds)
        except UnsupportedConfig as error:
            record = self._record(replace(blank, status="infeasible", reason=str(error)))
        except MemoryError as error:
            record = self._record(replace(blank, status="oom", reason=str(error) or "out of memory"))
        if record.status in FINAL_FAILURES:
            self._failed[cell, str(config)] = record
        return record

    def probe(self, cell: Cell, config: SpecConfig, seconds: float) -> Measurement:
        """One run on its own for its parts: up to three records, of which the first is returned, or why there are none."""
        if failed := self._failed.get((cell, str(config))):
            return failed
        blank = self._blank(cell, config, "verify", 0)
        known = self._database.find(blank.key)
        if known is not None and known.status == "ok":
            return known
        try:
            warm = self._warm_up(cell, config)
            sample = run_once(self._measure, cell, config, seconds, self._set.protocol, self._set.clock)
        except UnsupportedConfig as error:
            record = self._record(replace(blank, status="infeasible", reason=str(error)))
        except MemoryError as error:
            record = self._record(replace(blank, status="oom", reason=str(error) or "out of memory"))
        else:
            return self._record_parts(cell, config, sample, warm)
        self._failed[cell, str(config)] = record
        return record

    def _record_parts(self, cell: Cell, config: SpecConfig, sample: RunSample, warm: dict[str, float]) -> Measurement:
        is_busy = 2 * sum("busy" in step.flags for step in sample.scored) > len(sample.scored)
        env = self._env(sample.labels, is_busy)
        records = [
            replace(self._blank(cell, config, kind, 0), summary=summary, env=env, warm=warm)
            for kind, summary in parts_of(config, sample.scored).items()
        ]
        self._database.append(*records)
        return records[0]

    def _fresh(self, blank: Measurement, cell: Cell, config: SpecConfig, seconds: float) -> Measurement:
        """Measure until a block is not busy; every attempt is recorded. A machine that stays busy is not waited for."""
        protocol, clock = self._set.protocol, self._set.clock
        self._warm_up(cell, OFF)
        warm = self._warm_up(cell, config)
        while True:
            block = measure_block(self._measure, cell, config, seconds, protocol, clock, blank.design.block)
            if not block.is_busy:
                self._patience = protocol.busy_retries
            if not block.is_busy or not self._patience:
                return self._record_block(blank, block, warm)
            self._patience -= 1
            self._record_block(replace(blank, status="throttled", reason="the machine was busy; measured again"), block, warm)
            blank = self._blank(cell, config, blank.kind, blank.design.block)

    def _warm_up(self, cell: Cell, config: SpecConfig) -> dict[str, float]:
        """Read prompts, compile and touch what the first use compiles and touches, outside the scored runs."""
        if (cell, config) not in self._warm:
            started = self._set.clock()
            shortest = replace(self._set.protocol, min_rounds=MIN_SCORED)
            sample = run_once(self._measure, cell, config, 0.0, shortest, self._set.clock)
            self._warm[cell, config] = {"seconds": self._set.clock() - started, "rounds": len(sample.scored)}
        return self._warm[cell, config]

    def _record_block(self, blank: Measurement, block: Block, warm: dict[str, float]) -> Measurement:
        """Two lines, plain decoding and the candidate, joined by `pair_of`."""
        plain_id = measurement_id("plain of", blank.id)
        raw = self._keep_raw(blank.id, block)
        design = replace(blank.design, order=block.order)
        shared: dict[str, Any] = {"env": self._env(block.labels, block.is_busy), "raw_sha256": raw}
        plain = replace(
            blank, id=plain_id, config="off", fp=self._fp_of["off"], design=design,
            summary=summarize_runs(block.plain), **shared,
        )  # fmt: skip
        value, error = log_speedup(block)
        summary = {**summarize_runs(block.candidate), "log_speedup": value, "log_speedup_se": error}
        ours = replace(blank, design=replace(design, pair_of=plain_id), summary=summary, warm=warm, **shared)
        is_comparable = self._set.temperature == 0 and forced_label(block.labels) is None  # forced drafts are emitted unseen
        wrong = first_difference(block.plain, block.candidate) if is_comparable else None
        if wrong:
            ours = replace(ours, status="mismatch", reason=wrong)
        self._database.append(plain, ours)
        return ours

    def _record(self, measurement: Measurement) -> Measurement:
        self._database.append(measurement)
        return measurement

    def _blank(self, cell: Cell, config: SpecConfig, kind: str, index: int) -> Measurement:
        """The record of an experiment before its result; a second attempt gets its own id."""
        fixed, design = self._set, Design(index, seed=self._set.seed, prompts=self._set.workload)
        fp = self._fp_of[config.drafter]
        key = (fixed.run, fp, fixed.workload, fixed.temperature, cell, config, kind, index)
        attempt = 0
        while (identifier := measurement_id(*key, attempt)) in self._database or self._has_plain(identifier):
            attempt += 1
        return Measurement(identifier, kind, fixed.run, fp, fixed.workload, fixed.temperature, cell, str(config), design)

    def _has_plain(self, identifier: str) -> bool:
        return measurement_id("plain of", identifier) in self._database

    def is_ours(self, record: Measurement) -> bool:
        """Whether a record may be pooled with those of this run: same fingerprint, workload and temperature."""
        ours = (self._set.workload, self._set.temperature)
        kind = SpecConfig.parse(record.config).drafter
        return (record.workload, record.temperature) == ours and record.fp == self._fp_of.get(kind)

    def _is_final(self, record: Measurement) -> bool:
        """Wrong tokens are wrong for ever; what did not fit or run is tried again by another run."""
        is_final = record.config != "off" and record.status in FINAL_FAILURES
        return is_final and (record.status == "mismatch" or record.run == self._set.run)

    def _env(self, labels: tuple[str, ...], is_busy: bool = False) -> dict[str, Any]:
        return {"utc": self._set.now(), "busy": is_busy, "labels": list(labels)}

    def _keep_raw(self, identifier: str, block: Block) -> str | None:
        """Every scored round of a block, in the run's folder; the sha256 goes into the record."""
        lines = [json.dumps(step.to_dict(), separators=(",", ":")) for run in block.runs for step in run.scored]
        data = gzip.compress("\n".join(lines).encode(), compresslevel=1, mtime=0)
        with suppress(OSError):  # the record is the evidence; a full disk speaks up when the record is appended
            path = self._set.folder / "raw" / f"{identifier}.jsonl.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            return hashlib.sha256(data).hexdigest()
        return None
