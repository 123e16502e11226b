"""The kernels of a round against their references on this device: every output, from the same random inputs.

Integers and moved bytes must be equal. Real numbers are compared with the reference in float64. Draws may differ where two
scores, or a uniform and a border, are as close as rounding: a share of them is allowed. Not known here: the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from specdec_kernels.tree_attention.gpu import is_interpreted

Finding = tuple[str, float, float]  # what, error, allowed; allowed 0: equal
DRAWS_DIFFER = 0.02  # of the draws
LOGS = 2e-5  # of log-sum-exps and log-probabilities, absolute
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
SEED, PURPOSE = 0x1234_5678_9ABC, 2
VOCABULARIES = (  # of draws: tokens, their type, sequences
    (1_009, torch.float32, 16), (2_048, torch.bfloat16, 2), (2_049, torch.float32, 2), (128_256, torch.bfloat16, 8),
)  # fmt: skip


def both(name: str, device: torch.device) -> tuple[Any, Any]:
    """A kernel's module for this device, and its reference, which on a CPU without Triton's interpreter stands in for it."""
    reference = import_module(f"specdec_kernels.{name}.reference")
    runs_here = device.type == "cuda" or is_interpreted()
    return (import_module(f"specdec_kernels.{name}.gpu") if runs_here else reference), reference


def rope_append(device: torch.device) -> Iterator[Finding]:
    """Queries, and the whole cache, of a ragged batch; one token is left out."""
    ours, reference = both("rope_append", device)
    batch, tokens, heads, kv_heads, dim, slots, positions = 3, 5, 8, 2, 128, 70, 300
    angles = torch.randn(positions, dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    start = torch.tensor([0, 40, 63], device=device)
    at = start[:, None] + torch.arange(tokens, device=device)
    where = at.clone()
    where[1, 2] = -1
    for dtype, bar in ROUNDED.items():
        for normed in (False, True):
            qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * dim, device=device).to(dtype)
            kv = torch.randn(2, batch, kv_heads, slots, dim, device=device).to(dtype)
            norms = (torch.rand(dim, device=device).to(dtype) + 0.5, torch.rand(dim, device=device).to(dtype) + 0.5)
            given = norms if normed else (None, None)
            mine, right = kv.clone(), kv.double()
            out = ours.rope_append(qkv, at, where, cos, sin, mine, *given)
            exact = [norm.double() for norm in norms] if normed else given
            truth = reference.rope_append(qkv.double(), at, where, cos.double(), sin.double(), right, *exact)
            what = f"rope_append {str(dtype).removeprefix('torch.')}{' normed' if normed else ''}"
            yield what, max(_worst(out, truth), _worst(mine, right)), bar


def kv_compact(device: torch.device) -> Iterator[Finding]:
    """Moved bits of rows with no, some and all nodes accepted; and of long paths, whose places are the sources of others."""
    ours, reference = both("kv_compact", device)
    short = ([[2, 5, 6], [1, 2, 3], [3, 0, 0], [4, 6, 7]], [3, 3, 1, 0], [0, 17, 64, 70])
    shifted = ([list(range(2, 15)), [*range(1, 7), *range(8, 15)], list(range(1, 27, 2))], [13, 13, 12], [0, 40, 66])
    for what, (paths, accepted, before) in (("kv_compact", short), ("kv_compact of overlapping moves", shifted)):
        path, counts, committed = (torch.tensor(t, device=device, dtype=torch.int32) for t in (paths, accepted, before))
        for heads, dim, dtype in ((2, 64, torch.bfloat16), (5, 80, torch.float32)):
            kv = torch.randn(3, 2, len(paths), heads, 80, dim, device=device).to(dtype)
            made = ours.kv_compact(kv.clone(), path, counts, committed)
            kind = f"{str(dtype).removeprefix('torch.')} {heads} x {dim}"
            yield f"{what} {kind}", _differs(made, reference.kv_compact(kv.clone(), path, counts, committed)), 0.0


def row_lse(device: torch.device) -> Iterator[Finding]:
    """Of one row and of many, over vocabularies that end at and beside a program's block, with tokens that do not exist."""
    ours, reference = both("row_lse", device)
    for dtype, vocab, rows in (
        (torch.bfloat16, 128_256, 7), (torch.float32, 1_009, 7), (torch.float32, 4_096, 1), (torch.bfloat16, 4_097, 70),
    ):  # fmt: skip
        logits = (4 * torch.randn(rows, vocab, device=device)).to(dtype)
        logits[0, -1] = 50.0
        ids = torch.randint(-1, vocab + 1, (rows, 3), device=device)
        made, right = ours.row_lse(logits, 0.8, ids), reference.row_lse(logits.double(), 0.8, ids)
        what = f"row_lse {str(dtype).removeprefix('torch.')} {rows} x {vocab}"
        yield f"{what}: arg-max", _differs(made.best, right.best), 0.0
        yield f"{what}: values", max(_apart(made.lse, right.lse), _apart(made.logprob, right.logprob)), LOGS
        again, alone = ours.row_lse(logits, 0.8, ids), ours.row_lse(logits[-1:], 0.8, ids[-1:])
        yield f"{what}: the same bits again and alone", _differs(
            torch.cat([made.lse, made.lse[-1:]]), torch.cat([again.lse, alone.lse])
        ), 0.0


def accept(device: torch.device) -> Iterator[Finding]:
    """Chains and a tree, by equality and by tests."""
    ours, reference = both("accept", device)
    batch, depth, vocab = 6, 4, 1_009
    tokens = torch.randint(0, 3, (batch, depth), device=device)
    counts = torch.tensor([4, 4, 2, 0, 4, 1], device=device)
    chosen = torch.randint(0, 3, (batch, depth + 1), device=device)
    first = torch.arange(batch, device=device) + 100
    sequences = torch.arange(batch, device=device)
    yield from _accepted("chain by equality", ours.accept_chain_equal, reference.accept_chain_equal, (tokens, counts, chosen))
    p, q = (-torch.rand(batch, depth, device=device) * 2 for _ in range(2))
    given = (tokens, counts, p, q, SEED, sequences, first, PURPOSE)
    yield from _accepted("chain by tests", ours.accept_chain, reference.accept_chain, given)
    children = torch.tensor([[1, 2], [3, -1], [-1, -1], [-1, -1]], device=device)
    nodes = torch.stack([torch.randperm(3, device=device) for _ in range(batch)])
    picked = torch.randint(0, 3, (batch, 4), device=device)
    equal = (nodes, None, children, picked, 2)
    yield from _accepted("tree by equality", ours.accept_tree_equal, reference.accept_tree_equal, equal)
    target, draft = (torch.randn(batch, rows, vocab, device=device) for rows in (4, 2))
    lses = [(logits / 0.8).logsumexp(-1) for logits in (target, draft)]
    law_row = torch.tensor([0, 1, 0, 0], device=device)
    tested = (nodes, children, law_row, target, lses[0], draft, lses[1], 0.8, SEED, sequences, first, PURPOSE, 2)
    yield from _accepted("tree by tests", ours.accept_tree, reference.accept_tree, tested)


def _accepted(what: str, ours: Any, reference: Any, given: tuple[Any, ...]) -> Iterator[Finding]:
    made, right = ours(*given), reference(*given)
    names = ("num_accepted", "path", "ranks", "row", "num_refused", "refused")
    yield f"accept {what}", max(_differs(getattr(made, name), getattr(right, name)) for name in names), 0.0


def sample_rows(device: torch.device) -> Iterator[Finding]:
    """Draws of many positions, from vocabularies that end at and beside a program's block; the same bits again, and alone."""
    ours, reference = both("sample_rows", device)
    tokens = 4
    for vocab, dtype, batch in VOCABULARIES if device.type == "cuda" else VOCABULARIES[:-1]:  # the interpreter is slow
        logits = (3 * torch.randn(batch, tokens, vocab, device=device)).to(dtype)
        lse, sequences = (logits.float() / 0.8).logsumexp(-1), torch.arange(batch, device=device)
        positions = (torch.arange(tokens, device=device).expand(batch, -1) + 50).contiguous()
        refused = _refused(logits, sequences)
        laws = (logits, lse, logits[:, 1:].contiguous(), lse[:, 1:].contiguous(), None, 0.8)
        what = f"{str(dtype).removeprefix('torch.')} {vocab}"
        given = (logits, lse, 0.8, SEED, sequences, positions, PURPOSE)
        residual = (*laws, refused, SEED, sequences, positions[:, 0].contiguous(), PURPOSE)
        for name, args in (("draw_gumbel", given), ("draw_inverse", given), ("draw_residual", residual)):
            draw = getattr(ours, name)
            made, right = draw(*args), getattr(reference, name)(*args)
            differs = float((made.tokens != right.tokens).float().mean())
            yield f"sample_rows {name} {what}", differs, DRAWS_DIFFER if made.tokens.numel() > 50 else 0.0
            yield f"sample_rows {name} {what}, again", _differs(draw(*args).tokens, made.tokens), 0.0
        alone = ours.draw_inverse(logits[-1:], lse[-1:], 0.8, SEED, sequences[-1:], positions[-1:], PURPOSE)
        yield f"sample_rows draw_inverse {what}, alone", _differs(alone.tokens, ours.draw_inverse(*given).tokens[-1:]), 0.0


def _refused(logits: Tensor, sequences: Tensor) -> Any:
    """Acceptance of chains in which every second sequence refused its likeliest token at row 1, the others took one draft."""
    accepted = import_module("specdec_kernels.accept.reference").Accepted.empty(len(sequences), 3, 1, logits.device).clear()
    accepted.num_accepted.fill_(1)
    accepted.row.fill_(1)
    accepted.num_refused.copy_(sequences % 2)
    accepted.refused.copy_(torch.where(sequences[:, None] % 2 == 1, logits[:, 1].argmax(-1, keepdim=True), -1))
    return accepted


def noise(device: torch.device) -> Iterator[Finding]:
    """The words themselves."""
    ours, reference = both("noise", device)
    sequences = torch.tensor([0, 1, 1 << 20], device=device)
    positions = torch.tensor([[0, 7], [1, 2], [1 << 30, 3]], device=device)
    given = (SEED, sequences, positions, PURPOSE, 1_009)
    yield "noise words", _differs(ours.words(*given), reference.words(*given)), 0.0


def ngram_match(device: torch.device) -> Iterator[Finding]:
    """Texts of three tokens: matches everywhere, of every size; long ones, over several programs; twice on one work space."""
    ours, reference = both("ngram", device)
    lengths = torch.tensor([0, 1, 3, 40, 2_047, 5_000], device=device)
    ids = torch.randint(0, 3, (6, 5_010), device=device)
    ids[5, :4_990] = torch.arange(4_990, device=device)  # one match at most, far from the end
    ids[5, 70:74] = ids[5, 4_996:5_000]
    work = torch.zeros(6, 2, dtype=torch.int64, device=device)
    for depth in (3, 8):
        made, right = (side.ngram_match(ids, lengths, (4, 3, 2), depth, work) for side in (ours, reference))
        wrong = max(_differs(*pair) for pair in zip(made, right, strict=True))
        yield f"ngram_match of {depth} tokens", max(wrong, float(bool(work.any()))), 0.0


def _worst(made: Tensor, right: Tensor) -> float:
    """Largest relative error of a head's row."""
    if not bool(made.isfinite().all()):
        return float("inf")
    errors = (made.double() - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-6)
    return float(errors.max())


def _apart(made: Tensor, right: Tensor) -> float:
    """Largest absolute difference; equal infinities are none."""
    same = made.double() == right.double()
    return float(torch.where(same, 0.0, (made.double() - right.double()).abs()).max())


def _differs(made: Tensor, right: Tensor) -> float:
    """0 if equal, else 1; integers of any width."""
    if not made.is_floating_point():
        made, right = made.long(), right.long()
    return float(not torch.equal(made, right))
