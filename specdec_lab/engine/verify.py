"""Score a proposed chain with the target and accept a path without changing the target's law. Trees: tree_verify.py.

Three verifiers: greedy (the arg-max is the law), rejection (exact law, best acceptance; Leviathan 2023), coupled (the token
that plain sampling with the same seed emits, so output is equal token for token). Not known here: models, caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import chain_order
from .forced import Forced, forced_accept
from .models.runner import Scores
from .sampling import Noise, Processor, Purpose, draw
from .tree_layout import Layout


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a drafter offers: a chain per row, or a tree.

    tokens  [B, N] int64 by node; of a chain, entries at and beyond counts are padding
    counts  [B] int64 drafted tokens of each row, 0..N
    law     [B, N, V] the law each token was drawn from, or None for a point mass (greedy drafts, n-grams, coupled);
            of a tree [B, M, V], the law that the children of each node that has any were drawn from (Layout.law_row)
    layout  of a tree
    nodes   which nodes of the TreeShape each row drafted, where not all rows drafted all; their bits are `exists` [B, N]
    is_plain  nothing is drafted because nothing was to be, or what would have been is sampled like plain text (n-gram trees):
              plain sampling's own noise decides. A chain that found nothing to draft is decided as rows beside it are
    """

    tokens: Tensor
    counts: Tensor
    law: Tensor | None = None
    layout: Layout | None = None
    nodes: tuple[tuple[int, ...], ...] = ()
    exists: Tensor | None = None
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """num_accepted [B] drafted tokens accepted; tokens [B, N+1]: the accepted ones, then the target's own next token.

    Of a tree: tokens [B, depth+1]; path [B, depth] the accepted nodes and ranks [B, depth] which child of its parent each is
    (1 is the first), both valid up to num_accepted.
    """

    num_accepted: Tensor
    tokens: Tensor
    path: Tensor | None = None
    ranks: Tensor | None = None


def accept_equal(proposal: Proposal, target: Tensor, forced: Tensor | None = None) -> Decision:
    """Accept drafts as long as they equal the target's own choices [B, N+1]; emit those choices.

    forced  [B] how many to accept instead; the accepted drafts are emitted, then the target's choice
    """
    num_drafted = proposal.tokens.shape[1]
    if num_drafted == 0:
        return Decision(proposal.counts, target)
    order = chain_order(num_drafted, target.device)
    equal = (proposal.tokens == target[:, :num_drafted]) & (order < proposal.counts[:, None])
    count = equal.cumprod(1).sum(1)
    if forced is None:
        return Decision(count, target)
    drafts = torch.cat([proposal.tokens, target[:, -1:]], 1)
    return Decision(forced, torch.where(chain_order(num_drafted + 1, target.device) < forced[:, None], drafts, target))


def accept_rejection(
    proposal: Proposal, target_law: Tensor, accept_u: Tensor, residual_u: Tensor, forced: Tensor | None = None
) -> Decision:
    """Speculative sampling: accept x with chance min(1, p(x)/q(x)), else draw from max(p - q, 0) (Leviathan 2023, A.1).

    target_law  [B, N+1, V]; accept_u [B, N], residual_u [B, N+1] uniforms in [0, 1), one per position
    forced      [B] how many to accept instead
    """
    batch, num_drafted = proposal.tokens.shape
    rows = torch.arange(batch, device=target_law.device)
    p = target_law[:, :num_drafted].gather(-1, proposal.tokens[..., None])[..., 0]  # [B, N]
    q = torch.ones_like(p) if proposal.law is None else proposal.law.gather(-1, proposal.tokens[..., None])[..., 0]
    order = torch.arange(num_drafted, device=target_law.device)
    accepted = (accept_u * q < p) & (order < proposal.counts[:, None])
    count = accepted.long().cumprod(1).sum(1)
    count = count if forced is None else forced
    weights = target_law[rows, count]  # [B, V]: the law after the last accepted token
    rejected = count < proposal.counts
    if num_drafted:
        at = count.clamp(max=num_drafted - 1)
        refused = proposal.tokens[rows, at]
        removed = (
            torch.zeros_like(weights).scatter_(1, refused[:, None], 1.0) if proposal.law is None
            else proposal.law[rows, at].to(weights.dtype)
        )
        residual = (weights - removed).clamp(min=0)
        # an empty residual means p = q, where rejection has chance zero: rounding brought us here, p itself is right
        usable = rejected & (residual.sum(-1) > 0)
        weights = torch.where(usable[:, None], residual, weights)
    following = draw(weights, residual_u[rows, count])
    tokens = torch.cat([proposal.tokens, following[:, None]], 1)
    return Decision(count, tokens.scatter(1, count[:, None], following[:, None]))


def forced_count(proposal: Proposal, first_position: Tensor, noise: Noise, forced: Forced) -> Tensor:
    """[B] how many drafts of a chain are accepted where that is forced."""
    depth = proposal.tokens.shape[1]
    positions = first_position[:, None] + torch.arange(depth, device=first_position.device)
    chances = torch.tensor(forced.chances(depth), dtype=torch.float64, device=first_position.device)
    return forced_accept(noise.uniform(positions, Purpose.FORCE), chances, proposal.counts)


def decide(
    proposal: Proposal, scores: Scores, first_position: Tensor, processor: Processor, verifier: str, noise: Noise,
    forced: Forced | None = None,
) -> Decision:
    """Accept a path of `proposal` given the target's scores [B, N+1] at root and drafts.

    first_position  [B] position of the first token that this round decides
    """
    count = None
    if forced is not None and proposal.tokens.shape[1]:
        count = forced_count(proposal, first_position, noise, forced)
    return decide_chain(proposal, scores, first_position, processor, verifier, noise, count)


def decide_chain(
    proposal: Proposal, scores: Scores, first_position: Tensor, processor: Processor, verifier: str, noise: Noise,
    count: Tensor | None,
) -> Decision:
    """See decide; count [B] how many drafts are accepted where that is forced. Asks the device nothing."""
    if processor.is_greedy:
        return accept_equal(proposal, scores.best, count)
    law = processor.law(scores.logits)
    num_drafted = proposal.tokens.shape[1]
    positions = first_position[:, None] + torch.arange(num_drafted + 1, device=law.device)
    if verifier == "coupled" or proposal.is_plain:  # plain sampling is what a coupled run must equal
        return accept_equal(proposal, noise.draw(law, positions, Purpose.TARGET), count)
    return accept_rejection(
        proposal, law, noise.uniform(positions[:, :num_drafted], Purpose.ACCEPT), noise.uniform(positions, Purpose.RESIDUAL),
        count,
    )


def choose_draft(
    scores: Scores, position: Tensor, processor: Processor, verifier: str, noise: Noise
) -> tuple[Tensor, Tensor | None]:
    """The drafted token [B] at position [B] for draft scores [B, 1], and the law it was drawn from (rejection only)."""
    if processor.is_greedy:
        return scores.best[:, 0], None
    law = processor.law(scores.logits[:, 0])
    if verifier == "coupled":
        return noise.draw(law[:, None], position[:, None], Purpose.TARGET)[:, 0], None
    return draw(law, noise.uniform(position[:, None], Purpose.DRAFT)[:, 0]), law
