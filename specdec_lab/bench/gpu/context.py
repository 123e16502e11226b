"""What every stage is given: the device, the sizes, a stopwatch, sensors, the time left, and where words go.

Not known here: what a stage measures.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...engine.cache import available_bytes
from ...engine.calibrate import Ceilings, calibrate
from ...sensors import Conditions, Reading, Sensors, conditions
from .ledger import Ledger
from .sizes import Sizes
from .timing import EventWatch, GraphWatch, HostWatch, Timing, clock_flags, cuda_watches, timed_twice

if TYPE_CHECKING:
    from .timing import Launch

KEPT_FREE = 4 << 30  # device memory that is never planned with: logits, workspaces, graphs
NOT_CAPTURED = "cannot be captured in a graph"


def release(device: torch.device) -> None:
    """Give memory of what nobody holds back to the GPU's driver, which is asked how much is free."""
    if device.type == "cuda":
        gc.collect()  # sessions and what they hold refer to each other
        torch.cuda.empty_cache()


class Skipped(Exception):
    """A stage that cannot run here; the message says why."""


class OutOfTime(Exception):
    """The time of a stage is over; the message says what is left undone."""


@dataclass
class Watched:
    """What the sensors saw during a block; filled when it ends."""

    readings: tuple[Reading, ...] = ()

    @property
    def conditions(self) -> Conditions:
        """Clocks, power and energy of the block."""
        return conditions(self.readings)

    @property
    def flags(self) -> tuple[str, ...]:
        """Why a reader must be careful."""
        return clock_flags(self.readings)


@dataclass
class Context:
    """Given to a stage, which yields rows.

    seconds   that the stage may take
    gpt_fast  a checkout of gpt-fast, if the user has one
    folder    of the device in the database: pictures, traces and policies go below it
    """

    device: torch.device
    sizes: Sizes
    ledger: Ledger
    seconds: float
    say: Callable[[str], None] = print
    now: Callable[[], float] = time.monotonic
    gpt_fast: Path | None = None
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    @property
    def folder(self) -> Path:
        """Of the device, in the database."""
        return self.ledger.path.parent

    @property
    def is_gpu(self) -> bool:
        """Whether times are those of a GPU."""
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds that the stage has left."""
        return self.seconds - (self.now() - self.started)

    def checkpoint(self, what: str) -> None:
        """Before something that takes time: OutOfTime when none is left."""
        if self.left_s <= 0:
            raise OutOfTime(f"its {self.seconds:.0f} s were over before {what}; what it had found is kept")

    def has_time_for(self, seconds: float) -> bool:
        """Whether so many seconds are left, before something that cannot be cut short; a rehearsal's compilers take none."""
        return not self.is_gpu or self.left_s >= seconds

    @cached_property
    def ceilings(self) -> Ceilings:
        """Of this device, measured when first asked for."""
        return calibrate(str(self.device), torch.get_num_threads())

    @property
    def l2_bytes(self) -> int | None:
        """Of the GPU's last cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size) if self.is_gpu else None

    @property
    def free_bytes(self) -> float:
        """Device memory that a stage may plan with; on a GPU also what torch holds and does not use."""
        release(self.device)
        free = available_bytes(self.device)
        return float("inf") if free is None else max(0.0, float(free - (KEPT_FREE if self.is_gpu else 0)))

    def timed(self, launch: Launch, turns: int) -> Timing:
        """Time a launch twice; on a GPU in a graph, or where it cannot be captured by events around its launches."""
        if not self.is_gpu:
            return timed_twice(HostWatch(), launch, turns, self.sizes.repeats)
        graph, events = cuda_watches()
        watch: GraphWatch | EventWatch = graph
        try:
            first = graph(launch, turns, self.sizes.repeats)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            torch.cuda.synchronize()  # a broken device raises here, and is not taken for a launch that cannot be captured
            watch = EventWatch(events.event, events.synchronize, f"{events.how}, {NOT_CAPTURED}")
            first = watch(launch, turns, self.sizes.repeats)
        return Timing(first, watch(launch, turns, self.sizes.repeats), watch.how)

    @contextmanager
    def watched(self, hz: float = 20.0) -> Iterator[Watched]:
        """Sensors over a block."""
        seen = Watched()
        gpu: int | str = str(torch.cuda.get_device_properties(self.device).uuid) if self.is_gpu else 0
        sensors = Sensors(gpu, hz=hz)
        try:
            with sensors:
                yield seen
        finally:
            seen.readings = sensors.readings()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
