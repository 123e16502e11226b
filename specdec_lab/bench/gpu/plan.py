"""Which stages there are, in which order, and how long each may take.

Standard library only, so that a command line can be parsed with it. Not known here: how anything is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

MINUTES = 10.0
STARTS_S = 6.0  # of a stage's process: Python, torch and a CUDA context, before its own time begins


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    seconds  that it may take of a run of `MINUTES`
    modules  it cannot do without, beside torch
    asks     the option without which it has nothing to do; such a stage is beside the `MINUTES` of the others
    """

    name: str
    seconds: float
    gives: str
    modules: tuple[str, ...] = ()
    asks: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of its modules that this Python does not have."""
        return tuple(name for name in self.modules if find_spec(name) is None)


STAGES = (
    Stage("calibrate", 15, "ceilings, their repeatability, the kernels' clock, hardware counters"),
    Stage("correctness", 110, "kernels against float64, bits, offsets, memory checker, counted bytes"),
    Stage("kernels", 90, "attention kernels beside torch's and others, against their bars; two layouts of the cache"),
    Stage("rounds", 90, "plain, draft, verify and round times of model shapes, share of the physical limit"),
    Stage("headline", 65, "speed-up against batch at several lengths, acceptance set"),
    Stage("exposed", 25, "KV load that is exposed, and the cost of context"),
    Stage("overhead", 35, "what the instrumentation costs, in turns"),
    Stage("tune", 30, "a short tuning run and its policy", ("optuna",)),
    Stage("trace", 10, "a recorded run for replay"),
    Stage("peers", 65, "transformers in its settings: equal tokens first, then times on the same shape", ("transformers",)),
    Stage("gpt-fast", 150, "gpt-fast, plain and speculative, from a checkout that you name", ("transformers",), "--gpt-fast"),
)
NAMES = tuple(stage.name for stage in STAGES)


def chosen(names: tuple[str, ...], given: tuple[str, ...] = ()) -> tuple[Stage, ...]:
    """The stages of these names, in their usual order; when none is named, all whose option, if they ask for one, is given."""
    if strange := [name for name in names if name not in NAMES]:
        raise ValueError(f"there is no stage {strange[0]!r}; the stages are {', '.join(NAMES)}")
    if names:
        return tuple(stage for stage in STAGES if stage.name in names)
    return tuple(stage for stage in STAGES if not stage.asks or stage.asks in given)


def whole_s(stages: tuple[Stage, ...] | list[Stage], minutes: float) -> float:
    """What a run of these stages may take: the minutes, and beside them what a stage takes that somebody asked for."""
    return 60 * minutes + sum(seconds_of(stage, minutes) + STARTS_S for stage in stages if stage.asks)


def seconds_of(stage: Stage, minutes: float) -> float:
    """What a stage may take in a run of `minutes`: its share, so that a stage run alone is the same measurement."""
    return stage.seconds * minutes / MINUTES
