"""What a tuning worker needs to make its own engine and sessions on its own device, as plain data that can be sent to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tune import Instrument
from ..workload import Sampling
from .sessions import Sessions


@dataclass(frozen=True, slots=True)
class EngineRecipe:
    """A pair as `load` finds it, a back end, a kind of shipped text.

    placement  further words of `load`, without the device
    threads    of torch in each worker
    forced     acceptance, as Forced spells it
    rounds     as Engine takes them
    """

    model: str
    draft: str | None
    backend: str
    workload: str
    threads: int
    placement: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    forced: str | None = None
    rounds: str = "auto"

    def __call__(self, device: str) -> Instrument:
        """Load and calibrate; called in the worker, which has the device as its current one from then on."""
        import torch

        from ..engine.loop import Engine
        from ..engine.models.loading import load

        torch.set_num_threads(self.threads)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        pair = load(self.model, self.draft, device=device, **self.placement)
        engine = Engine(pair, self.backend, rounds=self.rounds, forced=self.forced)
        return Instrument(Sessions(engine, self.workload, sampling=self.sampling), engine.identity().base_fingerprint)
