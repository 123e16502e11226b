"""How long the stages would take, before any has run: modelled, not measured, and said so wherever it is shown.

The work of a stage is counted from its sizes and put at the planning limits of one H200 (the limit tables), times a factor
for what never reaches the limit; what is no work of the GPU (loading, compilers, capturing) is assumed in seconds. Not known
here: the machine that will run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...costs import Limits, forward_floor
from ...records import Cell, SpecConfig
from . import layouts
from .attention_calls import QUICK, layer_bytes, read_bytes
from .models import WARM_UP_ROUNDS
from .plan import STARTS_S, Stage, seconds_of, whole_s
from .sizes import FULL, KernelCell, ModelCells, Sizes
from .stages import headline, rounds
from .timing import WARM_UP, rotation

LIMITS = Limits(4.3e12, 788e12)  # of the limit tables: one H200
FACTOR = 1.5  # times the limit; assumed
CAPTURE_S = 1.0  # of a round or a step as a graph; assumed
LOAD_S = 4.0  # of a model of random weights, with the libraries it needs; assumed
VARIANT_S = 4.0  # of one of our kernels, compiled for a shape; assumed
VARIANTS = 6  # of the attention kernel in the cells of a run
OTHERS_S = {"flex": 3.0, "compiled generate": 30.0}  # of others' compilers, per shape; assumed
MODELLED = "modelled"


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one stage.

    most_s   what the plan gives it
    work_s   of the GPU at the limits; assumed_s: everything else
    fills    it samples as much as its time allows, so that it takes what it is given
    """

    stage: Stage
    most_s: float
    work_s: float = 0.0
    assumed_s: float = 0.0
    fills: bool = False

    @property
    def modelled_s(self) -> float:
        """What it would take if nobody ended it."""
        return self.most_s if self.fills else FACTOR * self.work_s + self.assumed_s

    @property
    def is_cut(self) -> bool:
        """Whether its time would not do."""
        return self.modelled_s > self.most_s

    def __str__(self) -> str:
        words = "samples as long as it may" if self.fills else f"{MODELLED} {self.modelled_s:.0f} s"
        return f"{self.stage.name.ljust(12)} at most {self.most_s:3.0f} s, {words}{': it would be cut' if self.is_cut else ''}"


def forecasts(stages: Sequence[Stage], minutes: float, sizes: Sizes = FULL) -> tuple[Forecast, ...]:
    """One per stage, in order."""
    found = []
    for stage in stages:
        most_s = seconds_of(stage, minutes)
        work = WORK.get(stage.name)
        found.append(Forecast(stage, most_s, *work(sizes)) if work else Forecast(stage, most_s, fills=True))
    return tuple(found)


def lines(stages: Sequence[Stage], minutes: float) -> Iterator[str]:
    """The plan of a GPU run in words."""
    found = forecasts(stages, minutes)
    yield (
        f"plan, {MODELLED} and not measured: work at {LIMITS.read_bytes_per_s / 1e12:g} TB/s and {LIMITS.flops_per_s / 1e12:g} "
        f"TFLOP/s times {FACTOR:g}, loading and compilers assumed"
    )
    yield from (f"  {one}" for one in found)
    starts, most, likely = STARTS_S * len(found), sum(f.most_s for f in found), sum(min(f.modelled_s, f.most_s) for f in found)
    whole = whole_s(list(stages), minutes)
    late = ": the last stages may get less; run them alone, or give more minutes" if starts + most > whole else ""
    yield (
        f"  in all       at most {starts + most:.0f} s with {starts:.0f} s of starts, {MODELLED} {starts + likely:.0f} s; the "
        f"run may take {whole:.0f} s{late}"
    )


def step_s(model: ModelCells, cell: Cell, queries: int = 1, keys: int | None = None) -> float:
    """A forward at the limits."""
    return forward_floor(model.shape, LIMITS, cell.batch, queries, cell.length if keys is None else keys).total_s


def round_s(model: ModelCells, cell: Cell, config: SpecConfig) -> float:
    """Drafts through the configuration's window, then verification, at the limits."""
    window = config.view.max_tokens if config.view else None
    seen = cell.length if window is None else min(cell.length, window)
    return config.depth * step_s(model, cell, 1, seen) + step_s(model, cell, config.depth + 1)


def _noise_s(model: ModelCells, cell: Cell) -> float:
    """Writing a context that is not read."""
    return cell.batch * cell.length * model.shape.kv_bytes_per_token(2) / LIMITS.read_bytes_per_s


def _call_s(cell: KernelCell) -> float:
    return read_bytes(cell, 2) / LIMITS.read_bytes_per_s


def _timing_s(sizes: Sizes, cell: KernelCell) -> float:
    """One launch, timed twice over rotated buffers."""
    turns = rotation(read_bytes(cell, 2), layer_bytes(cell, 2), float("inf"), sizes.most_layers)
    return 2 * (sizes.repeats + WARM_UP + 1) * turns * _call_s(cell)


def _calibrate(sizes: Sizes) -> tuple[float, float]:
    return 0.0, 2 * 2.0 + 1.0  # two calibrations and the counters


def _kernels(sizes: Sizes) -> tuple[float, float]:
    contestants = len(QUICK) + 3  # ours, sdpa, flex
    work = sum(contestants * _timing_s(sizes, cell) for cell in sizes.kernels)
    work += sum(2 * layouts.BLOCKS * _timing_s(sizes, cell) for cell in sizes.layouts)
    return work, VARIANTS * VARIANT_S + OTHERS_S["flex"] * len(sizes.kernels)


def _rounds(sizes: Sizes) -> tuple[float, float]:
    work = assumed = 0.0
    runs = 2 * rounds.BLOCKS
    count = runs * (sizes.rounds // runs + WARM_UP_ROUNDS)
    for model in sizes.models:
        assumed += LOAD_S
        for cell in model.cells:
            work += count * (step_s(model, cell) + round_s(model, cell, sizes.config)) + _noise_s(model, cell)
            assumed += 2 * CAPTURE_S + 2 * sizes.energy_s
    return work, assumed


def _headline(sizes: Sizes) -> tuple[float, float]:
    model, cells = sizes.models[0], [Cell(batch, length) for length in sizes.headline for batch in sizes.batches]
    count = headline.BLOCKS * (max(2, sizes.rounds // 2) // headline.BLOCKS + WARM_UP_ROUNDS)
    work = sum(count * (step_s(model, at) + round_s(model, at, sizes.config)) + _noise_s(model, at) for at in cells)
    return work, LOAD_S + 2 * CAPTURE_S * len(cells)


def _exposed(sizes: Sizes) -> tuple[float, float]:
    model = sizes.models[0]
    work = sum(3 * _timing_s(sizes, cell) for cell in sizes.exposed)
    work += sum(2 * (sizes.rounds + WARM_UP_ROUNDS) * step_s(model, cell) for cell in model.cells)
    return work, LOAD_S + 2 * VARIANT_S + 2 * CAPTURE_S * len(model.cells)


def _overhead(sizes: Sizes) -> tuple[float, float]:
    model, cell = sizes.models[0], sizes.overhead_cell
    count = (2 + 4 * sizes.overhead_blocks) * (sizes.overhead_rounds + WARM_UP_ROUNDS)
    work = count * (step_s(model, cell) + round_s(model, cell, sizes.config))
    reading = 4 * step_s(model, cell, cell.length, cell.length // 2)
    return work + reading, LOAD_S + 4 * CAPTURE_S


def _trace(sizes: Sizes) -> tuple[float, float]:
    return 0.0, 8.0  # the shipped pair is so small that only starting it counts


def _peers(sizes: Sizes) -> tuple[float, float]:
    """Others' generate is far from the limit in Python, so it is put at several times it."""
    model = sizes.models[0]
    work = sum(4 * 5 * 2 * sizes.peer_tokens * step_s(model, cell) for cell in sizes.peer_cells)
    return work, 2 * LOAD_S + OTHERS_S["compiled generate"]


def _gpt_fast(sizes: Sizes) -> tuple[float, float]:
    from .stages.gpt_fast import COMPILES_S

    model = sizes.models[-1]
    return 2 * 6 * 2 * sizes.peer_tokens * step_s(model, sizes.gpt_fast_cell), 4 * LOAD_S + sum(COMPILES_S.values())


WORK: dict[str, Callable[[Sizes], tuple[float, float]]] = {
    "calibrate": _calibrate, "kernels": _kernels, "rounds": _rounds, "headline": _headline, "exposed": _exposed,
    "overhead": _overhead, "trace": _trace, "peers": _peers, "gpt-fast": _gpt_fast,
}  # fmt: skip  # the others sample as long as they may
