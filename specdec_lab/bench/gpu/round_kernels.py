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
    """Moved bits of rows with no, some and all nodes accepted."""
    ours, reference = both("kv_compact", device)
    kv = torch.randn(3, 2, 4, 2, 80, 64, device=device).to(torch.bfloat16)
    path = torch.tensor([[2, 5, 6], [1, 2, 3], [3, 0, 0], [4, 6, 7]], device=device, dtype=torch.int32)
    counts = torch.tensor([3, 3, 1, 0], device=device, dtype=torch.int32)
    committed = torch.tensor([0, 17, 64, 70], device=device, dtype=torch.int32)
    made = ours.kv_compact(kv.clone(), path, counts, committed)
    yield "kv_compact", _differs(made, reference.kv_compact(kv.clone(), path, counts, committed)), 0.0


def row_lse(device: torch.device) -> Iterator[Finding]:
    """Over a large vocabulary, with tokens that do not exist."""
    ours, reference = both("row_lse", device)
    for dtype, vocab in ((torch.bfloat16, 128_256), (torch.float32, 1_009)):
        logits = (4 * torch.randn(7, vocab, device=device)).to(dtype)
        ids = torch.randint(-1, vocab + 1, (7, 3), device=device)
        made, right = ours.row_lse(logits, 0.8, ids), reference.row_lse(logits.double(), 0.8, ids)
        what = f"row_lse {str(dtype).removeprefix('torch.')} {vocab}"
        yield f"{what}: arg-max", _differs(made.best, right.best), 0.0
        yield f"{what}: values", max(_apart(made.lse, right.lse), _apart(made.logprob, right.logprob)), LOGS


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
    """Draws of many positions."""
    ours, reference = both("sample_rows", device)
    batch, tokens, vocab = 16, 4, 1_009
    logits = 3 * torch.randn(batch, tokens, vocab, device=device)
    lse, sequences = (logits / 0.8).logsumexp(-1), torch.arange(batch, device=device)
    positions = torch.arange(tokens, device=device).expand(batch, -1) + 50
    given = (logits, lse, 0.8, SEED, sequences, positions.contiguous(), PURPOSE)
    for name in ("draw_gumbel", "draw_inverse"):
        made, right = getattr(ours, name)(*given), getattr(reference, name)(*given)
        yield f"sample_rows {name}", float((made.tokens != right.tokens).float().mean()), DRAWS_DIFFER


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
