"""Where the rounds of an engine run: captured on the device, eagerly on the device's buffers, or on the host. And why.

Not known here: sessions.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec_kernels.tree_attention import gpu as gpu_attention

from ..models.fast_llama import FastLlama
from ..models.loading import ModelPair
from ..models.runner import Runner

CHOICES = ("auto", "device", "eager", "host")


@dataclass(frozen=True, slots=True)
class Rounds:
    """mode: host, eager or captured; ops: the operations of device rounds; reason: why it is not captured."""

    mode: str
    ops: str = ""
    reason: str = ""

    @property
    def on_device(self) -> bool:
        """Whether sessions are DeviceSessions."""
        return self.mode != "host"

    @property
    def spelled(self) -> str | None:
        """What a run header says of a model's rounds; None where the host's own words hold."""
        if self.mode == "captured":
            return f"one CUDA graph, {self.ops} operations"
        return f"eager, {self.ops} operations: {self.reason}" if self.mode == "eager" else None


def choose_rounds(asked: str, pair: ModelPair) -> Rounds:
    """What `rounds=asked` means for this pair.

    auto    captured where there is CUDA and everything can, else the host
    device  captured on CUDA, eager elsewhere; ValueError with the reason if the pair cannot
    """
    if asked not in CHOICES:
        raise ValueError(f"rounds must be one of {', '.join(CHOICES)}, got {asked!r}")
    if asked == "host":
        return Rounds("host", reason="rounds='host' was asked for")
    device, reason = pair.target.device.type, why_not(pair)
    if asked == "auto":
        if device != "cuda":
            return Rounds("host", reason=f"{device} has no CUDA graphs")
        reason = reason or _why_no_kernels(pair)
        return Rounds("host", reason=reason) if reason else Rounds("captured", "triton")
    if reason is not None:
        raise ValueError(f"rounds={asked!r}: {reason}. Or use rounds='host'.")
    missing = _why_no_kernels(pair)
    ops = "triton" if missing is None else "reference"
    if asked == "device" and device == "cuda":
        if missing is not None:
            raise ValueError(f"rounds='device': {missing}. Use rounds='host'.")
        return Rounds("captured", ops)
    return Rounds("eager", ops, "no CUDA" if device != "cuda" else "rounds='eager' was asked for")


def why_not(pair: ModelPair) -> str | None:
    """None if rounds of this pair can run on the device, else the reason in words."""
    for runner in _runners(pair):
        if runner.group is not None:
            return f"{runner.name} is cut over ranks, whose sums between layers are not captured"
        if runner.rotation is not None:
            return f"{runner.name} has the positions of its cache, which turn the sinks' keys layer by layer"
        if not isinstance(runner, FastLlama):
            return (f"{runner.name} runs through transformers, whose forwards are not ours to capture; load it with "
                    "runner='fast' if it is a Llama, Mistral, Qwen2 or Qwen3")  # fmt: skip
    return None


def _why_no_kernels(pair: ModelPair) -> str | None:
    reasons = (gpu_attention.why_not(r.device.type, r.shape.head_dim, r.kv_dtype) for r in _runners(pair))
    return next((reason for reason in reasons if reason is not None), None)


def _runners(pair: ModelPair) -> list[Runner]:
    return [pair.target] if pair.draft is None else [pair.target, pair.draft]

