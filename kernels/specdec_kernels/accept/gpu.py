"""Acceptance on GPUs through Triton; meaning and arguments as in reference.py. One launch each; with `out` no allocation.

A tree of drawn children costs its program one pass over two rows of logits per refused child, nothing per accepted one. One
program walks one sequence, so a batch of one keeps one multiprocessor busy. exp is the device's float32, so a test whose two
sides agree to some float32 ulp may go the other way than on a CPU; never on laws whose probabilities are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..noise.gpu import check_out, check_places, seed_tensor
from ..row_lse.gpu import INTEGERS, block_of, check_logits
from .reference import Accepted

BLOCK = 2048  # tokens of both laws that a tree's program reads at once: with twice as many it spills
TOKENS_PER_THREAD = 8
MOST_REGISTERS = 255  # all there are: left to choose, some assemblers take fewer and spill (Triton 3.6: sm_80; 3.9)


def accept_chain_equal(tokens: Tensor, counts: Tensor, chosen: Tensor, out: Accepted | None = None) -> Accepted:
    """See reference.accept_chain_equal."""
    batch, drafted = tokens.shape
    out = Accepted.empty(batch, drafted, 1, tokens.device) if out is None else out
    _check_out(out, batch, drafted)
    _check_rows((("tokens", tokens, drafted), ("chosen", chosen, drafted + 1)), counts)
    return _chain(tokens, counts, chosen, None, None, None, None, None, 0, out)


def accept_chain(
    tokens: Tensor, counts: Tensor, target_logprob: Tensor, draft_logprob: Tensor | None, seed: int | Tensor, sequences: Tensor,
    first_positions: Tensor, purpose: int, out: Accepted | None = None,
) -> Accepted:  # fmt: skip
    """See reference.accept_chain."""
    batch, drafted = tokens.shape
    out = Accepted.empty(batch, drafted, 1, tokens.device) if out is None else out
    _check_out(out, batch, drafted)
    _check_rows((("tokens", tokens, drafted),), counts)
    for name, logprob in (("target_logprob", target_logprob), ("draft_logprob", draft_logprob)):
        if logprob is not None and (logprob.shape != tokens.shape or logprob.dtype != torch.float32 or logprob.stride(1) != 1):
            raise ValueError(f"{name} must be float32 {list(tokens.shape)}, got {logprob.dtype} {list(logprob.shape)}")
    check_places(sequences, first_positions)
    key = seed_tensor(seed, tokens.device)
    return _chain(tokens, counts, None, target_logprob, draft_logprob, key, sequences, first_positions, purpose, out)


def _chain(
    tokens: Tensor, counts: Tensor, chosen: Tensor | None, target: Tensor | None, draft: Tensor | None, seed: Tensor | None,
    sequences: Tensor | None, first: Tensor | None, purpose: int, out: Accepted,
) -> Accepted:  # fmt: skip
    from .gpu_kernels import chain_kernel

    strides = (0 if t is None else t.stride(0) for t in (chosen, target, draft))
    drafted, most = tokens.shape[1], out.refused.shape[1]
    chain_kernel[(tokens.shape[0],)](
        tokens, counts, chosen, target, draft, seed, sequences, first, int(purpose), *_fields(out), tokens.stride(0), *strides,
        N=drafted, K=most, BLOCK_N=_power(drafted + 1), BLOCK_K=_power(most), EQUAL=chosen is not None, POINT=draft is None,
        num_warps=1,
    )  # fmt: skip
    return out


def accept_tree_equal(
    tokens: Tensor, exists: Tensor | None, children: Tensor, chosen: Tensor, depth: int, out: Accepted | None = None
) -> Accepted:
    """See reference.accept_tree_equal."""
    from .gpu_kernels import tree_equal_kernel

    (batch, drafted), most = tokens.shape, children.shape[1]
    out = Accepted.empty(batch, depth, most, tokens.device) if out is None else out
    _check_out(out, batch, depth, most)
    _check_rows((("tokens", tokens, drafted), ("chosen", chosen, drafted + 1)), None)
    _check_tree(children, drafted)
    if exists is not None and (exists.dtype != torch.bool or exists.shape != tokens.shape or exists.stride(1) != 1):
        raise ValueError(f"exists must be bool {list(tokens.shape)}, got {exists.dtype} {list(exists.shape)}")
    tree_equal_kernel[(batch,)](
        tokens, exists, children, chosen, *_fields(out), tokens.stride(0), 0 if exists is None else exists.stride(0),
        chosen.stride(0), DEPTH=depth, K=most, BLOCK_A=_power(depth), BLOCK_K=_power(most), ALL=exists is None, num_warps=1,
    )  # fmt: skip
    return out


def accept_tree(
    tokens: Tensor, children: Tensor, law_row: Tensor, target: Tensor, target_lse: Tensor, draft: Tensor, draft_lse: Tensor,
    temperature: float, seed: int | Tensor, sequences: Tensor, first_positions: Tensor, purpose: int, depth: int,
    out: Accepted | None = None,
) -> Accepted:  # fmt: skip
    """See reference.accept_tree."""
    from .gpu_kernels import tree_kernel

    (batch, drafted), most, vocabulary = tokens.shape, children.shape[1], target.shape[2]
    out = Accepted.empty(batch, depth, most, tokens.device) if out is None else out
    _check_out(out, batch, depth, most)
    _check_rows((("tokens", tokens, drafted),), None)
    _check_tree(children, drafted)
    check_places(sequences, first_positions)
    check_laws(target, target_lse, temperature, (batch, drafted + 1, vocabulary), "target")
    check_laws(draft, draft_lse, temperature, (batch, draft.shape[1], vocabulary), "draft")
    if law_row.shape != (drafted + 1,) or not law_row.is_contiguous():
        raise ValueError(f"law_row must have {drafted + 1} entries, one per node, got {list(law_row.shape)}")
    tree_kernel[(batch,)](
        tokens, children, law_row, target, target_lse, draft, draft_lse, 1.0 / temperature, seed_tensor(seed, tokens.device),
        sequences, first_positions, int(purpose), *_fields(out), tokens.stride(0), *target.stride()[:2], *draft.stride()[:2],
        NODES=drafted + 1, LAWS=draft.shape[1], DEPTH=depth, K=most, BLOCK_A=_power(depth), BLOCK_K=_power(most), V=vocabulary,
        **tree_tile(vocabulary),
    )  # fmt: skip
    return out


def tree_tile(vocabulary: int) -> dict[str, int]:
    """Tokens that a tree's program reads at once, its warps and the registers that a thread may use."""
    block = block_of(vocabulary, BLOCK)
    return {"BLOCK": block, "num_warps": max(1, block // (32 * TOKENS_PER_THREAD)), "maxnreg": MOST_REGISTERS}


def check_laws(logits: Tensor, lse: Tensor, temperature: float, shape: tuple[int, int, int], name: str) -> None:
    """ValueError unless logits have this shape and lse, contiguous, the same without the vocabulary."""
    check_logits(logits, temperature)
    if tuple(logits.shape) != shape or tuple(lse.shape) != shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(
            f"{name} must be logits {list(shape)} with contiguous float32 log-sum-exps {list(shape[:2])}, got "
            f"{list(logits.shape)} and {lse.dtype} {list(lse.shape)}"
        )


def _fields(out: Accepted) -> tuple[Tensor, ...]:
    return (
        out.num_accepted, out.path, out.ranks, out.row, out.num_refused, out.refused, out.offered_mass, out.rest_mass
    )  # fmt: skip


def _power(count: int) -> int:
    return 1 << (max(count, 1) - 1).bit_length()


def _check_out(out: Accepted, batch: int, depth: int, most: int = 1) -> None:
    """ValueError unless everything has the shapes of Accepted.empty; a chain's may have room for more refusals."""
    room = max(most, out.refused.shape[1]) if most == 1 else most
    wide = (torch.float64,)
    check_out(out.num_accepted, (batch,), INTEGERS, "num_accepted")
    check_out(out.path, (batch, depth), INTEGERS, "path")
    check_out(out.ranks, (batch, depth), INTEGERS, "ranks")
    check_out(out.row, (batch,), INTEGERS, "row")
    check_out(out.num_refused, (batch,), INTEGERS, "num_refused")
    check_out(out.refused, (batch, room), INTEGERS, "refused")
    check_out(out.offered_mass, (batch, room), wide, "offered_mass")
    check_out(out.rest_mass, (batch, room), wide, "rest_mass")


def _check_rows(named: tuple[tuple[str, Tensor, int], ...], counts: Tensor | None) -> None:
    batch = named[0][1].shape[0]
    for name, tensor, width in named:
        if tuple(tensor.shape) != (batch, width) or tensor.dtype not in INTEGERS or (width > 1 and tensor.stride(1) != 1):
            got = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name} must be int32 or int64 [{batch}, {width}] without gaps, got {got}")
    if counts is not None and (counts.shape != (batch,) or counts.dtype not in INTEGERS):
        raise ValueError(f"counts must be int32 or int64 [{batch}], got {counts.dtype} {list(counts.shape)}")


def _check_tree(children: Tensor, drafted: int) -> None:
    if children.shape[0] != drafted + 1 or children.dtype not in INTEGERS or not children.is_contiguous():
        raise ValueError(
            f"children must be contiguous int32 or int64 [{drafted + 1}, K], one row per node and root, got {children.dtype} "
            f"{list(children.shape)}"
        )
