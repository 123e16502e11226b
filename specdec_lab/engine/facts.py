"""What a run header says of a model: what it is, and where and how its rounds and drafts run. Nothing runs here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..workload import Workload
from .attention import AttentionBackend
from .device.choice import Rounds
from .models.runner import Runner, position_mode
from .sampling import Processor

PROMPTS = {"cpu": "sdpa"}  # back ends that hand prompt chunks to another, which the header then names


def facts(runner: Runner, backend: AttentionBackend, rounds: Rounds, workload: Workload) -> dict[str, Any]:
    """The target's or the draft's part of a run header."""
    return {
        "name": runner.name, "fingerprint": runner.fingerprint, "runner": runner.kind,
        "dtype": str(runner.dtype).removeprefix("torch."), "kv_dtype": str(runner.kv_dtype).removeprefix("torch."),
        "rounds": where(runner, backend, rounds), "drafts": _drafts(runner, backend, rounds, workload),
        "prompts": PROMPTS.get(backend.name, backend.name), "position_mode": position_mode(runner),
        "parameters": runner.shape.params, "weight_bytes": runner.shape.weight_bytes(runner.dtype.itemsize),
        "kv_bytes_per_token": runner.shape.kv_bytes_per_token(runner.kv_dtype.itemsize), "max_length": runner.max_length,
    }


def where(runner: Runner, backend: AttentionBackend, rounds: Rounds) -> str:
    """Where a model's rounds run, among how many ranks (a draft is whole on each of them), and why not as graphs on a GPU."""
    reason = runner.why_not_compiled(backend)
    on_host = "one compiled call" if reason is None else f"layer by layer: {reason}"
    here = rounds if runner.group is not None else replace(rounds, ranks="")
    among = f"; {here.ranks}" if here.ranks else ""
    why = f"; not as graphs: {rounds.reason}" if runner.device.type == "cuda" else ""
    return here.spelled or f"{on_host}{among}{why}"


def _drafts(runner: Runner, backend: AttentionBackend, rounds: Rounds, workload: Workload) -> str:
    """How trees and chains are drafted, and why not in one call."""
    processor = Processor(workload.temperature, workload.top_p, workload.top_k)
    reason = runner.why_not_compiled(backend) or processor.why_not_compiled()
    return rounds.spelled or ("one compiled call" if reason is None else f"level by level: {reason}")
