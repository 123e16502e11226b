"""The least time a machine needs for a forward, and the best speed-up that speculation could have at that limit."""

from __future__ import annotations

from dataclasses import dataclass

from ..records import Cell
from .acceptance import omega
from .shapes import ModelShape


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine can do at most: read ceiling and matrix-product ceiling, calibrated or from a data sheet."""

    read_bytes_per_s: float
    flops_per_s: float

    @property
    def ridge(self) -> float:
        """rho: FLOPs per byte at which reading and computing take equally long."""
        return self.flops_per_s / self.read_bytes_per_s


@dataclass(frozen=True, slots=True)
class ForwardFloor:
    """The least time of one forward. Linear and attention phases depend on each other layer by layer, so they add."""

    weights_s: float
    linear_compute_s: float
    kv_s: float
    attention_compute_s: float

    @property
    def linear_s(self) -> float:
        """Linear layers: reading weights or computing, whichever is longer."""
        return max(self.weights_s, self.linear_compute_s)

    @property
    def attention_s(self) -> float:
        """Attention: reading KV or computing, whichever is longer."""
        return max(self.kv_s, self.attention_compute_s)

    @property
    def total_s(self) -> float:
        """Both phases."""
        return self.linear_s + self.attention_s


def forward_floor(
    shape: ModelShape, limits: Limits, batch: int, query_tokens: int, keys: int, element_bytes: int = 2
) -> ForwardFloor:
    """Floor of a forward of `query_tokens` per sequence that attend to `keys` committed tokens.

    Logits, activations, norms and launches are ignored: 100% of it is out of reach.
    """
    return counted_floor(
        limits,
        weight_bytes=shape.weight_bytes(element_bytes),
        kv_bytes=batch * (keys + query_tokens) * shape.kv_bytes_per_token(element_bytes),
        linear_flops=shape.linear_flops(batch * query_tokens),
        attention_flops=shape.attention_flops(batch * query_tokens * keys),
    )


def counted_floor(
    limits: Limits, *, weight_bytes: float, kv_bytes: float, linear_flops: float, attention_flops: float
) -> ForwardFloor:
    """Floor of work whose bytes and FLOPs were counted: of one forward, or of several taken together.

    For several forwards it is at most the sum of their own floors, so it stays a floor. All bytes are taken to come from
    memory: work that finds them in a cache can be faster.
    """
    return ForwardFloor(
        weights_s=weight_bytes / limits.read_bytes_per_s,
        linear_compute_s=linear_flops / limits.flops_per_s,
        kv_s=kv_bytes / limits.read_bytes_per_s,
        attention_compute_s=attention_flops / limits.flops_per_s,
    )


@dataclass(frozen=True, slots=True)
class Prediction:
    """A round of `gamma` drafted tokens beside a plain step. `caveats` say what the numbers do not stand on."""

    gamma: int
    speedup: float
    omega: float
    plain_s: float
    draft_s: float
    verify_s: float
    overhead_s: float = 0.0
    caveats: tuple[str, ...] = ()

    @property
    def round_s(self) -> float:
        """All of the round; over plain_s it is the break-even acceptance length."""
        return self.draft_s + self.verify_s + self.overhead_s


def predict(
    gamma: int, alpha: float, plain_s: float, draft_s: float, verify_s: float, overhead_s: float = 0.0,
    caveats: tuple[str, ...] = (),
) -> Prediction:  # fmt: skip
    """Omega plain steps over the time of the round; T_ovh is kept, papers drop it."""
    tokens = omega(gamma, alpha)
    speedup = tokens * plain_s / (draft_s + verify_s + overhead_s)
    return Prediction(gamma, speedup, tokens, plain_s, draft_s, verify_s, overhead_s, caveats)


def ideal_speedup(
    shape: ModelShape, limits: Limits, cell: Cell, alpha: float, gamma: int, view_tokens: int | None,
    drafter: ModelShape | None = None,
) -> Prediction:  # fmt: skip
    """The speed-up at the limits, in 16 bit; a measured one over it tells engineering from acceptance.

    view_tokens  keys that a draft token reads, sinks included; None = all
    drafter      a second model; None = the target drafts for itself
    """
    batch, keys = cell.batch, cell.length
    seen = keys if view_tokens is None else min(keys, view_tokens)
    return predict(
        gamma,
        alpha,
        plain_s=forward_floor(shape, limits, batch, 1, keys).total_s,
        draft_s=gamma * forward_floor(drafter or shape, limits, batch, 1, seen).total_s,
        verify_s=forward_floor(shape, limits, batch, gamma + 1, keys + gamma).total_s,
    )


def largest_batch(
    shape: ModelShape, length: int, memory_bytes: float, *, slack_tokens: int = 64, reserve_bytes: float = 6 * 2**30,
    element_bytes: int = 2, drafter: ModelShape | None = None,
) -> int:  # fmt: skip
    """Sequences of `length` tokens and some slack whose KV fits beside all parameters and a reserve; a second network's too."""
    models = (shape,) if drafter is None else (shape, drafter)
    free = memory_bytes - reserve_bytes - sum(model.params * element_bytes for model in models)
    row = (length + slack_tokens) * sum(model.kv_bytes_per_token(element_bytes) for model in models)
    return max(0, int(free // row))


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """Where a forward of the whole model is bound by memory: always, never, beyond or below a length (S_mem)."""

    where: str
    length: float | None = None


def memory_bound(
    shape: ModelShape, limits: Limits, batch: int, query_tokens: int, weight_bytes: int = 2, kv_bytes: int = 2
) -> MemoryBound:
    """S_mem: the context at which the arithmetic intensity of the whole model crosses the ridge."""
    group = shape.heads / shape.kv_heads
    short = 2 * batch * query_tokens / weight_bytes  # FLOPs per byte without context
    long = 2 * group * query_tokens / kv_bytes  # and in the limit of long context
    rho = limits.ridge
    if short <= rho and long <= rho:
        return MemoryBound("always")
    if short >= rho and long >= rho:
        return MemoryBound("never")
    per_length = 2 * batch * shape.layers * shape.heads * shape.head_dim * (kv_bytes * rho / group - 2 * query_tokens)
    length = shape.linear_params * (2 * batch * query_tokens - rho * weight_bytes) / per_length
    return MemoryBound("beyond" if short > rho else "below", length)
