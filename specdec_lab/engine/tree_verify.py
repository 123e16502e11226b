"""Children drawn by a drafter and accepted by the target, without changing the target's law. Chains: verify.py.

    greedy      children are the draft's top-k; the child that is the target's arg-max is accepted
    rejection   children are drawn without replacement and tested one after the other (Sequoia, Chen 2024, section 3.2)
    coupled     children are the top-k of log Q plus the noise with which plain sampling draws the target's token
    point mass  n-gram children are no draws: the target's token is sampled, and accepted if it is a child

**Used-up support.** Where the draft's law holds fewer tokens than a node has children, the surplus children are dead: they
are fed, so that shapes stay static, and never accepted. The verifier knows them by D = 0, where D is Q without the tokens
refused so far: both sides read the stored Q, so what the drafter could not draw any more is what the verifier does not test.

**Noise is keyed by position, so cousins share it.** Children of a node at depth d are drawn and tested with noise of position
p = committed + d + 1 only. Which node of depth d is reached depends on noise of positions below p, independent of it; so
whichever it is, its children are fresh draws. At most one node of a depth is reached. A round ends at the position whose token
it emits without descending, and the next one begins behind it: a position is decided once, and what lies beyond it was
looked at by nobody. Tests of different ranks at one position use different lanes.

Not known here: models, caches, how laws came about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec_kernels.tree_walk import cpu as compiled
from specdec_kernels.tree_walk.reference import Purposes

from .attention import chain_order
from .forced import Forced, forced_ranks
from .models.runner import Scores
from .sampling import Noise, Processor, Purpose, draw
from .tree_layout import Layout
from .verify import Decision, Proposal

_PURPOSES = Purposes(int(Purpose.TARGET), int(Purpose.ACCEPT), int(Purpose.RESIDUAL))


Take = Callable[[Tensor, int], Tensor]


def any_of_equals(values: Tensor, most: int) -> Tensor:
    """Indices [..., most] of the largest values [..., V], in order. Asks the host nothing."""
    return values.topk(most, dim=-1).indices


def lower_of_equals(values: Tensor, most: int) -> Tensor:
    """The same, on a CPU with the lower of equals first, as in the compiled decoder; elsewhere looking would be waiting."""
    if values.device.type != "cpu":
        return any_of_equals(values, most)
    found = values.topk(min(most + 1, values.shape[-1]), dim=-1)
    if bool((found.values[..., 1:] == found.values[..., :-1]).any()):
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    return found.indices[..., :most]


def choose_children(
    scores: Scores, most: int, position: Tensor, processor: Processor, verifier: str, noise: Noise,
    take: Take = any_of_equals,
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, T, most] for the children of T nodes, best or first drawn first, and the laws [B, T, V] they were drawn from.

    position  [B] where the children stand
    rejection  drawn one after the other from what is left of Q, one uniform per rank; the laws are returned
    coupled    the largest of log Q + Gumbel noise, which is such a draw too (Vieira 2014), with plain sampling's noise
    """
    if processor.is_greedy:
        return scores.best[..., None] if most == 1 else take(scores.logits, most), None
    law = processor.law(scores.logits)
    if verifier == "coupled":
        gumbel = noise.gumbel(position[:, None], law.shape[-1], Purpose.TARGET)  # [B, 1, V]
        return take(law.double().log() + gumbel, most), None
    lanes = torch.arange(most, device=position.device)
    uniforms = noise.uniform(position[:, None].expand(-1, most), Purpose.DRAFT, lanes)  # [B, most]
    left, tokens = law.double(), []
    for rank in range(most):
        tokens.append(draw(left, uniforms[:, rank : rank + 1].expand(law.shape[:2])))
        if rank + 1 < most:
            left = left.scatter(-1, tokens[-1][..., None], 0.0)
    return torch.stack(tokens, -1), law


Over = Callable[[Tensor], bool]


def all_rows(rows: Tensor) -> bool:
    """Whether all are true, read from the device."""
    return bool(rows.all())


def accept_children(
    target_law: Tensor, draft_law: Tensor, tokens: Tensor, exists: Tensor, uniforms: Tensor, over: Over | None = None
) -> tuple[Tensor, Tensor]:
    """Test the children of one node per row in draw order; the law of the emitted token is target_law.

    target_law, draft_law  [B, V]: P, and Q from which the children were drawn without replacement
    tokens, exists         [B, K] children in draw order, and which of them were drafted
    uniforms               [B, K] in [0, 1), one per test
    over                   sees which rows have accepted a child: whether to stop. None: ask the device nothing
    returns                [B] rank of the accepted child, 1..K, or 0; and [B, V] the law that the token of a row with rank 0
                           has to be drawn from
    For any D, R(u) = min(D, R)(u) + P(refuse) * norm(max(R - D, 0))(u): applied child by child, D being Q without the refused
    tokens, renormalised. A dead child (D = 0) is not tested.
    """
    left, offered = target_law.double(), draft_law.double()
    left = left / left.sum(-1, keepdim=True)
    rank = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    for place in range(tokens.shape[1]):
        if place and over is not None and over(rank > 0):
            break
        offered = offered / offered.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        token = tokens[:, place : place + 1]
        d, r = offered.gather(1, token)[:, 0], left.gather(1, token)[:, 0]
        rest = (left - offered).clamp(min=0)
        mass = rest.sum(-1)
        tested = exists[:, place] & (rank == 0) & (d > 0)
        # an empty residual means R = D, where refusal has chance zero: rounding brought us there
        takes = tested & (r > 0) & ((uniforms[:, place] * d < r) | (mass <= 0))
        rank = torch.where(takes, place + 1, rank)
        refused = tested & ~takes & (mass > 0)
        left = torch.where(refused[:, None], rest / mass.clamp(min=torch.finfo(torch.float64).tiny)[:, None], left)
        offered = offered.scatter(1, token, 0.0)
    return rank, left


Step = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def decide_tree(
    proposal: Proposal, scores: Scores, first_position: Tensor, processor: Processor, verifier: str, noise: Noise,
    forced: Forced | None = None,
) -> Decision:
    """Accept a path of the tree given the target's scores [B, N+1] at root and nodes.

    first_position  [B] position of the first token that this round decides
    """
    layout = proposal.layout
    assert layout is not None
    wanted = None if forced is None else wanted_ranks(layout, first_position, noise, forced)
    if processor.is_greedy:
        return _match_on_host(proposal, layout, scores.best, wanted)
    drawn_from = proposal.law if verifier == "rejection" else None
    if wanted is None and _is_compiled(scores, drawn_from):
        return _walk_compiled(proposal, layout, drawn_from, scores, first_position, processor, noise)
    if drawn_from is None:
        step = matching(proposal, layout, scores, first_position, processor, noise)
    else:
        step = testing(proposal, layout, drawn_from, scores, first_position, processor, noise, all_rows)
    if wanted is not None:
        step = _forcing(step, proposal, layout, wanted)
    return walk(layout, step, proposal.counts, all_rows)


def _is_compiled(scores: Scores, drawn_from: Tensor | None) -> bool:
    """Whether a compiled step decides a level for all rows: on a CPU, laws in float32."""
    wide = scores.logits.dtype == torch.float64 or (drawn_from is not None and drawn_from.dtype != torch.float32)
    return scores.logits.device.type == "cpu" and not wide and compiled.why_not() is None


def _walk_compiled(
    proposal: Proposal, layout: Layout, drawn_from: Tensor | None, scores: Scores, first_position: Tensor,
    processor: Processor, noise: Noise,
) -> Decision:  # fmt: skip
    """Descend by compiled steps, which compute no law but those of the nodes that were reached. The same as `walk`."""
    going = compiled.start(
        proposal.tokens, proposal.exists, layout.num_children, layout.depth, drawn_from, noise.seed, noise.sequences,
        first_position, _PURPOSES,
    )  # fmt: skip
    rows = chain_order(first_position.shape[0], first_position.device)
    while going.step(processor.law(scores.logits[rows, going.node])):
        pass
    return _decision(going.made, layout.depth)


def wanted_ranks(layout: Layout, first_position: Tensor, noise: Noise, forced: Forced) -> Tensor:
    """[B, depth] which child of the node reached at each depth is accepted where that is forced; 0 for none."""
    device = first_position.device
    within = torch.tensor(forced.ranks(max(layout.widest)), dtype=torch.float64, device=device)
    positions = first_position[:, None] + torch.arange(layout.depth, device=device)
    return forced_ranks(noise.uniform(positions, Purpose.FORCE), within)


def _forcing(step: Step, proposal: Proposal, layout: Layout, wanted: Tensor) -> Step:
    """Run `step`, and descend to the wanted child instead, where the row drafted it."""

    def forced_step(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        rank, token = step(node, depth)
        if layout.widest[depth] == 0:
            return rank, token
        children, exists = children_of(proposal, layout, node, depth)
        at = (wanted[:, depth] - 1).clamp(min=0)[:, None]
        there = (wanted[:, depth] > 0) & (at[:, 0] < children.shape[1])
        at = at.clamp(max=children.shape[1] - 1)
        there = there & exists.gather(1, at)[:, 0]
        return torch.where(there, wanted[:, depth], 0), torch.where(there, children.gather(1, at)[:, 0], token)

    return forced_step


def _match_on_host(proposal: Proposal, layout: Layout, best: Tensor, wanted: Tensor | None = None) -> Decision:
    """Descend to the children that equal the target's tokens best [B, N+1]: a few list look-ups, cheaper than tensors.

    wanted  [B, depth] ranks to descend to instead
    """
    targets, device = best.tolist(), best.device
    exists = proposal.exists.tolist() if proposal.exists is not None else [None] * len(targets)
    forced = [None] * len(targets) if wanted is None else wanted.tolist()
    drafts = proposal.tokens.tolist()
    found = [_descend(layout, *row) for row in zip(targets, drafts, exists, forced, strict=True)]
    deepest = max(len(path) for path, _ in found)
    made = []  # per row: how many are accepted; their nodes and ranks, padded; their tokens and the one behind them, padded
    for row, drafted, (path, ranks) in zip(targets, drafts, found, strict=True):
        rest = [0] * (deepest - len(path))
        tokens = [*(drafted[node - 1] for node in path), row[path[-1] if path else 0]]
        made.append([len(path), *path, *rest, *ranks, *rest, *tokens, *rest])
    return _decision(torch.tensor(made, dtype=torch.int64, device=device), deepest)


def _decision(made: Tensor, depth: int) -> Decision:
    """Out of one tensor [B, 3 * depth + 2]: num_accepted, path, ranks, tokens."""
    count, path, ranks, tokens = made.split([1, depth, depth, depth + 1], 1)
    return Decision(count[:, 0], tokens, path, ranks)


def _descend(
    layout: Layout, targets: Sequence[int], tokens: Sequence[int], exists: Sequence[bool] | None,
    wanted: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """The nodes below the root of one row that are the target's token (or wanted) behind their parent, and their ranks."""
    path: list[int] = []
    ranks: list[int] = []
    node = 0
    while True:
        equal = (rank for rank, child in enumerate(layout.children[node], start=1)
                 if tokens[child - 1] == targets[node] and (exists is None or exists[child - 1]))  # fmt: skip
        rank = next(equal, 0)
        if wanted is not None and layout.children[node]:
            rank = wanted[len(path)]
            rank = rank if rank <= len(layout.children[node]) else 0
            rank = rank if rank and (exists is None or exists[layout.children[node][rank - 1] - 1]) else 0
        if rank == 0:
            return path, ranks
        node = layout.children[node][rank - 1]
        path.append(node)
        ranks.append(rank)


def walk(layout: Layout, step: Step, counts: Tensor, over: Over | None = None) -> Decision:
    """Descend from the root until no child is accepted.

    over  sees which rows stand still: whether to stop early. None: go down to the deepest level, and ask the device nothing
    step  (node [B], depth) -> rank of the accepted child (0: none) and the token emitted behind the node, each [B]
    """
    node, moving = torch.zeros_like(counts), torch.ones_like(counts, dtype=torch.bool)
    accepted, tokens, path, ranks = torch.zeros_like(counts), [], [], []
    for depth in range(layout.depth + 1):
        rank, token = step(node, depth)
        tokens.append(token)
        if depth == layout.depth:
            break
        moving = moving & (rank > 0)
        accepted = accepted + moving
        node = torch.where(moving, layout.child_table[node, rank - 1], node)
        path.append(node)
        ranks.append(rank)
        if over is not None and over(~moving):
            break
    return Decision(accepted, torch.stack(tokens, 1), torch.stack(path, 1), torch.stack(ranks, 1))


def children_of(proposal: Proposal, layout: Layout, node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, K] of each row's children of its node, and which of them were drafted."""
    kids = layout.child_table[node, : layout.widest[depth]]
    at = (kids - 1).clamp(min=0)
    exists = kids > 0
    if proposal.exists is not None:
        exists = exists & proposal.exists.gather(1, at)
    return proposal.tokens.gather(1, at), exists


def matching(
    proposal: Proposal, layout: Layout, scores: Scores, first_position: Tensor, processor: Processor, noise: Noise
) -> Step:
    """Emit what plain sampling draws behind a node, and descend to the child that equals it. Siblings are distinct."""
    rows = torch.arange(first_position.shape[0], device=first_position.device)

    def step(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        law = processor.law(scores.logits[rows, node])
        token = noise.draw(law[:, None], first_position[:, None] + depth, Purpose.TARGET)[:, 0]
        if layout.widest[depth] == 0:
            return torch.zeros_like(token), token
        children, exists = children_of(proposal, layout, node, depth)
        equal = exists & (children == token[:, None])
        return torch.where(equal.any(1), equal.to(torch.int8).argmax(1) + 1, 0), token

    return step


def testing(
    proposal: Proposal, layout: Layout, laws: Tensor, scores: Scores, first_position: Tensor, processor: Processor,
    noise: Noise, over: Over | None,
) -> Step:  # fmt: skip
    """Test the children in draw order; where none is accepted, draw from what is left."""
    batch, device = first_position.shape[0], first_position.device
    rows, most, depths = torch.arange(batch, device=device), max(layout.widest), torch.arange(layout.depth + 1, device=device)
    positions, lanes = first_position[:, None] + depths, torch.arange(most, device=device)
    tests = noise.uniform(positions[:, :-1].repeat_interleave(most, 1), Purpose.ACCEPT, lanes.repeat(layout.depth))
    tests = tests.view(batch, layout.depth, most)  # [B, depth, K], all in one call: the generator has a price per call
    last = noise.uniform(positions, Purpose.RESIDUAL)

    def step(node: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        law = processor.law(scores.logits[rows, node])
        if layout.widest[depth] == 0:
            return torch.zeros_like(node), draw(law, last[:, depth])
        children, exists = children_of(proposal, layout, node, depth)
        uniforms = tests[:, depth, : children.shape[1]]
        rank, left = accept_children(law, laws[rows, layout.law_row[node]], children, exists, uniforms, over)
        drawn = draw(left, last[:, depth])
        taken = children.gather(1, (rank - 1).clamp(min=0)[:, None])[:, 0]
        return rank, torch.where(rank > 0, taken, drawn)

    return step
