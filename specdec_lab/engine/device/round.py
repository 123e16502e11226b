"""A round as a straight line of device work: draft, verify, accept, commit. Reading `play` is reading what a graph holds.

Nothing here looks at a value: no shape, branch or loop depends on one, so the line can be captured and replayed, or just run.
Finished rows are computed like the others and advance no more; what they write lies beyond their text, within the cache.
Not known here: how often results are read, records.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..clocks import Phase
from ..verify import Decision
from . import state as log
from .deciding import Deciding, Drafted, counts_of, together
from .forward import Net, forward, logits
from .ops import Ops
from .program import Feed, Program
from .state import DeviceState


@dataclass(slots=True)
class Stage:
    """What rounds of a session work on; its draft and its lists come when first asked for.

    instrumented  False stamps only start and end of a round
    lists         by budget (Program.budget): what SnapKV lists now, int32 [layers, B, Hkv, N]; refilled between rounds
    """

    state: DeviceState
    target: Net
    draft: Net | None
    ops: Ops
    deciding: Deciding
    instrumented: bool = True
    lists: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Marks:
    """Stamps of one round: time from a mark to the next belongs to the mark's phase."""

    stage: Stage
    phases: list[Phase] = field(default_factory=list)

    def enter(self, phase: Phase) -> None:
        """From now on time belongs to `phase`. The first and the last mark of a round are always made."""
        if self.stage.instrumented or not self.phases or phase is Phase.HOST:
            self.stage.ops.stamp(self.stage.state.times, self.stage.state.number, len(self.phases))
            self.phases.append(phase if self.stage.instrumented else Phase.HOST)


def play(stage: Stage, program: Program) -> tuple[Phase, ...]:
    """One round of every row. Returns the phases of its stamps; the last, HOST, is the end of the round."""
    marks, state = Marks(stage), stage.state
    drafted = _draft(stage, program, marks)
    marks.enter(Phase.LINEAR)
    fed = torch.cat([state.roots, together(drafted, state.committed)], 1)  # [B, N+1]
    stamps = state.verify_stamps[: len(stage.target.parts.layers)] if stage.instrumented else None
    hidden = forward(stage.target, stage.ops, fed, state.committed, program.verify, None, stamps)
    scores = logits(stage.target, hidden)
    marks.enter(Phase.ACCEPT)
    decision = stage.deciding.accept(program, drafted, scores, state.committed)
    marks.enter(Phase.COMMIT)
    _commit(stage, program, decision, counts_of(program, drafted, state.committed))
    if stage.instrumented:
        _sum_attention(stage, program)
    marks.enter(Phase.HOST)
    state.number.add_(1)
    return tuple(marks.phases)


def _draft(stage: Stage, program: Program, marks: Marks) -> list[Drafted]:
    """Level by level: a forward of the nodes that have children, and their children chosen. N-grams: one look into the text."""
    state, drafted = stage.state, list[Drafted]()
    if program.drafter == "ngram":
        marks.enter(Phase.DRAFT_OTHER)
        tokens, counts = stage.ops.ngram_match(state.ids, state.committed + 1, program.depth, state.matching)
        return [Drafted(tokens, tokens, counts=counts)]
    if not program.drafts:
        return drafted
    net, fed = _drafting(stage, program), state.roots
    lists = stage.lists[program.budget] if program.budget else None
    for level, feed in enumerate(program.drafts):
        marks.enter(Phase.DRAFT_LINEAR)
        stamps = state.draft_stamps[level, : len(net.parts.layers)] if stage.instrumented else None
        if level == 0 and program.drafter == "model":
            hidden = _catch_up(stage, net, feed, stamps)
        else:
            hidden = forward(net, stage.ops, fed, state.committed, feed, state.window, stamps, lists)
        scores = logits(net, hidden)
        marks.enter(Phase.DRAFT_OTHER)
        drafted.append(stage.deciding.draft(program, level, scores, state.committed))
        fed = drafted[-1].fed
    return drafted


def _drafting(stage: Stage, program: Program) -> Net:
    if program.drafter == "self":
        return stage.target
    assert stage.draft is not None  # whoever asks for such rounds has one
    return stage.draft


def _catch_up(stage: Stage, net: Net, feed: Feed, stamps: Tensor | None) -> Tensor:
    """Hidden states [B, 1, d] behind the roots, of a second network.

    After a fully accepted round it lacks the KV of the last committed token. So this forward always has two tokens: that one
    and the root; of a row that lacks nothing the root and padding, whose KV the next draft overwrites.
    """
    state = stage.state
    lag = (state.committed - state.known).clamp(0, 1)  # [B]
    base = state.committed - lag
    at = base[:, None] + feed.slots  # [B, 2]; a token beyond the text is whatever lies there
    hidden = forward(net, stage.ops, state.ids.gather(1, at), base, feed, state.window, stamps)
    return hidden.gather(1, lag[:, None, None].expand(-1, 1, hidden.shape[2]))


def _commit(stage: Stage, program: Program, decision: Decision, drafted: Tensor) -> None:
    """Append what live rows accepted, cut at end of text and length limit; move its KV; write the log; advance."""
    state, tokens = stage.state, decision.tokens
    counts, ended = _cut(state, decision)
    accepted = torch.minimum(decision.num_accepted, counts)
    order = torch.arange(tokens.shape[1], device=tokens.device)
    state.ids.scatter_(1, state.committed[:, None] + 1 + order, tokens)
    known = _keep(stage, program, decision, accepted)
    emitted, committed = state.emitted + counts, state.committed + counts
    entry = _entry(state, program, decision, drafted, accepted, counts, torch.minimum(known, committed))
    row = state.number % state.log.shape[0]
    state.entries.index_copy_(0, row, entry[None])
    state.live.logical_and_(~ended & (emitted < state.limit))
    state.emitted.copy_(emitted)
    state.known.copy_(torch.minimum(known, committed))
    state.committed.copy_(committed)


def _cut(state: DeviceState, decision: Decision) -> tuple[Tensor, Tensor]:
    """How many tokens every row emits, and which rows end their text with the last of them."""
    tokens = decision.tokens
    order = torch.arange(tokens.shape[1], device=tokens.device)
    offered = (decision.num_accepted + 1) * state.live
    counts = torch.minimum(offered, state.limit - state.emitted).clamp(min=0)
    ends = (tokens[..., None] == state.eos).any(-1) & (order < counts[:, None])
    first = torch.where(ends, order, tokens.shape[1]).amin(1)
    return torch.minimum(counts, first + 1), ends.any(1)


def _keep(stage: Stage, program: Program, decision: Decision, accepted: Tensor) -> Tensor:
    """Move the KV of a tree's accepted nodes next to the root. Returns how many tokens the draft model knows now, at most."""
    state = stage.state
    if program.drafter != "model":
        known = state.known
    elif program.layout is None:
        known = state.committed + program.depth  # the root and all drafts but the last were fed
    else:
        known = state.committed + 1  # and the accepted nodes that were fed, below
    if program.layout is None:
        return known
    assert decision.path is not None
    stage.ops.compact(stage.target.kv, state.committed, decision.path, accepted)
    if program.drafter != "model":
        return known
    assert stage.draft is not None
    order = torch.arange(decision.path.shape[1], device=accepted.device)
    fed = (program.has_children[decision.path] & (order < accepted[:, None])).sum(1)
    stage.ops.compact(stage.draft.kv, state.committed, decision.path, fed)
    return known + fed


def _entry(
    state: DeviceState, program: Program, decision: Decision, drafted: Tensor, accepted: Tensor, counts: Tensor, known: Tensor
) -> Tensor:
    """[B, log.ENTRY] what the host will read of this round."""
    entry = torch.zeros(state.batch, log.ENTRY, dtype=torch.int64, device=counts.device)
    entry[:, log.CONTEXT], entry[:, log.LIVE], entry[:, log.ACCEPTED] = state.committed, state.live, accepted
    entry[:, log.DRAFTED] = drafted * state.live
    entry[:, log.EMITTED], entry[:, log.KNOWN] = counts, known
    entry[:, log.LAG] = (state.committed - state.known).clamp(0, 1)
    entry[:, log.CUT] = (counts < decision.num_accepted + 1) & state.live
    entry[:, log.TOKENS : log.TOKENS + decision.tokens.shape[1]] = decision.tokens
    if program.layout is not None and decision.ranks is not None:
        entry[:, log.RANKS : log.RANKS + decision.ranks.shape[1]] = decision.ranks
    return entry


def _sum_attention(stage: Stage, program: Program) -> None:
    """Nanoseconds of attention in the draft forwards and in verify, into the log."""
    state = stage.state
    draft = state.draft_stamps[: len(program.drafts)]
    if program.drafts:
        draft = draft[:, : len(_drafting(stage, program).parts.layers)]
    spent = [(s[..., 1] - s[..., 0]).sum() for s in (draft, state.verify_stamps[: len(stage.target.parts.layers)])]
    assert (log.DRAFT_ATTENTION, log.ATTENTION) == (log.MOST_MARKS, log.MOST_MARKS + 1)
    row, columns = state.number % state.log.shape[0], state.times[:, log.MOST_MARKS : log.ATTENTION + 1]
    columns.index_copy_(0, row, torch.stack(spent)[None])
