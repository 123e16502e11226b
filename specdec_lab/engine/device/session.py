"""A session whose rounds run on the device: whole rounds are played, one after the other, and read every few rounds.

Same face and same tokens as engine/session.Session, of which it is one: texts, prompts and limits are handled there, on the
host, between turns. Rounds go in *flights* of up to ROUNDS_PER_READ. While the host reads one flight, the next is already
running, so the device waits for nobody. What follows from that:

- `live` and `mean_length` are those of the next record to be handed out; a choice of configuration takes effect at most two
  flights later, and every record says which configuration it ran.
- A flight is no longer than rows certainly need, so without an end-of-text token no round is played in vain. With one, rounds
  may run after the last row has ended: they emit nothing, are no records, and the last record books their time as host time.
- What a SnapKV view lists lies in a buffer per budget. It is chosen by the host (engine/snapkv.py), between flights: no flight
  goes beyond the round before which a session on the host would choose again; there the session lands, chooses and hands over.
  Choosing is booked to drafting, as a draft model's catching up is.
- n-gram chains are found in the text by the device. A row without a match verifies padding and emits the one token that it
  emits on the host. Where no row has a match the host would run a plain round; the device, which cannot branch, verifies all
  the same, and such a record counts the bytes and FLOPs of that.
- n-gram trees are filled in on the host: their rounds run there, as in any session, after the device is done, and their times
  are the host's, which waits for the device at every mark.

WHAT A GPU RUN MUST CHECK FIRST, in this order; none of it could be run where this was written:
1. `Engine(load("demo", device="cuda"), rounds="device")`: greedy tokens of off, self, model and n-gram chains, a tree and
   SnapKV views equal those of `rounds="host"` in float32, for ragged batches; then coupled and rejection at T = 0.8.
2. Capture succeeds for every drafter and verifier. If it fails, CUDA names an operation that synchronises: run
   `rounds="eager"` under `torch.cuda.set_sync_debug_mode("error")`, which points to the line.
3. Replays advance: `number` counts them, and the tokens of captured and eager rounds are equal.
4. Stamps rise within a round, their tick is below 2 us (a table of 1,000 consecutive stamps), and the sum of a run's wall times
   is within 1% of the host's, consumer excluded; attention lies inside its forwards (no flag "attention-above-forward").
5. `DeviceSession.capture_s`, and `torch.cuda.memory_reserved` after captures against plan.MemoryPlan.

Not known here: what a round does (round.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ...records import KvView, SpecConfig, StepRecord, UnsupportedConfig
from ...workload import Workload
from ..attention import AttentionBackend
from ..batch import Batch
from ..calibrate import Ceilings
from ..clocks import Clock
from ..drafters import DraftCost
from ..forced import Forced
from ..models.fast_llama import FastLlama
from ..models.loading import ModelPair
from ..session import Session
from ..snapkv import NEVER, Lists
from ..threads import Threads
from .booking import Prepared, record_of, with_idle
from .deciding import Deciding, TorchDeciding
from .flights import FLIGHTS, ROUNDS_PER_READ, Flight, certain_rounds
from .forced_deciding import ForcedDeciding
from .forward import Net
from .graphs import CapturedPlayers, EagerPlayers, Players
from .kernel_deciding import KernelDeciding
from .ops import Ops, TritonOps
from .program import Key, Program, key_of
from .readings import HostPost, PinnedPost, Post, Reading, SyncedNow, end_ns, readings, start_ns
from .round import Stage
from .state import EMITTED, KNOWN, LIVE, TOKENS, DeviceState


class DeviceSession(Session):
    """A session with rounds on the device. Use Engine.open.

    captured  whether rounds are CUDA graphs, or run anew each time
    synced    the time of `clock`, told to wait for the device only while the host works on the batch
    """

    def __init__(
        self, pair: ModelPair, backend: AttentionBackend, draft_backend: AttentionBackend | None, workload: Workload,
        clock: Clock, ceilings: Ceilings, threads: Threads, forced: Forced | None = None, *, ops: Ops, captured: bool,
        instrumented: bool = True, synced: SyncedNow | None = None, rounds_per_read: int = ROUNDS_PER_READ,
        cuda: Any = torch.cuda, now: Callable[[], int] = time.perf_counter_ns,
    ) -> None:  # fmt: skip
        self._flights: deque[Flight] = deque()
        self._ready: deque[StepRecord] = deque()
        self._ready_live: deque[tuple[bool, ...]] = deque()
        self._is_stale, self._has_flown, self._flown = True, False, SpecConfig.off()
        self._window, self._rounds_given, self._last_end_ns, self._captured_s = (-1, -1), 0, 0, 0.0
        self._prepared = Prepared()
        self._listed: dict[int, Lists] = {}  # what the buffers of the stage hold
        super().__init__(pair, backend, draft_backend, workload, clock, ceilings, threads, forced)
        self._ops, self._now, self._synced, self._rounds_per_read = ops, now, synced, rounds_per_read
        layers = max(runner.shape.layers for runner in (pair.target, pair.draft) if runner is not None)
        batch = self._batch
        self._state = DeviceState.of(batch.ids, sorted(self._eos), workload.max_new_tokens, rounds_per_read, layers)
        self._programs: dict[Key, Program] = {}
        assert isinstance(pair.target, FastLlama)
        deciding = _deciding(batch, ops)
        deciding = deciding if forced is None else ForcedDeciding(deciding, forced, batch.noise)
        self._stage = Stage(self._state, Net.of(pair.target, self._cache.kv), None, ops, deciding, instrumented)
        self._players: Players = CapturedPlayers(self._stage, cuda) if captured else EagerPlayers(self._stage, "eager")
        on_cuda = pair.target.device.type == "cuda"
        self._post: Post = PinnedPost(self._state.log, FLIGHTS, cuda) if on_cuda else HostPost()

    @property
    def live(self) -> int:
        """Rows that emit in the next record, or still emit where none is at hand."""
        return sum(self._ready_live[0]) if self._ready_live else super().live

    @property
    def mean_length(self) -> float:
        """Mean context of those rows, in tokens."""
        if not self._ready:
            return super().mean_length
        lengths = [n + 1 for n, on in zip(self._ready[0].context_tokens, self._ready_live[0], strict=True) if on]
        return sum(lengths) / max(len(lengths), 1)

    @property
    def capture_s(self) -> float:
        """Seconds that captures took so far; in no record."""
        return self._players.capture_s

    def check(self, config: SpecConfig) -> None:
        """See Session.check; also what the operations on the device take."""
        super().check(config)
        if self._runs_here(config) and config.num_nodes + 1 > self._ops.max_queries:
            raise UnsupportedConfig(
                f"{config}: the {self._ops.name} operations verify up to {self._ops.max_queries} tokens of a row at once, root "
                f"counted, not {config.num_nodes + 1}. Use fewer nodes, or Engine(rounds='host')."
            )

    def round(self, config: SpecConfig) -> StepRecord:
        """The next record: of a flight that was read, or read now. See the module for which configuration it ran."""
        with torch.inference_mode():
            if not self._ready and (self._flights or self._runs_here(config)):
                self._fly(config)
        if not self._ready:
            self._land()
            return super().round(config)
        self._ready_live.popleft()
        return self._ready.popleft()

    def prefill(self, config: SpecConfig | None) -> StepRecord | None:
        """See Session.prefill. The device takes over from what the host knows then."""
        self._land()
        return super().prefill(config)

    def rewind(self) -> None:
        """See Session.rewind."""
        self._abandon()
        super().rewind()

    def _append(self, texts: tuple[tuple[int, ...], ...]) -> None:
        self._abandon()
        super()._append(texts)

    def _abandon(self) -> None:
        """Wait for rounds under way and forget them; the host's state is what counts."""
        while self._flights:
            self._flights.popleft().letter.open()
        self._ready.clear()
        self._ready_live.clear()
        self._is_stale, self._prepared = True, Prepared()

    def _land(self) -> None:
        """The host works on the batch next: its tensors follow what was read, its clock starts anew, the device waits."""
        if self._synced is not None:
            self._synced.waits = True
        if not self._has_flown:
            return
        batch = self._batch
        batch.set_live(list(batch.host_live))
        batch.lengths = torch.tensor(batch.host_lengths, device=batch.lengths.device)
        self._cache.committed = batch.lengths - 1
        self._forget_drafts()
        self._clock.lap()
        self._has_flown, self._is_stale = False, True

    @staticmethod
    def _runs_here(config: SpecConfig) -> bool:
        return config.drafter != "ngram" or config.is_chain

    def _read_text(self, config: SpecConfig) -> None:
        """Nothing, where the device looks for n-grams itself."""
        if not self._runs_here(config):
            super()._read_text(config)

    def _fly(self, config: SpecConfig) -> None:
        """Keep the device busy with `config`, and read the oldest flight. A flight of another configuration is read first."""
        asked = self._now()
        if not self._flights and (self._is_stale or config != self._flown or self._left(config) <= 0):
            self._hand_over(config)
        while len(self._flights) < FLIGHTS and (not self._flights or self._flights[-1].config == config):
            rounds = self._certain(config)
            if not rounds:
                break
            self._flights.append(self._launch(config, rounds, asked))
        self._read(self._flights.popleft())

    def _certain(self, config: SpecConfig) -> int:
        """Rounds that some row certainly needs beyond those under way, at most a flight's; at least 1 if none is under way."""
        wanted = max(
            self._workload.max_new_tokens - emitted
            for emitted, live in zip(self._progress.emitted, self._batch.host_live, strict=True) if live
        )
        return certain_rounds(min(wanted, self._left(config)), config, self._flights, self._rounds_per_read)

    def _left(self, config: SpecConfig) -> int:
        """Tokens that a row may commit before the host must choose lists again."""
        listed = _snapkv(config)
        return NEVER if listed is None else self._self.snapkv.left(self._batch, listed)

    def _hand_over(self, config: SpecConfig) -> None:
        """Let the device start from what the host knows."""
        batch = self._batch
        known = committed = [n - 1 for n in batch.host_lengths]
        if (listed := _snapkv(config)) is not None:
            self._choose_lists(config, listed)
        if config.drafter == "model":
            self._catch_up(config)
            assert self._model is not None
            known = self._model.known
        self._state.put(committed, batch.host_live, self._progress.emitted, known)
        if self._synced is not None:
            self._synced.waits = False
        self._is_stale, self._has_flown, self._flown, self._last_end_ns = False, True, config, 0

    def _catch_up(self, config: SpecConfig) -> None:
        """Let the draft model read what rounds of other drafters committed; the next record is charged."""
        drafter = self._drafter(config)
        assert drafter is self._model
        assert self._model is not None
        if self._model.lag(self._batch) <= 1:
            return
        model = self._model
        self._prepare(lambda: model.catch_up(self._batch, config, self._clock))

    def _choose_lists(self, config: SpecConfig, view: KvView) -> None:
        """Bring what `view` lists into its buffer; the next record is charged where that took a forward."""
        self._prepare(lambda: self._self.choose(self._batch, config, self._clock))
        lists, _ = self._self.snapkv.lists(self._batch, view)  # as just chosen
        if view.budget not in self._stage.lists:
            self._stage.lists[view.budget] = torch.empty_like(lists.index)
        if self._listed.get(view.budget) is not lists:
            self._stage.lists[view.budget].copy_(lists.index)
            self._listed[view.budget] = lists

    def _prepare(self, work: Callable[[], DraftCost]) -> None:
        """What the host does for the next drafts, on the batch as it was read; charged to the next record."""
        self._land()
        start = self._now()
        cost = work()
        if self._synced is not None:
            self._synced.synchronize()
        self._prepared = Prepared(cost.forwards, self._now() - start)

    def _launch(self, config: SpecConfig, rounds: int, asked: int) -> Flight:
        program = self._program(config)
        player = self._players.of(program)  # captured here, if it is new: capture_s, no part of waiting
        captured_ns, self._captured_s = int((self.capture_s - self._captured_s) * 1e9), self.capture_s
        if (window := _window_of(config)) != self._window:
            self._state.put_window(*window)
            self._window = window
        waited = max(self._now() - asked - captured_ns - self._prepared.ns, 0)
        first, self._rounds_given = self._rounds_given, self._rounds_given + rounds
        for _ in range(rounds):
            player.play()
        return Flight(config, program, player, first, rounds, self._post.send(self._state.log), waited)

    def _program(self, config: SpecConfig) -> Program:
        key = key_of(config)
        if key not in self._programs:
            self._programs[key] = Program.of(config, self._state.ids.device)
        if config.drafter == "model" and self._stage.draft is None:
            assert self._model is not None
            assert isinstance(self._pair.draft, FastLlama)
            self._stage.draft = Net.of(self._pair.draft, self._model.network.cache.kv)
        return self._programs[key]

    def _read(self, flight: Flight) -> None:
        """Records of a flight, and the host's state behind it. Rounds after the last row ended are no records."""
        found = readings(flight.letter.open(), flight.first, flight.rounds)
        idle_ns, phases = 0, flight.player.phases
        for place, reading in enumerate(found):
            gap = start_ns(reading) - self._last_end_ns if self._last_end_ns else flight.waited_ns
            if place == 0:
                gap = min(gap, flight.waited_ns)  # more than that is time of the consumer, which belongs to nobody
            self._last_end_ns = end_ns(reading, phases)
            if not any(entry[LIVE] for entry in reading.entries):
                idle_ns += end_ns(reading, phases) - start_ns(reading)
                continue
            self._ready_live.append(tuple(bool(entry[LIVE]) for entry in reading.entries))
            self._take_over(reading, flight.config)
            self._ready.append(self._record_of(reading, flight, gap))
        if not any(self._batch.host_live):
            idle_ns += self._drain_idle()
        if idle_ns and self._ready:
            self._ready[-1] = with_idle(self._ready[-1], idle_ns * 1e-9)

    def _drain_idle(self) -> int:
        """Nanoseconds of rounds that were under way when the last row ended."""
        spent = 0
        while self._flights:
            flight = self._flights.popleft()
            for reading in readings(flight.letter.open(), flight.first, flight.rounds):
                spent += end_ns(reading, flight.player.phases) - start_ns(reading)
        return spent

    def _take_over(self, reading: Reading, config: SpecConfig) -> None:
        """Bring the host's view of every row behind a round that was read."""
        batch, gained = self._batch, [entry[EMITTED] for entry in reading.entries]
        most = self._workload.max_new_tokens
        for row, entry in enumerate(reading.entries):
            self._progress.emitted[row] += gained[row]
            ended = gained[row] > 0 and entry[TOKENS + gained[row] - 1] in self._eos
            batch.host_live[row] = batch.host_live[row] and not ended and self._progress.emitted[row] < most
        batch.host_lengths = [n + c for n, c in zip(batch.host_lengths, gained, strict=True)]
        self._known = [n - 1 for n in batch.host_lengths]
        if config.drafter == "model":
            assert self._model is not None
            self._model.knows([entry[KNOWN] for entry in reading.entries])

    def _record_of(self, reading: Reading, flight: Flight, gap_ns: int) -> StepRecord:
        prepared, self._prepared = self._prepared, Prepared()
        record = record_of(reading, flight, gap_ns, prepared, self._pair, self._progress, self._ceilings)
        self._progress.seconds += record.wall_s
        self._progress.rounds += 1
        return record


def _deciding(batch: Batch, ops: Ops) -> Deciding:
    """By the kernels where the operations are kernels."""
    chosen = batch.processor, batch.verifier, batch.noise
    if not isinstance(ops, TritonOps):
        return TorchDeciding(*chosen)
    seed = torch.tensor([batch.noise.seed], dtype=torch.int64, device=batch.ids.device)
    return KernelDeciding(*chosen, seed, ops.kernels)


def _snapkv(config: SpecConfig) -> KvView | None:
    """The view, if it lists tokens."""
    return config.view if config.view is not None and config.view.kind == "snapkv" else None


def _window_of(config: SpecConfig) -> tuple[int, int]:
    """Sink and recent; (0, 0) is everything."""
    return (0, 0) if config.view is None else (config.view.sink, config.view.recent)
