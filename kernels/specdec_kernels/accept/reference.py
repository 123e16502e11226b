"""What accepting means, in torch on any device. gpu.py computes the same; same arguments, same order.

Each function is one launch for the whole batch there. Nodes are numbered breadth-first from the root, 0; a chain along itself;
the drafted token of node v is tokens[:, v - 1]. `purpose` names the random numbers (noise/reference.py).
Not known here: how laws came about, who draws the token behind the last accepted one (sample_rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..noise.reference import uniform
from ..row_lse.reference import law


@dataclass(frozen=True, slots=True)
class Accepted:
    """What was accepted, and the law that the next token has to be drawn from. All entries are written, used or not.

    num_accepted  int32 [B]
    path, ranks   int32 [B, A] accepted nodes and which child of its parent each is (1 is the first); 0 beyond num_accepted
    row           int32 [B] the last accepted node (0: the root): the row of target logits that the next token is drawn from
    num_refused   int32 [B] children of that node that were tested and refused: 0 means that the target's law itself applies
    refused       int64 [B, K] their tokens, in the order of the tests; -1 beyond num_refused
    offered_mass, rest_mass  float64 [B, K] what the laws of each refusal were divided by (sample_rows.draw_residual); else 1
    """

    num_accepted: Tensor
    path: Tensor
    ranks: Tensor
    row: Tensor
    num_refused: Tensor
    refused: Tensor
    offered_mass: Tensor
    rest_mass: Tensor

    @classmethod
    def empty(cls, batch: int, depth: int, most: int, device: torch.device) -> Accepted:
        """Room for paths of `depth` nodes where a node has at most `most` children (a chain: 1)."""

        def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        return cls(
            make(batch), make(batch, depth), make(batch, depth), make(batch), make(batch), make(batch, most, dtype=torch.int64),
            make(batch, most, dtype=torch.float64), make(batch, most, dtype=torch.float64),
        )  # fmt: skip

    def clear(self) -> Accepted:
        """Nothing accepted, nothing refused."""
        for counted in (self.num_accepted, self.path, self.ranks, self.row, self.num_refused):
            counted.zero_()
        self.refused.fill_(-1)
        self.offered_mass.fill_(1.0)
        self.rest_mass.fill_(1.0)
        return self


def accept_chain_equal(tokens: Tensor, counts: Tensor, chosen: Tensor, out: Accepted | None = None) -> Accepted:
    """Accept drafts as long as they equal what the target chose: greedy and coupled verification.

    tokens  [B, N] drafted, of which counts [B] are real; chosen [B, N+1] the target's own token behind the root and each draft
    The next token is chosen[b, row[b]].
    """
    order = torch.arange(tokens.shape[1], device=tokens.device)
    equal = (tokens == chosen[:, :-1]) & (order < counts[:, None])
    return _chain(equal, tokens, torch.zeros_like(counts), out)


def accept_chain(
    tokens: Tensor, counts: Tensor, target_logprob: Tensor, draft_logprob: Tensor | None, seed: int | Tensor, sequences: Tensor,
    first_positions: Tensor, purpose: int, out: Accepted | None = None,
) -> Accepted:  # fmt: skip
    """Accept each draft x with chance min(1, p(x) / q(x)) until one is refused (Leviathan 2023).

    tokens           [B, N] drafted, of which counts [B] are real
    target_logprob, draft_logprob  float32 [B, N] of the drafted tokens (row_lse); no draft_logprob: q = 1 (a point mass)
    seed             an int, or int64 [1] on the device, which a captured graph reads anew
    sequences        [B] identity of each row's sequence
    first_positions  [B] where the first draft stands; draft i is tested with the uniform of position first + i
    """
    order = torch.arange(tokens.shape[1], device=tokens.device)
    u = uniform(seed, sequences, first_positions[:, None] + order, purpose)
    q = 1.0 if draft_logprob is None else draft_logprob.exp()
    takes = (u * q < target_logprob.exp()) & (order < counts[:, None])
    return _chain(takes, tokens, counts, out)


def _chain(takes: Tensor, tokens: Tensor, counts: Tensor, out: Accepted | None) -> Accepted:
    """The first of takes [B, N]; a draft of the counts [B] that could be refused, if one was."""
    order = torch.arange(tokens.shape[1], device=tokens.device)
    accepted = takes.long().cumprod(1).sum(1)
    out = (Accepted.empty(tokens.shape[0], tokens.shape[1], 1, tokens.device) if out is None else out).clear()
    out.num_accepted.copy_(accepted)
    out.row.copy_(accepted)
    out.path.copy_((order + 1) * (order < accepted[:, None]))
    out.ranks.copy_(order < accepted[:, None])
    refused = accepted < counts
    out.num_refused.copy_(refused)
    if tokens.shape[1]:
        at = accepted.clamp(max=tokens.shape[1] - 1)[:, None]
        out.refused.copy_(torch.where(refused[:, None], tokens.gather(1, at), -1))
    return out


def accept_tree_equal(
    tokens: Tensor, exists: Tensor | None, children: Tensor, chosen: Tensor, depth: int, out: Accepted | None = None
) -> Accepted:
    """Descend to the child that is what the target chose behind its parent: greedy and coupled verification, n-gram trees.

    tokens, exists  [B, N] drafted tokens, and which of them a row has (None: all)
    children        [N+1, K] int32 or int64: children of each node in rank order, then -1
    chosen          [B, N+1] the target's own token behind the root and every node; siblings differ
    depth           of the tree. The next token is chosen[b, row[b]]
    """
    out = (Accepted.empty(tokens.shape[0], depth, children.shape[1], tokens.device) if out is None else out).clear()
    families = children.tolist()
    for b in range(tokens.shape[0]):
        node = 0
        for place in range(depth):
            family = [v for v in families[node] if v > 0]
            equal = [bool(tokens[b, v - 1] == chosen[b, node]) and (exists is None or bool(exists[b, v - 1])) for v in family]
            rank = equal.index(True) + 1 if True in equal else 0
            if rank == 0:
                break
            node = families[node][rank - 1]
            _descend(out, b, place, node, rank)
    return out


def accept_tree(
    tokens: Tensor, children: Tensor, law_row: Tensor, target: Tensor, target_lse: Tensor, draft: Tensor, draft_lse: Tensor,
    temperature: float, seed: int | Tensor, sequences: Tensor, first_positions: Tensor, purpose: int, depth: int,
    out: Accepted | None = None,
) -> Accepted:  # fmt: skip
    """Test children in draw order, each against what the refusals before it left of both laws (Sequoia 2024, section 3.2).

    tokens               [B, N], drawn without replacement among siblings
    children             [N+1, K] int32 or int64: children of each node in draw order, then -1
    law_row              [N+1] which row of `draft` the children of a node were drawn from; of a leaf, any
    target, target_lse   logits [B, N+1, V] at the root and every node, and the log-sum-exp of logits / temperature
    draft, draft_lse     logits [B, M, V] as stored when the children were drawn from them, and theirs
    temperature, seed, sequences, depth  as elsewhere
    first_positions      [B] where children of the root stand; child `rank` (from 0) of a node at depth d is tested with the
                         uniform of position first + d, lane rank
    P = R_0 and Q = D_0; D_j is Q without the j tokens refused so far, divided by its sum (offered_mass[j]; 1 for j = 0: laws
    sum to 1 within float32). A child s with D_j(s) = 0 is dead: no test. Accepted if u D_j(s) < R_j(s); else
    R_(j+1) = max(R_j - D_j, 0) / rest_mass[j], of which the next token is drawn where nobody is accepted. A rest of mass
    zero means R_j = D_j, where refusal has chance zero: accepted. Sums are float64.
    """
    out = (Accepted.empty(tokens.shape[0], depth, children.shape[1], tokens.device) if out is None else out).clear()
    families, positions = children.tolist(), first_positions[:, None] + torch.arange(depth, device=tokens.device)
    lanes = torch.arange(children.shape[1], device=tokens.device)
    u = uniform(seed, sequences, positions[..., None], purpose, lanes)  # [B, depth, K]
    for b in range(tokens.shape[0]):
        node = 0
        for place in range(depth):
            family = [int(tokens[b, child - 1]) for child in families[node] if child > 0]
            rows = (target[b, node], target_lse[b, node]), (draft[b, law_row[node]], draft_lse[b, law_row[node]])
            p, q = (law(*row, temperature).double() for row in rows)
            rank = _test_family(p, q, family, u[b, place], out, b)
            if rank == 0:
                break
            node = families[node][rank - 1]
            _descend(out, b, place, node, rank)
    return out


def _test_family(left: Tensor, q: Tensor, family: list[int], u: Tensor, out: Accepted, b: int) -> int:
    """The rank of the accepted child, or 0; refusals go to row b of out."""
    offered, mass = q.clone(), 1.0
    for rank, token in enumerate(family):
        d, r = float(offered[token]) / mass if mass > 0 else 0.0, float(left[token])  # used-up support: dead children
        if d == 0:
            continue
        rest = (left - offered / mass).clamp(min=0)
        if r > 0 and (float(u[rank]) * d < r or rest.sum() == 0):
            return rank + 1
        if rest.sum() == 0:
            continue
        count = int(out.num_refused[b])
        out.refused[b, count], out.offered_mass[b, count], out.rest_mass[b, count] = token, mass, rest.sum()
        out.num_refused[b] += 1
        left = rest / rest.sum()
        offered[token] = 0.0
        mass = float(offered.sum())
    return 0


def _descend(out: Accepted, b: int, place: int, node: int, rank: int) -> None:
    out.num_accepted[b], out.row[b], out.path[b, place], out.ranks[b, place] = place + 1, node, node, rank
    out.num_refused[b] = 0
    out.refused[b], out.offered_mass[b], out.rest_mass[b] = -1, 1.0, 1.0
