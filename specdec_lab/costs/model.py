"""A calibrated machine and drafter asked about cells, chains and what-ifs that were not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..records import Cell
from .acceptance import AcceptanceFit
from .fitted import FittedCost
from .limits import Prediction, predict


@dataclass(frozen=True, slots=True)
class CostModel:
    """Fitted times of target, draft and overhead, and the KV bytes that one token of context costs each.

    draft, overhead  None = costs nothing (n-gram lookup; an engine without overhead)
    select_s         time per round spent on choosing what the draft sees
    plain_overhead   of a step of plain decoding, which accepts and commits too; None = costs nothing
    """

    target: FittedCost
    draft: FittedCost | None
    overhead: FittedCost | None
    kv_bytes_per_token: float
    draft_kv_bytes_per_token: float
    select_s: float = 0.0
    plain_overhead: FittedCost | None = None

    def plain_s(self, cell: Cell) -> float:
        """T_T: a step of plain decoding."""
        return self.target.seconds(cell.batch, 1, self._kv_bytes(cell)) + self._overhead_s(cell, 0)

    def predict(self, cell: Cell, gamma: int, view_tokens: int | None, alpha: float) -> Prediction:
        """A chain of `gamma` tokens, its draft reading `view_tokens` keys (None = all), against plain decoding."""
        kv_bytes, draft_bytes = self._kv_bytes(cell), self._draft_bytes(cell, view_tokens)
        draft_s = gamma * self.draft.seconds(cell.batch, 1, draft_bytes) if self.draft else 0.0
        caveats = [f"target: {words}" for words in self.target.outside(cell.batch, gamma + 1, kv_bytes)]
        if self.draft and gamma:
            caveats += [f"draft: {words}" for words in self.draft.outside(cell.batch, 1, draft_bytes)]
        return predict(
            gamma,
            alpha,
            plain_s=self.plain_s(cell),
            draft_s=draft_s,
            verify_s=self.target.seconds(cell.batch, gamma + 1, kv_bytes),
            overhead_s=self._overhead_s(cell, gamma) + (self.select_s if gamma else 0.0),
            caveats=tuple(caveats),
        )

    def best(self, cell: Cell, view_tokens: int | None, alpha: float, max_gamma: int = 32) -> Prediction:
        """The fastest chain; gamma 0 is plain decoding and wins where nothing is faster."""
        return max(
            (self.predict(cell, gamma, view_tokens, alpha) for gamma in range(max_gamma + 1)), key=lambda p: p.speedup
        )

    def _overhead_s(self, cell: Cell, gamma: int) -> float:
        overhead = self.overhead if gamma else self.plain_overhead
        return overhead.seconds(cell.batch, 1, 0) if overhead else 0.0

    def _kv_bytes(self, cell: Cell) -> float:
        return cell.batch * cell.length * self.kv_bytes_per_token

    def _draft_bytes(self, cell: Cell, view_tokens: int | None) -> float:
        seen = cell.length if view_tokens is None else min(cell.length, view_tokens)
        return cell.batch * seen * self.draft_kv_bytes_per_token


def longer_chain_pays(prediction: Prediction, alpha: float, draft_s: float, verify_slope_s: float) -> bool:
    """Whether one drafted token more pays: alpha^(gamma+1) * T_step > Omega * (T_D + dT_V/dgamma)."""
    return alpha ** (prediction.gamma + 1) * prediction.round_s > prediction.omega * (draft_s + verify_slope_s)


def node_pays(path_probability: float, prediction: Prediction, node_s: float) -> bool:
    """Whether a tree node pays that costs `node_s` more and is on the accepted path with this probability."""
    return path_probability > prediction.omega / prediction.round_s * node_s


def kv_half_length(cost: FittedCost, batch: int, query_tokens: int, kv_bytes_per_token: float) -> float:
    """S_kv50: the context at which reading KV takes as long as all else; infinite where KV costs nothing."""
    per_token = cost.per_kv_byte_s * batch * kv_bytes_per_token
    return cost.seconds(batch, query_tokens, 0) / per_token if per_token else float("inf")


def inflection_length(
    model: CostModel, batches: Sequence[int], lengths: Sequence[int], gamma: int, view_tokens: int | None,
    alpha: Callable[[int], float],
) -> int | None:  # fmt: skip
    """S_inflection: the shortest of `lengths` at which speculation pays at every batch and pays more as batch grows.

    alpha  chance of a drafted token at a context length. None where no length qualifies.
    """
    for length in sorted(lengths):
        gains = [model.predict(Cell(b, length), gamma, view_tokens, alpha(length)).speedup for b in sorted(batches)]
        if gains[0] >= 1 and gains == sorted(gains):
            return length
    return None


@dataclass(frozen=True, slots=True)
class WhatIf:
    """A change of the world. Context, batch, window and chain are arguments of the question itself.

    kv_scale      KV bytes against now: 0.5 for 8 bit, or fewer KV heads
    memory_speed  read bandwidth against now
    launch_s      the part of a forward's fixed time that faster memory does not shorten (time empty forwards)
    alpha         acceptance prescribed instead of fitted; 1 is the perfect draft
    free_draft    drafting costs nothing
    """

    kv_scale: float = 1.0
    memory_speed: float = 1.0
    launch_s: float = 0.0
    alpha: float | None = None
    free_draft: bool = False


def what_if(
    model: CostModel, acceptance: AcceptanceFit, cell: Cell, gamma: int, view_tokens: int, change: WhatIf,
    weight_bytes: float = 0, memory_bytes: float = float("inf"),
) -> Prediction:  # fmt: skip
    """The speed-up in a changed world; caveats say what leaves the calibrated range, does not fit or was assumed."""
    seen = min(view_tokens, cell.length)
    alpha = acceptance.alpha(cell.length, seen) if change.alpha is None else change.alpha
    caveats = list(acceptance.outside(cell.length, seen)) if change.alpha is None else [f"alpha {alpha:g} is assumed"]
    if change.kv_scale != 1 and change.alpha is None:
        caveats.append("other KV may change alpha: measure")
    if change.free_draft:
        caveats.append("a free draft is an upper bound")
    kv_bytes = cell.batch * (cell.length + gamma + 1) * model.kv_bytes_per_token * change.kv_scale
    if weight_bytes + kv_bytes > memory_bytes:
        caveats.append(f"needs {(weight_bytes + kv_bytes) / 1e9:.1f} GB of {memory_bytes / 1e9:.1f} GB: does not fit")
    answer = _changed(model, change).predict(cell, gamma, view_tokens, alpha)
    return replace(answer, caveats=(*caveats, *answer.caveats))


def _changed(model: CostModel, change: WhatIf) -> CostModel:
    draft = None if change.free_draft or model.draft is None else _faster(model.draft, change)
    return replace(
        model,
        target=_faster(model.target, change),
        draft=draft,
        kv_bytes_per_token=model.kv_bytes_per_token * change.kv_scale,
        draft_kv_bytes_per_token=model.draft_kv_bytes_per_token * change.kv_scale,
    )


def _faster(cost: FittedCost, change: WhatIf) -> FittedCost:
    """Reading weights and KV scales with memory, launching does not."""
    if not 0 <= change.launch_s <= cost.fixed_s:
        raise ValueError(f"launch_s {change.launch_s} must lie within the fixed time of a forward, {cost.fixed_s}")
    return replace(
        cost,
        fixed_s=change.launch_s + (cost.fixed_s - change.launch_s) / change.memory_speed,
        per_kv_byte_s=cost.per_kv_byte_s / change.memory_speed,
    )
