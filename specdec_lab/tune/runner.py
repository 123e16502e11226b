"""Blocks with a memory: a recorded block is not measured again, a measured one is on disk before anybody sees it."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
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
    RunSample,
    first_difference,
    log_speedup,
    order_of,
    sides,
    summarize_runs,
)
from .db import Database, Design, Measurement, measurement_id
from .grid import Protocol
from .probe import KINDS as PARTS
from .probe import parts_of
from .workers import Executor, WorkerLost, WorkItem

FINAL_FAILURES = ("infeasible", "oom", "mismatch")
LOST = ("crashed", "timeout")
FAILURES = (*FINAL_FAILURES, *LOST)
MAX_LOSSES = 3  # of workers by one configuration in one cell; then it is left alone


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all measurements of a tuning run.

    run    names the run in ids and records; its folder holds the raw samples
    now    UTC, ISO 8601
    remeasure  nothing that other runs have recorded is used
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
    remeasure: bool = False


class BlockRunner:
    """Gives blocks of (cell, configuration), recorded or freshly measured; failures are records too.

    sentinels  id of the last good one of each worker; whatever it measures carries it
    fresh      ids of what was measured by this object
    """

    def __init__(self, executor: Executor, database: Database, setting: Setting) -> None:
        self._executor, self._database, self._set = executor, database, setting
        self._warm: dict[tuple[Cell, SpecConfig, int], dict[str, float]] = {}
        self._patience = dict.fromkeys(executor.names, setting.protocol.busy_retries)
        self.sentinels: dict[str, str] = {}
        self.fresh: set[str] = set()
        kinds = ("off", *setting.identity.drafters)
        base = setting.identity.base_fingerprint
        self._fp_of = {kind: f"{base}.{setting.identity.drafter_fingerprint(kind)}" for kind in kinds}
        self._failed: dict[tuple[Cell, str], Measurement] = {}
        self._losses: Counter[tuple[Cell, str]] = Counter()
        for record in database:
            if self.is_ours(record):
                self._remember_failure(record)

    def prepare(self, cell: Cell, seconds: float) -> Measurement:
        """Warm the cell up with plain decoding and record how fast that is; status says whether the cell can run."""

        def work(blank: Measurement) -> Measurement:
            warm = self._warm_up(cell, OFF)
            known = self._find(blank)
            if known is not None and known.status == "ok":
                return known
            (sample,) = self._run(cell, [OFF], 2 * seconds)
            env = self._env(blank, sample.labels)
            return self._record(replace(blank, summary=summarize_runs([sample]), warm=warm, env=env))

        return self._attempt(cell, OFF, "sentinel", 0, work)

    def plain(self, cell: Cell, seconds: float, runs: int = 1) -> RunSample:
        """Plain decoding of a cell that is prepared, the middle one of so many runs; nothing is recorded."""
        self._warm_up(cell, OFF)
        return self._run(cell, [OFF] * runs, 2 * seconds)[runs // 2]

    def may_measure(self, cell: Cell, worker: int) -> bool:
        """Whether this worker has the cell, or takes it now because nobody has."""
        if not self._executor.is_free_for(cell, worker):
            return False
        self._executor.assign(cell, worker)
        return True

    def record_sentinel(
        self, cell: Cell, sample: RunSample, *, status: str = "ok", reason: str = "", pair_of: str | None = None,
        env: Mapping[str, Any] | None = None, **summary: Any,
    ) -> Measurement:  # fmt: skip
        """Plain decoding of a cell, once more, as a record of its own."""
        index = 1 + sum(m.kind == "sentinel" and m.cell == cell and self.is_ours(m) for m in self._database)
        blank = self._blank(cell, OFF, "sentinel", index)
        about = {**self._env(blank, sample.labels), **(env or {})}
        about.pop("sentinel", None)  # it is one
        return self._record(replace(
            blank, status=status, reason=reason, design=replace(blank.design, pair_of=pair_of),
            summary={**summarize_runs([sample]), **summary}, env=about,
        ))  # fmt: skip

    def open_sentinel(self, worker: str, cells: Collection[Cell]) -> Measurement | None:
        """The sentinel since which an earlier call of this run measured with this worker, if no other has followed it.

        cells  of this run's plan: another shard's worker may have the same name
        """
        before = (m for m in self._database.standing() if m.id not in self.fresh and m.cell in cells)
        mine = [m for m in before if (m.run, m.worker) == (self._set.run, worker)]
        followed = {m.design.pair_of for m in mine if m.kind == "sentinel"}
        used = [m.env["sentinel"] for m in mine if "sentinel" in m.env]
        last = used[-1] if used and used[-1] not in followed else None
        return next((m for m in mine if m.id == last and m.status == "ok"), None)

    def block(self, cell: Cell, config: SpecConfig, kind: str, index: int, seconds: float) -> Measurement:
        """Block `index` of this kind: the recorded one, or four runs of about `seconds` each."""
        return self.known(cell, config, kind, index) or self._attempt(
            cell, config, kind, index, lambda blank: self._fresh(blank, cell, config, seconds)
        )

    def probe(self, cell: Cell, config: SpecConfig, seconds: float) -> Measurement:
        """One run on its own for its parts: up to three records, of which the first is returned, or why there are none."""

        def work(blank: Measurement) -> Measurement:
            warm = self._warm_up(cell, config)
            (sample,) = self._run(cell, [config], seconds)
            return self._record_parts(cell, config, sample, warm)

        return self.known(cell, config, "verify", 0) or self._attempt(cell, config, "verify", 0, work)

    def known(self, cell: Cell, config: SpecConfig, kind: str, index: int) -> Measurement | None:
        """What is recorded of an experiment, or why it is not made."""
        if failed := self._failed.get((cell, str(config))):
            return failed
        blank = self._blank(cell, config, kind, index)
        known = self._find(blank)
        if known is not None and known.status == "ok":
            return known
        if larger_than := self._too_large(cell, config):
            reason = f"not measured: {larger_than} ran out of memory here, with a view and a tree that are no larger"
            return replace(blank, status="oom", reason=reason)
        return None

    def _find(self, blank: Measurement) -> Measurement | None:
        return self._database.find(blank.key, self._set.run if self._set.remeasure else None)

    def _too_large(self, cell: Cell, config: SpecConfig) -> str | None:
        """The configuration that failed for memory in this cell and needs no more of it than this one."""
        for (where, spelling), record in self._failed.items():
            if where == cell and record.status == "oom" and _needs_no_more(SpecConfig.parse(spelling), config):
                return spelling
        return None

    def _attempt(
        self, cell: Cell, config: SpecConfig, kind: str, index: int, work: Callable[[Measurement], Measurement]
    ) -> Measurement:
        """What `work` records, or why it could not. With a lost worker it is done again by a fresh one, a few times."""
        lost_id = None
        while True:
            try:
                record = work(self._blank(cell, config, kind, index, lost_id))
                self._remember_failure(record)  # wrong tokens
                return record
            except UnsupportedConfig as error:
                status, reason = "infeasible", str(error)
            except MemoryError as error:
                status, reason = "oom", str(error) or "out of memory"
            except WorkerLost as lost:
                status, reason = lost.status, str(lost)
            blank = self._blank(cell, config, kind, index, lost_id)
            record = self._record(replace(blank, status=status, reason=reason))
            self._remember_failure(record)
            if status not in LOST or self._losses[cell, str(config)] >= MAX_LOSSES:
                return record
            lost_id = record.id

    def _remember_failure(self, record: Measurement) -> None:
        key = record.cell, record.config
        if record.status in LOST and record.run == self._set.run:
            self._losses[key] += 1
        if self._is_final(record) and record.config != "off":
            self._failed[key] = record

    def _run(self, cell: Cell, configs: Sequence[SpecConfig], seconds: float) -> tuple[RunSample, ...]:
        """Runs by the cell's worker, which may take what they shall last and what they took to warm up."""
        life = self._executor.life(cell)
        predicted = sum(seconds + self._warm[cell, config, life]["seconds"] for config in configs)
        return self._executor.run(WorkItem(cell, tuple(configs), seconds, self._set.protocol), predicted)

    def _record_parts(self, cell: Cell, config: SpecConfig, sample: RunSample, warm: dict[str, float]) -> Measurement:
        is_busy = 2 * sum("busy" in step.flags for step in sample.scored) > len(sample.scored)
        blanks = {kind: self._blank(cell, config, kind, 0) for kind in PARTS}
        records = [
            replace(blanks[kind], summary=summary, env=self._env(blanks[kind], sample.labels, is_busy), warm=warm)
            for kind, summary in parts_of(config, sample.scored).items()
        ]
        self._keep(*records)
        return records[0]

    def _fresh(self, blank: Measurement, cell: Cell, config: SpecConfig, seconds: float) -> Measurement:
        """Measure until a block is not busy; every attempt is recorded. A machine that stays busy is not waited for."""
        index, worker = blank.design.block, blank.worker
        self._warm_up(cell, OFF)
        warm = self._warm_up(cell, config)
        while True:
            order = order_of(index)
            block = Block.of(order, self._run(cell, sides(order, config), seconds))
            if not block.is_busy:
                self._patience[worker] = self._set.protocol.busy_retries
            if not block.is_busy or not self._patience[worker]:
                return self._record_block(blank, block, warm)
            self._patience[worker] -= 1
            self._record_block(replace(blank, status="throttled", reason="the machine was busy; measured again"), block, warm)
            blank = self._blank(cell, config, blank.kind, index)

    def _warm_up(self, cell: Cell, config: SpecConfig) -> dict[str, float]:
        """Read prompts, compile and touch what the first use compiles and touches, outside the scored runs.

        Once in the life of a worker: a fresh one has read and compiled nothing.
        """
        if known := self._warm.get((cell, config, self._executor.life(cell))):
            return known
        started = self._set.clock()
        shortest = replace(self._set.protocol, min_rounds=MIN_SCORED)
        (sample,) = self._executor.run(WorkItem(cell, (config,), 0.0, shortest), None)
        warm = {"seconds": self._set.clock() - started, "rounds": len(sample.scored)}
        self._warm[cell, config, self._executor.life(cell)] = warm
        return warm

    def _record_block(self, blank: Measurement, block: Block, warm: dict[str, float]) -> Measurement:
        """Two lines, plain decoding and the candidate, joined by `pair_of`."""
        plain_id = measurement_id("plain of", blank.id)
        raw = self._keep_raw(blank.id, block)
        design = replace(blank.design, order=block.order)
        shared: dict[str, Any] = {"env": self._env(blank, block.labels, block.is_busy), "raw_sha256": raw}
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
        self._keep(plain, ours)
        return ours

    def _record(self, measurement: Measurement) -> Measurement:
        self._keep(measurement)
        return measurement

    def _keep(self, *measurements: Measurement) -> None:
        self._database.append(*measurements)
        self.fresh |= {m.id for m in measurements}

    def _blank(
        self, cell: Cell, config: SpecConfig, kind: str, index: int, retry_of: str | None = None
    ) -> Measurement:
        """The record of an experiment before its result; a second attempt gets its own id."""
        fixed, design = self._set, Design(index, seed=self._set.seed, prompts=self._set.workload, retry_of=retry_of)
        fp = self._fp_of[config.drafter]
        key = (fixed.run, fp, fixed.workload, fixed.temperature, cell, config, kind, index)
        attempt = 0
        while (identifier := measurement_id(*key, attempt)) in self._database or self._has_plain(identifier):
            attempt += 1
        worker = self._executor.names[self._executor.home(cell)]
        return Measurement(
            identifier, kind, fixed.run, fp, fixed.workload, fixed.temperature, cell, str(config), design, worker=worker
        )

    def _has_plain(self, identifier: str) -> bool:
        return measurement_id("plain of", identifier) in self._database

    def is_ours(self, record: Measurement) -> bool:
        """Whether a record may be pooled with those of this run: same fingerprint, workload and temperature."""
        if self._set.remeasure and record.run != self._set.run:
            return False
        ours = (self._set.workload, self._set.temperature)
        kind = SpecConfig.parse(record.config).drafter
        return (record.workload, record.temperature) == ours and record.fp == self._fp_of.get(kind)

    def _is_final(self, record: Measurement) -> bool:
        """Wrong tokens are wrong for ever; what did not fit or run, or lost too many workers, is tried again by another run."""
        if record.status in LOST:
            return self._losses[record.cell, record.config] >= MAX_LOSSES
        return record.status in FINAL_FAILURES and (record.status == "mismatch" or record.run == self._set.run)

    def _env(self, blank: Measurement, labels: tuple[str, ...], is_busy: bool = False) -> dict[str, Any]:
        num_workers, sentinel = len(self._executor.names), self.sentinels.get(blank.worker)
        return {
            "utc": self._set.now(), "busy": is_busy, "labels": list(labels),
            **({"concurrency": num_workers} if num_workers > 1 else {}), **({"sentinel": sentinel} if sentinel else {}),
        }  # fmt: skip

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


def _needs_no_more(small: SpecConfig, large: SpecConfig) -> bool:
    """Whether the second takes at least the memory of the first: same drafter, a view and a tree that are no smaller."""
    if small.drafter != large.drafter:
        return False
    views = [math.inf if c.view is None or c.view.max_tokens is None else c.view.max_tokens for c in (small, large)]
    return views[0] <= views[1] and small.num_nodes <= large.num_nodes
