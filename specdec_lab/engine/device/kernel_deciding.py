"""Choosing drafts and accepting a path by the kernels of a round: no law is ever written, only logits and log-sum-exps are.

The kernels are handed in, so that a test can run the same code over their references. Not known here: how they work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..models.runner import Scores
from ..sampling import Noise, Processor, Purpose
from ..tree_verify import choose_children
from ..verify import Decision
from .deciding import Drafted, counts_of, fed_next, together
from .program import Program

ACCEPT, SAMPLE = ("accept_chain_equal", "accept_chain", "accept_tree_equal", "accept_tree"), (
    "draw_gumbel", "draw_inverse", "draw_residual",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RoundKernels:
    """The functions of specdec_kernels that a round calls, all of one kind; the reference of each folder says what they do."""

    rope_append: Callable[..., Tensor]
    kv_compact: Callable[..., Tensor]
    row_lse: Callable[..., Any]
    accept_chain_equal: Callable[..., Any]
    accept_chain: Callable[..., Any]
    accept_tree_equal: Callable[..., Any]
    accept_tree: Callable[..., Any]
    draw_gumbel: Callable[..., Any]
    draw_inverse: Callable[..., Any]
    draw_residual: Callable[..., Any]
    ngram_match: Callable[..., tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, kind: str) -> RoundKernels:
        """kind "gpu" or "reference": the name of a file in every folder."""
        places = {name: name for name in ("rope_append", "kv_compact", "row_lse")}
        places["ngram_match"] = "ngram"
        places |= dict.fromkeys(ACCEPT, "accept") | dict.fromkeys(SAMPLE, "sample_rows")
        return cls(**{name: getattr(import_module(f"specdec_kernels.{at}.{kind}"), name) for name, at in places.items()})


@dataclass(frozen=True, slots=True)
class Offered:
    """What the target judges.

    tokens  [B, N] drafted, of which a chain's rows have counts [B]
    forced  [B] how many of a chain are accepted instead, or None
    """

    tokens: Tensor
    counts: Tensor
    forced: Tensor | None

    def replaced(self, made: Any) -> Any:
        """What a kernel accepted of a chain, or what is forced instead; a draft behind it counts as refused."""
        if self.forced is None:
            return made
        count, order = self.forced, torch.arange(self.tokens.shape[1], device=self.tokens.device)
        taken, refused = order < count[:, None], count < self.counts
        at = count.clamp(max=self.tokens.shape[1] - 1)[:, None]
        return replace(
            made, num_accepted=count.int(), path=((order + 1) * taken).int(), ranks=taken.int(), row=count.int(),
            num_refused=refused.int(), refused=torch.where(refused[:, None], self.tokens.gather(1, at), -1),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class KernelDeciding:
    """seed [1] int64 on the device: the kernels read it there."""

    processor: Processor
    verifier: str
    noise: Noise
    seed: Tensor
    kernels: RoundKernels

    def draft(self, program: Program, level: int, scores: Tensor, committed: Tensor) -> Drafted:
        """See Deciding.draft."""
        tokens, law, lse, logprob = self._children(program, level, scores, committed + level + 1)
        return Drafted(tokens, fed_next(program, level, tokens), law, lse, logprob)

    def accept(
        self, program: Program, drafted: Sequence[Drafted], scores: Tensor, committed: Tensor, forced: Tensor | None = None
    ) -> Decision:
        """See Deciding.accept."""
        offered = Offered(together(drafted, committed), counts_of(program, drafted, committed), forced)
        if self.processor.is_greedy or self.verifier == "coupled" or not program.depth:
            return self._accept_equal(program, offered, scores, committed + 1)
        return self._accept_drawn(program, drafted, offered, scores, committed + 1)

    def _children(
        self, program: Program, level: int, scores: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Tokens [B, children]; of rejection also the logits they were drawn from and what the kernels ask of them."""
        here = None if program.layout is None else program.layout.levels[level]
        most, rows = 1 if here is None else here.most, position[:, None].expand(-1, scores.shape[1]).contiguous()
        if self.processor.is_greedy or (self.verifier == "coupled" and most > 1):
            if most == 1:
                chosen = self._stats(scores, 1.0)[1][..., None]
            else:
                chosen, _ = choose_children(Scores(scores), most, position, self.processor, self.verifier, self.noise)
            return _pick(program, level, chosen), None, None, None
        logits, temperature = self._law(scores)
        lse, _ = self._stats(logits, temperature)
        at = (logits, lse, temperature, self.seed, self.noise.sequences, rows)
        if self.verifier == "coupled":
            chosen = self.kernels.draw_gumbel(*at, int(Purpose.TARGET)).tokens[..., None]
            return _pick(program, level, chosen), None, None, None
        drawn = [self.kernels.draw_inverse(*at, int(Purpose.DRAFT))]
        for rank in range(1, most):
            removed = torch.stack([d.tokens for d in drawn], -1)  # [B, K, rank]
            drawn.append(self.kernels.draw_inverse(*at, int(Purpose.DRAFT), lane=rank, removed=removed))
        tokens, logprob = (torch.stack([getattr(d, name) for d in drawn], -1) for name in ("tokens", "logprob"))
        return _pick(program, level, tokens), logits, lse, _pick(program, level, logprob)

    def _accept_equal(self, program: Program, offered: Offered, scores: Tensor, first: Tensor) -> Decision:
        """Descend to what the target itself chooses: its arg-max, or what plain sampling draws."""
        if self.processor.is_greedy:
            _, chosen = self._stats(scores, 1.0)
        else:
            logits, temperature = self._law(scores)
            lse, _ = self._stats(logits, temperature)
            positions = first[:, None] + program.verify.turns
            chosen = self.kernels.draw_gumbel(
                logits, lse, temperature, self.seed, self.noise.sequences, positions, int(Purpose.TARGET)
            ).tokens
        if not program.depth:
            return Decision(torch.zeros_like(first), chosen)
        if program.layout is None:
            made = offered.replaced(self.kernels.accept_chain_equal(offered.tokens, offered.counts, chosen))
        else:
            made = self.kernels.accept_tree_equal(offered.tokens, None, program.layout.child_table, chosen, program.depth)
        return _decision(made, offered.tokens, chosen.gather(1, made.row.long()[:, None])[:, 0])

    def _accept_drawn(
        self, program: Program, drafted: Sequence[Drafted], offered: Offered, scores: Tensor, first: Tensor
    ) -> Decision:
        """Test every draft against the law it was drawn from; draw the next token from what the refusals left."""
        logits, temperature = self._law(scores)
        law, lse, logprob = (_joined([part(d) for d in drafted]) for part in _PARTS)  # points have none
        tokens = offered.tokens
        who = self.seed, self.noise.sequences, first
        if program.layout is None:
            asked = torch.cat([tokens, tokens[:, :1]], 1).view(-1, 1)  # the last row is asked for nothing
            stats = self.kernels.row_lse(logits.flatten(0, 1), temperature, asked)
            target_lse, target_logprob = stats.lse.view(logits.shape[:2]), stats.logprob.view(logits.shape[:2])[:, :-1]
            law_row = None
            made = offered.replaced(self.kernels.accept_chain(
                tokens, offered.counts, target_logprob.contiguous(), logprob, *who, int(Purpose.ACCEPT)
            ))
        else:
            layout = program.layout
            law_row, (target_lse, _) = layout.law_row, self._stats(logits, temperature)
            made = self.kernels.accept_tree(
                tokens, layout.child_table, law_row, logits, target_lse, law, lse, temperature, *who, int(Purpose.ACCEPT),
                program.depth,
            )
        drawn = self.kernels.draw_residual(
            logits, target_lse, law, lse, law_row, temperature, made, *who, int(Purpose.RESIDUAL)
        )
        return _decision(made, tokens, drawn.tokens)

    def _law(self, scores: Tensor) -> tuple[Tensor, float]:
        """Logits and temperature of the law: top-k and top-p leave one whose logarithm is the logits."""
        p = self.processor
        return (p.law(scores).log(), 1.0) if p.top_k or p.top_p < 1 else (scores, p.temperature)

    def _stats(self, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and arg-max [B, K] of logits [B, K, V]."""
        stats = self.kernels.row_lse(logits.flatten(0, 1), temperature)
        return stats.lse.view(logits.shape[:2]), stats.best.view(logits.shape[:2])


_PARTS: tuple[Callable[[Drafted], Tensor | None], ...] = (lambda d: d.law, lambda d: d.lse, lambda d: d.logprob)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found, 1) if found else None


def _pick(program: Program, level: int, values: Tensor) -> Tensor:
    """Of values [B, K, most] for all possible children of a level those of its real ones, [B, children]."""
    flat = values.flatten(1)
    return flat if program.layout is None else flat.index_select(1, program.layout.levels[level].pick)


def _decision(made: Any, tokens: Tensor, following: Tensor) -> Decision:
    """The tokens of the path, then the one behind it; padding after that."""
    count, path = made.num_accepted.long(), made.path.long()
    along = tokens.gather(1, (path - 1).clamp(min=0))  # [B, depth]
    emitted = torch.cat([along, following[:, None]], 1).scatter(1, count[:, None], following[:, None])
    return Decision(count, emitted, path, made.ranks.long())
