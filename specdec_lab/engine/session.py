"""One batch with its prefilled caches: rounds of draft, verify, commit, each yielding a StepRecord.

A session can be rewound to the end of its prompts, so that configurations are compared on equal ground without paying for
the prompt again. Not known here: who reads the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch

from ..records import KvView, SpecConfig, StepRecord, TreeShape, UnsupportedConfig
from ..workload import Workload
from .accounts import Commit, Progress, count, step_record
from .attention import AttentionBackend, chain_reads
from .batch import Batch, Forward, count_forward
from .calibrate import Ceilings
from .clocks import Clock, Phase
from .drafters import DraftCost, ModelDrafter, NgramDrafter, SelfDrafter
from .forced import Forced
from .models.loading import ModelPair
from .network import TARGET, Network
from .sampling import Noise, Processor
from .threads import Threads
from .tree_verify import decide_tree
from .verify import Decision, Proposal, decide

FULL = KvView.full()
DRAFT_MARGIN = 65  # slots beyond the last token for a round's root and drafts


class Session:
    """A workload on an engine, its prompts read into the caches. Use Engine.open."""

    def __init__(
        self, pair: ModelPair, backend: AttentionBackend, draft_backend: AttentionBackend | None, workload: Workload,
        clock: Clock, ceilings: Ceilings, threads: Threads, forced: Forced | None = None,
    ) -> None:
        self._forced = forced
        self._pair, self._draft_backend, self._threads = pair, draft_backend, threads
        self._workload, self._clock, self._ceilings = workload, clock, ceilings
        self._eos = frozenset(pair.eos_ids) if workload.stop_at_eos else frozenset()
        self._max_tokens = workload.max_tokens + DRAFT_MARGIN
        device = pair.target.device
        self._cache = pair.target.new_cache(workload.batch, self._max_tokens)
        self._target = Network(pair.target, self._cache, backend, clock, threads)
        self._known = [0] * workload.batch
        sequences = workload.sequence_ids or range(workload.batch)
        self._batch = Batch(
            ids=torch.zeros(workload.batch, self._cache.slots, dtype=torch.int64, device=device),
            lengths=torch.zeros(workload.batch, dtype=torch.int64, device=device),
            host_lengths=[0] * workload.batch, host_live=[True] * workload.batch,
            noise=Noise(workload.seed, torch.tensor(list(sequences), dtype=torch.int64, device=device)),
            processor=Processor(workload.temperature, workload.top_p, workload.top_k), verifier=workload.verifier,
        )
        self._progress = Progress([0] * workload.batch)
        nothing = torch.zeros(workload.batch, 0, dtype=torch.int64, device=device)
        self._no_draft = Proposal(nothing, torch.zeros(workload.batch, dtype=torch.int64, device=device), is_plain=True)
        self._self = SelfDrafter(self._target)
        self._ngram = NgramDrafter()
        self._model: ModelDrafter | None = None
        self._append(workload.prompts)
        self._prompt_lengths = list(self._batch.host_lengths)
        if workload.context == "noise":
            self._known = [n - 1 for n in self._prompt_lengths]
            self._cache.fill_noise(self._known, workload.seed)
            self._self.snapkv.begin(self._known)

    @property
    def live(self) -> int:
        """Rows that still emit."""
        return sum(self._batch.host_live)

    @property
    def mean_length(self) -> float:
        """Mean context of the live rows, in tokens."""
        lengths = [n for n, live in zip(self._batch.host_lengths, self._batch.host_live, strict=True) if live]
        return sum(lengths) / max(len(lengths), 1)

    @property
    def capture_s(self) -> float:
        """Seconds that capturing rounds as graphs took so far; in no record."""
        return 0.0

    def check(self, config: SpecConfig) -> None:
        """Raise UnsupportedConfig, with the reason, if this session cannot run `config`."""
        if config.is_off:
            return
        assert config.tree is not None
        if self._forced is not None:
            self._forced.check(config.tree)
        if config.view is not None and config.view.kind == "snapkv" and (reason := self._why_no_snapkv(config)):
            raise UnsupportedConfig(f"{config}: {reason}. "
                                    f"Use a window such as {config.drafter}:4+{config.view.recent}/{config.tree}.")
        if config.drafter == "model" and self._pair.draft is None:
            raise UnsupportedConfig(
                f"{config}: no draft model is loaded. Load one with load(..., draft=...), or draft with self or ngram."
            )
        if config.is_chain and config.num_nodes >= DRAFT_MARGIN:
            raise UnsupportedConfig(f"{config}: at most {DRAFT_MARGIN - 1} tokens can be drafted in a round")
        if not config.is_chain:
            self._check_tree(config, config.tree)

    def _check_tree(self, config: SpecConfig, tree: TreeShape) -> None:
        """Refuse a tree that does not fit beside the text, the back end or the vocabulary."""
        room = self._cache.capacity - self._workload.max_tokens
        if tree.num_nodes > room:
            raise UnsupportedConfig(f"{config.drafter} with a tree of {tree.num_nodes} nodes: behind the "
                                    f"{self._workload.max_tokens} tokens of this workload the cache has {room} slots for "
                                    "drafts. Use fewer nodes.")
        runners = [(self._target.backend, self._pair.target)]
        if config.drafter == "model" and self._pair.draft is not None and self._draft_backend is not None:
            runners.append((self._draft_backend, self._pair.draft))
        for backend, runner in runners:
            reason = backend.why_not(replace(runner.need(), tree=True, max_queries=tree.num_nodes + 1))
            if reason is not None:
                raise UnsupportedConfig(f"{config.drafter} with a tree of {tree.num_nodes} nodes: {reason}. Use fewer nodes.")
        vocab, most = self._pair.target.shape.vocab, max(Counter(tree.parents).values())
        if config.drafter != "ngram" and most > vocab:
            raise UnsupportedConfig(f"{config}: a node has {most} children, the vocabulary only {vocab} tokens")

    def _why_no_snapkv(self, config: SpecConfig) -> str | None:
        if config.drafter != "self":
            return "SnapKV chooses among the target's own keys, and a second network reads its own text through windows"
        return self._target.backend.why_not(replace(self._pair.target.need(), index_list=True, tree=not config.is_chain))

    def rewind(self) -> None:
        """Back to the end of the prompts; their KV stays."""
        batch = self._batch
        batch.host_lengths = list(self._prompt_lengths)
        batch.set_live([True] * self._workload.batch)
        batch.lengths = torch.tensor(batch.host_lengths, device=batch.lengths.device)
        self._known = [min(k, n - 1) for k, n in zip(self._known, batch.host_lengths, strict=True)]
        self._cache.rollback(batch.lengths - 1)
        self._forget_drafts()
        self._progress = Progress([0] * self._workload.batch)

    def prefill(self, config: SpecConfig | None) -> StepRecord | None:
        """Read what is not yet in the caches that `config` uses; the record of that, or None if nothing was missing."""
        context = tuple(self._known)
        behind = self._known != [n - 1 for n in self._batch.host_lengths]
        drafter = self._drafter(config) if config is not None and not config.is_off else None
        behind_draft = isinstance(drafter, ModelDrafter) and drafter.lag(self._batch) > 1
        with torch.inference_mode():
            clock = self._clock
            self._known, forwards = self._target.read(self._batch, self._known, FULL, TARGET)
            self._self.snapkv.begin(self._known)
            draft_cost = DraftCost()
            if isinstance(drafter, SelfDrafter) and config is not None:
                draft_cost = drafter.choose(self._batch, config, clock)
            if isinstance(drafter, ModelDrafter) and config is not None and behind_draft:
                draft_cost = drafter.catch_up(self._batch, config, clock)
            if isinstance(drafter, NgramDrafter) and config is not None:
                clock.enter(Phase.DRAFT_OTHER)
                self._read_text(config)
            clock.enter(Phase.HOST)
        if not behind and not behind_draft and not draft_cost.forwards:
            return None
        rows = self._workload.batch
        nothing = Commit((0,) * rows, ((),) * rows, (False,) * rows)
        return self._record("prefill", config or SpecConfig.off(), context, (0,) * rows, nothing, draft_cost, forwards)

    def _read_text(self, config: SpecConfig) -> None:
        """Let the n-gram drafter take in the texts."""
        del config  # it reads the same for every tree
        self._ngram.read(self._batch)

    def turns(self) -> Iterator[None]:
        """One item per turn of the workload; the follow-up text of a turn is appended before its item."""
        yield
        for follow_up in self._workload.turns:
            self._append(follow_up)
            yield

    def round(self, config: SpecConfig) -> StepRecord:
        """Draft, verify, commit; one record. This is the architecture."""
        with torch.inference_mode():
            context = tuple(n - 1 for n in self._batch.host_lengths)
            proposal, draft_cost = self._propose(config)
            decision, verify = self._verify(proposal)
            self._clock.enter(Phase.COMMIT)
            counts = proposal.counts.tolist()
            commit = self._commit(decision, proposal)
            self._clock.enter(Phase.HOST)
            self._threads.restore()
        drafted = tuple(d if t else 0 for d, t in zip(counts, commit.tokens, strict=True))
        return self._record("round", config, context, drafted, commit, draft_cost, (verify,))

    def _propose(self, config: SpecConfig) -> tuple[Proposal, DraftCost]:
        if config.is_off:
            return self._no_draft, DraftCost()
        return self._drafter(config).propose(self._batch, config, self._clock)

    def _verify(self, proposal: Proposal) -> tuple[Decision, Forward]:
        """Score root and drafts with the target in one forward, and decide."""
        batch, committed = self._batch, self._cache.committed
        root = batch.last_tokens(1)
        tokens = torch.cat([root, proposal.tokens], 1) if proposal.tokens.shape[1] else root  # [B, N+1]
        rows, width = self._target.rows(batch), tokens.shape[1]
        computed = [n - 1 for n in batch.lengths_of(rows)]
        if proposal.layout is None:
            reads = chain_reads(committed, width, FULL, batch.longest_committed, batch.uniform, rows)
            judge, verify = decide, count_forward(computed, width, FULL)
        else:
            reads = proposal.layout.whole.reads(committed, FULL, batch.longest_committed, batch.uniform, rows)
            judge, verify = decide_tree, proposal.layout.whole.count(computed, FULL)
        scores = self._target.score(tokens, reads, width, TARGET)
        self._clock.enter(Phase.ACCEPT)
        decision = judge(proposal, scores, committed + 1, batch.processor, batch.verifier, batch.noise, self._forced)
        if self._pair.target.group is not None:
            self._pair.target.group.check_equal(torch.cat([decision.num_accepted[:, None], decision.tokens], 1))
        return decision, verify

    def _commit(self, decision: Decision, proposal: Proposal) -> Commit:
        """Append the accepted tokens of the live rows, cut at end of text and length limit."""
        batch, emitted, most = self._batch, self._progress.emitted, self._workload.max_new_tokens
        accepted, paths = decision.num_accepted.tolist(), decision.tokens.tolist()
        kept: list[tuple[int, ...]] = []
        censored, live = [], list(batch.host_live)
        for row, (number, path) in enumerate(zip(accepted, paths, strict=True)):
            offered = path[: number + 1] if live[row] else []
            cut = offered[: most - emitted[row]]
            end = next((i for i, token in enumerate(cut) if token in self._eos), None) if self._eos else None
            if end is not None:
                cut = cut[: end + 1]
            emitted[row] += len(cut)
            live[row] = live[row] and end is None and emitted[row] < most
            kept.append(tuple(cut))
            censored.append(len(cut) < len(offered))
        batch.write(decision.tokens)
        counts = tuple(min(a, len(t)) for a, t in zip(accepted, kept, strict=True))
        ranks, nodes = self._keep_path(decision, proposal, counts) if proposal.layout is not None else ((), ())
        if live != batch.host_live:
            batch.set_live(live)
        self._advance([len(t) for t in kept])
        return Commit(counts, tuple(kept), tuple(censored), ranks, nodes)

    def _keep_path(
        self, decision: Decision, proposal: Proposal, counts: tuple[int, ...]
    ) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """Move the KV of the accepted nodes next to the root; the ranks they have, and the nodes drafted (see StepRecord)."""
        assert decision.path is not None
        assert decision.ranks is not None
        paths, batch = decision.path.tolist(), self._batch
        self._cache.compact(paths, counts)
        if self._model is not None:
            self._model.keep(paths, counts)
        ranks = tuple(tuple(row[:count]) for row, count in zip(decision.ranks.tolist(), counts, strict=True))
        drafted = [nodes if live else () for nodes, live in zip(proposal.nodes, batch.host_live, strict=bool(proposal.nodes))]
        return ranks, tuple(drafted)

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

    def _append(self, texts: tuple[tuple[int, ...], ...]) -> None:
        """Put a turn's text behind every row. Its KV is read by the next prefill."""
        batch = self._batch
        for row, text in enumerate(texts):
            start = batch.host_lengths[row]
            batch.ids[row, start : start + len(text)] = torch.tensor(text, device=batch.ids.device)
        batch.host_lengths = [n + len(t) for n, t in zip(batch.host_lengths, texts, strict=True)]
        batch.lengths = torch.tensor(batch.host_lengths, device=batch.lengths.device)
        batch.set_live([True] * len(texts))
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
            self._model = ModelDrafter(Network(self._pair.draft, cache, self._draft_backend, self._clock, self._threads))
            if self._workload.context == "noise":
                self._model.fill_noise([n - 1 for n in self._prompt_lengths], self._workload.seed + 1)
        return self._model

    def _record(
        self, kind: str, config: SpecConfig, context: tuple[int, ...], drafted: tuple[int, ...], commit: Commit,
        draft_cost: DraftCost, forwards: tuple[Forward, ...],
    ) -> StepRecord:
        """Read the clock and put measured times beside exact counts."""
        lap, pair, progress = self._clock.lap(), self._pair, self._progress
        drafting = pair.draft if config.drafter == "model" and pair.draft else pair.target
        record = step_record(
            kind, config, progress, lap, context, drafted, commit, count(pair.target, forwards, self._target.used_threads),
            count(drafting, draft_cost.forwards, draft_cost.threads), self._ceilings,
        )
        progress.seconds += lap.wall_s
        progress.rounds += 1
        return record
