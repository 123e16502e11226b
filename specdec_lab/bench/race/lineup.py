"""Who takes part: our plain decoding and configurations, transformers, and the worker processes that were asked for.

Not known here: how a race is run.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...records import SpecConfig
from .continuous import ContinuousPeer
from .hf import Prompted, peers
from .ours import GROUP, OurPeer, SharedSession
from .peer import Peer
from .process import ProcessPeer, script

if TYPE_CHECKING:
    from ...engine.loop import Engine
    from ...policy import Policy

DEFAULT_CONFIGS = tuple(
    SpecConfig.parse(text) for text in ("self:4+60/chain3", "self:4+252/chain4", "model:4+124/chain3", "ngram/chain6")
)
MODES = ("plain", "draft", "lookup")
CONVERT_S = 600.0


@dataclass(frozen=True, slots=True)
class Worker:
    """An engine that runs in an environment of its own.

    script, converter  what its Python runs; `converter SOURCE TARGET` makes a model file or folder for it
    ending             of a converted model
    goes_last          its threads disturb others
    """

    script: str
    converter: str
    ending: str
    goes_last: bool = False


WORKERS = {
    "llama.cpp": Worker("llama_cpp_worker.py", "convert_gguf.py", ".gguf"),
    "openvino": Worker("openvino_worker.py", "convert_openvino.py", "", goes_last=True),
}


def our_peers(engine: Engine, configs: Sequence[SpecConfig], policy: Policy | None) -> list[Peer]:
    """Plain decoding first, then every configuration once, then the policy."""
    shared = SharedSession(engine)
    chosen = dict.fromkeys((SpecConfig.off(), *configs))
    found: list[Peer] = [OurPeer(shared, config) for config in chosen]
    if policy is not None:
        found.append(OurPeer(shared, policy, f"{GROUP}/policy"))
    return found


def transformers_peers(model: str, draft: str | None, dtype: torch.dtype, device: torch.device) -> list[Peer]:
    """generate in its settings, and continuous batching, with these weights."""
    target = Prompted(model, dtype, device)
    assistant = Prompted(draft, dtype, device) if draft is not None else None
    return [*peers(target, assistant), ContinuousPeer(model, dtype, device)]


def worker_peers(name: str, python: str, model: str, draft: str | None, threads: int) -> list[Peer]:
    """One process per mode; `model` and `draft` are converted already."""
    worker = WORKERS[name]
    found: list[Peer] = []
    for mode in MODES:
        if mode == "draft" and draft is None:
            continue
        arguments = ["--model", model, "--threads", str(threads), "--mode", mode]
        arguments += ["--draft", draft] if mode == "draft" and draft is not None else []
        command = [python, str(script(worker.script)), *arguments]
        found.append(ProcessPeer(f"{name}/{mode}", command, goes_last=worker.goes_last))
    return found


def convert(name: str, python: str, source: str, folder: Path, part: str) -> str:
    """A model of `source` that this engine reads, made in `folder` by its own environment unless it is there already."""
    worker = WORKERS[name]
    made, unfinished = (folder / f"{stem}{worker.ending}" for stem in (part, f"{part}-unfinished"))
    if made.exists():
        return str(made)
    if unfinished.exists():  # of a conversion that was cut off
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    command = [python, str(script(worker.converter)), source, str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{name}: its model could not be converted: {error}") from error
    if done.returncode or not unfinished.exists():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"{name}: its model could not be converted: {said[-1] if said else f'exit code {done.returncode}'}")
    unfinished.rename(made)
    return str(made)
