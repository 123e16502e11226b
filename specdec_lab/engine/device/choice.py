"""Where the rounds of an engine run: captured on the device, eagerly on the device's buffers, or on the host. And why.

Not known here: sessions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from specdec_kernels.tree_attention import gpu as gpu_attention

from ..models.fast_llama import FastLlama
from ..models.loading import ModelPair
from ..models.runner import Runner

CHOICES = ("auto", "device", "eager", "host")


@dataclass(frozen=True, slots=True)
class Rounds:
    """mode: host, eager or captured; ops: the operations of device rounds; reason: why it is not captured.

    ranks  how many ranks share a round and by which means, or that it is one shard alone; empty for a whole model
    """

    mode: str
    ops: str = ""
    reason: str = ""
    ranks: str = ""

    @property
    def on_device(self) -> bool:
        """Whether sessions are DeviceSessions."""
        return self.mode != "host"

    @property
    def spelled(self) -> str | None:
        """What a run header says of a model's rounds; None where the host's own words hold."""
        among = f", {self.ranks}" if self.ranks else ""
        if self.mode == "captured":
            return f"one CUDA graph, {self.ops} operations{among}"
        return f"eager, {self.ops} operations{among}: {self.reason}" if self.mode == "eager" else None

    @property
    def asked(self) -> str:
        """The word that gives these rounds again."""
        return "device" if self.mode == "captured" else self.mode


def choose_rounds(asked: str, pair: ModelPair) -> Rounds:
    """What `rounds=asked` means for this pair.

    auto    captured where there is CUDA and everything can, else the host
    device  captured on CUDA, eager elsewhere; ValueError with the reason if the pair cannot
    """
    if asked not in CHOICES:
        raise ValueError(f"rounds must be one of {', '.join(CHOICES)}, got {asked!r}")
    group = pair.target.group
    return replace(_choose(asked, pair), ranks="" if group is None else group.words)


def _choose(asked: str, pair: ModelPair) -> Rounds:
    if asked == "host":
        return Rounds("host", reason="rounds='host' was asked for")
    device, reason = pair.target.device.type, why_not(pair)
    if asked == "auto":
        if device != "cuda":
            return Rounds("host", reason=f"{device} has no CUDA graphs")
        reason = reason or _why_not_captured(pair)
        return Rounds("host", reason=reason) if reason else Rounds("captured", "triton")
    if reason is not None:
        raise ValueError(f"rounds={asked!r}: {reason}. Or use rounds='host'.")
    ops = "reference" if _why_no_kernels(pair) else "triton"
    if asked == "eager" or device != "cuda":
        return Rounds("eager", ops, "no CUDA" if device != "cuda" else "rounds='eager' was asked for")
    reason = _why_not_captured(pair)
    if reason is not None:
        raise ValueError(f"rounds='device': {reason}. Use rounds='host'.")
    return Rounds("captured", ops)


def why_not(pair: ModelPair) -> str | None:
    """None if rounds of this pair can run on the device, else the reason in words."""
    for runner in _runners(pair):
        if runner.rotation is not None:
            return f"{runner.name} has the positions of its cache, which turn the sinks' keys layer by layer"
        if not isinstance(runner, FastLlama):
            return (f"{runner.name} runs through transformers, whose forwards are not ours to capture; load it with "
                    "runner='fast' if it is a Llama, Mistral, Qwen2 or Qwen3")  # fmt: skip
    return None


def _why_not_captured(pair: ModelPair) -> str | None:
    """None if rounds of this pair, which can run on the device, can be CUDA graphs, else the reason in words."""
    group = pair.target.group
    return _why_no_kernels(pair) or (None if group is None else group.why_not_captured())


def _why_no_kernels(pair: ModelPair) -> str | None:
    reasons = (gpu_attention.why_not(r.device.type, r.shape.head_dim, r.kv_dtype) for r in _runners(pair))
    return next((reason for reason in reasons if reason is not None), None)


def _runners(pair: ModelPair) -> list[Runner]:
    return [pair.target] if pair.draft is None else [pair.target, pair.draft]

