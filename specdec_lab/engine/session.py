"""One batch with its prefilled caches: rounds of draft, verify, commit, each yielding a StepRecord.

A session can be rewound to the end of its prompts, so that configurations are compared on equal ground without paying for
the prompt again. Not known here: who reads the records.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..records import KvView, SpecConfig, StepRecord, UnsupportedConfig
from ..workload import Workload
from .attention import AttentionBackend, chain_reads
from .batch import Batch, Forward, count_forward, read_committed
from .calibrate import Ceilings
from .clocks import Clock, Lap, Phase
from .drafters import DraftCost, ModelDrafter, NgramDrafter, SelfDrafter
from .models.loading import ModelPair
from .models.runner import Runner
from .sampling import Noise, Processor
from .verify import Decision, Proposal, decide

DRAFT_MARGIN = 65  # slots beyond the last token for a round's root and drafts
BUSY_RATIO, BUSY_SLACK_S = 1.1, 5e-4


@dataclass(frozen=True, slots=True)
class _Commit:
    """What a round gave each row."""

    accepted: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    censored: tuple[bool, ...]


@dataclass(slots=True)
class _Progress:
    """Where a run stands on the host: turn, tokens emitted in it, rounds, seconds."""

    turn: int = 0
    emitted: list[int] = field(default_factory=list)
    rounds: int = 0
    seconds: float = 0.0


class Session:
    """A workload on an engine, its prompts read into the caches. Use Engine.open."""

    def __init__(
        self, pair: ModelPair, backend: AttentionBackend, draft_backend: AttentionBackend | None, workload: Workload,
        clock: Clock, ceilings: Ceilings,
    ) -> None:
        self._pair, self._backend, self._draft_backend = pair, backend, draft_backend
        self._workload, self._clock, self._ceilings = workload, clock, ceilings
        self._max_tokens = workload.max_tokens + DRAFT_MARGIN
        device = pair.target.device
        self._cache = pair.target.new_cache(workload.batch, self._max_tokens)
        self._known = [0] * workload.batch
        sequences = workload.sequence_ids or range(workload.batch)
        self._batch = Batch(
            ids=torch.zeros(workload.batch, self._cache.slots, dtype=torch.int64, device=device),
            lengths=torch.zeros(workload.batch, dtype=torch.int64, device=device),
            host_lengths=[0] * workload.batch, host_live=[True] * workload.batch,
            noise=Noise(workload.seed, torch.tensor(list(sequences), dtype=torch.int64, device=device)),
            processor=Processor(workload.temperature, workload.top_p, workload.top_k), verifier=workload.verifier,
        )
        self._progress = _Progress()
        self._self = SelfDrafter(pair.target, self._cache, backend)
        self._ngram = NgramDrafter()
        self._model: ModelDrafter | None = None
        self._append(workload.prompts, first=True)
        self._prompt_lengths = list(self._batch.host_lengths)

    @property
    def live(self) -> int:
        """Rows that still emit."""
        return sum(self._batch.host_live)

    @property
    def mean_length(self) -> float:
        """Mean context of the live rows, in tokens."""
        lengths = [n for n, live in zip(self._batch.host_lengths, self._batch.host_live, strict=True) if live]
        return sum(lengths) / max(len(lengths), 1)

    def check(self, config: SpecConfig) -> None:
        """Raise UnsupportedConfig, with the reason, if this session cannot run `config`."""
        if config.is_off:
            return
        assert config.tree is not None
        if not config.tree.is_chain:
            raise UnsupportedConfig(f"{config}: this engine drafts chains; a tree of {config.tree.num_nodes} nodes is not one. "
                                    f"Use {config.drafter}{f':{config.view}' if config.view else ''}/chain{config.depth}.")
        if config.view is not None and config.view.kind == "snapkv":
            raise UnsupportedConfig(f"{config}: the {self._backend.name} back end reads windows, not SnapKV index lists. "
                                    f"Use a window such as {config.drafter}:4+{config.view.recent}/{config.tree}.")
        if config.drafter == "model" and self._pair.draft is None:
            raise UnsupportedConfig(
                f"{config}: no draft model is loaded. Load one with load(..., draft=...), or draft with self or ngram."
            )
        if config.num_nodes >= DRAFT_MARGIN:
            raise UnsupportedConfig(f"{config}: at most {DRAFT_MARGIN - 1} tokens can be drafted in a round")

    def rewind(self) -> None:
        """Back to the end of the prompts; their KV stays."""
        batch = self._batch
        batch.host_lengths = list(self._prompt_lengths)
        batch.host_live = [True] * self._workload.batch
        batch.lengths = torch.tensor(batch.host_lengths, device=batch.lengths.device)
        self._known = [min(k, n - 1) for k, n in zip(self._known, batch.host_lengths, strict=True)]
        self._cache.rollback(batch.lengths - 1)
        self._forget_drafts()
        self._progress = _Progress(emitted=[0] * self._workload.batch)

    def prefill(self, config: SpecConfig | None) -> StepRecord | None:
        """Read what is not yet in the caches that `config` uses; the record of that, or None if nothing was missing."""
        context = tuple(self._known)
        behind = self._known != [n - 1 for n in self._batch.host_lengths]
        drafter = self._drafter(config) if config is not None and not config.is_off else None
        behind_draft = isinstance(drafter, ModelDrafter) and drafter.lag(self._batch) > 1
        with torch.inference_mode():
            clock, pair = self._clock, self._pair
            self._known, forwards = read_committed(
                pair.target, self._cache, self._backend, self._batch, self._known, KvView.full(), clock,
                (Phase.LINEAR, Phase.ATTENTION),
            )
            draft_cost = DraftCost()
            if isinstance(drafter, ModelDrafter) and config is not None and behind_draft:
                draft_cost = drafter.catch_up(self._batch, config, clock)
            if isinstance(drafter, NgramDrafter):
                clock.enter(Phase.DRAFT_OTHER)
                drafter.read(self._batch)
            clock.enter(Phase.HOST)
        if not behind and not behind_draft:
            return None
        rows = self._workload.batch
        nothing = _Commit((0,) * rows, ((),) * rows, (False,) * rows)
        return self._record("prefill", config or SpecConfig.off(), context, (0,) * rows, nothing, draft_cost, forwards)

    def turns(self) -> Iterator[None]:
        """One item per turn of the workload; the follow-up text of a turn is appended before its item."""
        yield
        for follow_up in self._workload.turns:
            self._append(follow_up, first=False)
            yield

    def round(self, config: SpecConfig) -> StepRecord:
        """Draft, verify, commit; one record. This is the architecture."""
        with torch.inference_mode():
            context = tuple(n - 1 for n in self._batch.host_lengths)
            proposal, draft_cost = self._propose(config)
            decision, width = self._verify(proposal)
            self._clock.enter(Phase.COMMIT)
            counts = proposal.counts.tolist()
            commit = self._commit(decision)
            self._clock.enter(Phase.HOST)
        drafted = tuple(d if t else 0 for d, t in zip(counts, commit.tokens, strict=True))
        verify = (count_forward(list(context), width, KvView.full()),)
        return self._record("round", config, context, drafted, commit, draft_cost, verify)

    def _propose(self, config: SpecConfig) -> tuple[Proposal, DraftCost]:
        if config.is_off:
            nothing = torch.zeros(self._workload.batch, 0, dtype=torch.int64, device=self._cache.committed.device)
            return Proposal(nothing, torch.zeros_like(self._batch.lengths)), DraftCost()
        return self._drafter(config).propose(self._batch, config, self._clock)

    def _verify(self, proposal: Proposal) -> tuple[Decision, int]:
        """Score root and drafts with the target in one forward, and decide."""
        batch, committed = self._batch, self._cache.committed
        tokens = torch.cat([batch.roots[:, None], proposal.tokens], 1)  # [B, N+1]
        width = tokens.shape[1]
        reads = chain_reads(committed, width, KvView.full(), batch.longest_committed, batch.uniform)
        self._clock.forward(Phase.LINEAR, Phase.ATTENTION)
        scores = self._pair.target.forward(tokens, reads, self._cache, self._backend, self._clock, reads.query_nodes)
        self._clock.enter(Phase.ACCEPT)
        return decide(proposal, scores, committed + 1, batch.processor, batch.verifier, batch.noise), width

    def _commit(self, decision: Decision) -> _Commit:
        """Append the accepted tokens of the live rows, cut at end of text and length limit."""
        batch, progress = self._batch, self._progress
        accepted, tokens = decision.num_accepted.tolist(), decision.tokens.tolist()
        eos = frozenset(self._pair.eos_ids) if self._workload.stop_at_eos else frozenset()
        kept: list[tuple[int, ...]] = []
        censored = []
        for row, (count, path) in enumerate(zip(accepted, tokens, strict=True)):
            offered = path[: count + 1] if batch.host_live[row] else []
            cut = offered[: self._workload.max_new_tokens - progress.emitted[row]]
            end = next((i for i, token in enumerate(cut) if token in eos), None)
            if end is not None:
                cut = cut[: end + 1]
            progress.emitted[row] += len(cut)
            if end is not None or progress.emitted[row] >= self._workload.max_new_tokens:
                batch.host_live[row] = False
            kept.append(tuple(cut))
            censored.append(len(cut) < len(offered))
        at = batch.lengths[:, None] + torch.arange(decision.tokens.shape[1], device=batch.lengths.device)
        batch.ids.scatter_(1, at.clamp(max=batch.ids.shape[1] - 1), decision.tokens)
        self._advance([len(t) for t in kept])
        return _Commit(tuple(min(a, len(t)) for a, t in zip(accepted, kept, strict=True)), tuple(kept), tuple(censored))

    def _advance(self, counts: list[int]) -> None:
        batch = self._batch
        gained = torch.tensor(counts, device=batch.lengths.device)
        batch.lengths = batch.lengths + gained
        batch.host_lengths = [n + c for n, c in zip(batch.host_lengths, counts, strict=True)]
        self._cache.commit(gained)
        self._known = [n - 1 for n in batch.host_lengths]
        self._forget_drafts()

    def _forget_drafts(self) -> None:
        self._ngram.rewind(self._batch)
        if self._model is not None:
            self._model.rewind(self._batch)

    def _append(self, texts: tuple[tuple[int, ...], ...], *, first: bool) -> None:
        """Put a turn's text behind every row. Its KV is read by the next prefill."""
        batch = self._batch
        for row, text in enumerate(texts):
            start = batch.host_lengths[row]
            batch.ids[row, start : start + len(text)] = torch.tensor(text, device=batch.ids.device)
        batch.host_lengths = [n + len(t) for n, t in zip(batch.host_lengths, texts, strict=True)]
        batch.lengths = torch.tensor(batch.host_lengths, device=batch.lengths.device)
        batch.host_live = [True] * len(texts)
        self._progress.emitted = [0] * len(texts)

    def _drafter(self, config: SpecConfig) -> SelfDrafter | ModelDrafter | NgramDrafter:
        if config.drafter == "self":
            return self._self
        if config.drafter == "ngram":
            return self._ngram
        if self._model is None:
            assert self._pair.draft is not None
            assert self._draft_backend is not None
            cache = self._pair.draft.new_cache(self._workload.batch, self._max_tokens)
            self._model = ModelDrafter(self._pair.draft, cache, self._draft_backend)
        return self._model

    def _record(
        self, kind: str, config: SpecConfig, context: tuple[int, ...], drafted: tuple[int, ...], commit: _Commit,
        draft_cost: DraftCost, forwards: tuple[Forward, ...],
    ) -> StepRecord:
        """Read the clock and put measured times beside exact counts."""
        lap = self._clock.lap()
        record = _step_record(
            kind, config, self._progress, lap, context, drafted, commit,
            _Counted(self._pair.target, len(context), forwards),
            _Counted(self._pair.draft if config.drafter == "model" else self._pair.target, len(context), draft_cost.forwards),
            self._ceilings,
        )
        self._progress.seconds += lap.wall_s
        self._progress.rounds += 1
        return record


@dataclass(frozen=True, slots=True)
class _Counted:
    """Exact bytes and FLOPs of some forwards of one model."""

    runner: Runner | None
    rows: int
    forwards: tuple[Forward, ...]

    @property
    def kv_bytes_per_token(self) -> int:
        return self.runner.shape.kv_bytes_per_token(self.runner.dtype.itemsize) if self.runner else 0

    @property
    def kv_read_bytes(self) -> int:
        return sum(f.keys for f in self.forwards) * self.kv_bytes_per_token

    @property
    def kv_write_bytes(self) -> int:
        return sum(f.queries for f in self.forwards) * self.rows * self.kv_bytes_per_token

    @property
    def weight_bytes(self) -> int:
        return len(self.forwards) * self.runner.shape.weight_bytes(self.runner.dtype.itemsize) if self.runner else 0

    @property
    def linear_flops(self) -> int:
        return self.runner.shape.linear_flops(self.rows * sum(f.queries for f in self.forwards)) if self.runner else 0

    @property
    def attention_flops(self) -> int:
        return self.runner.shape.attention_flops(sum(f.pairs for f in self.forwards)) if self.runner else 0


def _step_record(
    kind: str, config: SpecConfig, progress: _Progress, lap: Lap, context: tuple[int, ...], drafted: tuple[int, ...],
    commit: _Commit, target: _Counted, draft: _Counted, ceilings: Ceilings,
) -> StepRecord:
    s = lap.seconds
    draft_s = s[Phase.DRAFT_LINEAR] + s[Phase.DRAFT_ATTENTION] + s[Phase.DRAFT_OTHER]
    floor_s = target.kv_read_bytes / ceilings.read_bytes_per_s
    flags = []
    if lap.wall_s > BUSY_RATIO * lap.cpu_s + BUSY_SLACK_S:
        flags.append("busy")
    if s[Phase.ATTENTION] and floor_s > s[Phase.ATTENTION]:
        flags.append("floor-above-measured")
    return StepRecord(
        index=progress.rounds, kind=kind, config=str(config), start_s=progress.seconds, wall_s=lap.wall_s, draft_s=draft_s,
        linear_s=s[Phase.LINEAR], attention_s=s[Phase.ATTENTION], commit_s=s[Phase.COMMIT], accept_s=s[Phase.ACCEPT],
        host_s=s[Phase.HOST], cpu_s=lap.cpu_s, context_tokens=context, drafted=drafted, accepted=commit.accepted,
        tokens=commit.tokens, censored=commit.censored, draft_linear_s=s[Phase.DRAFT_LINEAR],
        draft_attention_s=s[Phase.DRAFT_ATTENTION], draft_kv_floor_s=draft.kv_read_bytes / ceilings.read_bytes_per_s,
        kv_floor_s=floor_s, kv_read_bytes=target.kv_read_bytes, draft_kv_read_bytes=draft.kv_read_bytes,
        kv_write_bytes=target.kv_write_bytes + draft.kv_write_bytes, weight_bytes=target.weight_bytes + draft.weight_bytes,
        linear_flops=target.linear_flops + draft.linear_flops, attention_flops=target.attention_flops + draft.attention_flops,
        query_tokens=max((f.queries for f in target.forwards), default=0), flags=tuple(flags),
    )
