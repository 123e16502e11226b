"""Acceptance vectors and optimiser configurations as Sequoia and TriForce keep them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..records import MAX_DEPTH, MAX_NODES
from .acceptance import Acceptance, RankChances
from .choice import Choice, choose
from .files import FilePath, TreeFileError, is_time, is_whole, plain, read_file

LAYOUTS = ("sequoia", "triforce")
OPTIMIZER_KEYS = ("acceptance_rate_vector", "max_depth", "max_budget", "valid_budget", "target_time", "draft_time", "dst")


def load_acceptance(path: FilePath, layout: str) -> tuple[float, ...]:
    """(p_1, ..., p_K) of an acceptance vector `.pt` file: 1-D floats, entry 0 a dummy 0.

    layout  `sequoia`: [0, p1..pK, reject mass], the last entry is dropped; `triforce`: [0, p1..pK]. The files do not tell
            which they are, so it must be said; a last chance above its neighbour is warned about, it may be reject mass
    TreeFileError names the check: readable, vector, dummy, chances.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be 'sequoia' (last entry: reject mass) or 'triforce' (all are chances), got {layout!r}")
    values = plain(read_file(path))
    if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
        raise TreeFileError(path, "vector", "an acceptance vector is a 1-D tensor of floats")
    least = 3 if layout == "sequoia" else 2
    if len(values) < least:
        raise TreeFileError(path, "vector", f"{len(values)} entries; layout {layout!r} has at least {least}")
    if values[0] != 0:
        raise TreeFileError(path, "dummy", f"entry 0 is {values[0]:g}; both layouts start with a dummy 0, then p1")
    chances = tuple(values[1:-1] if layout == "sequoia" else values[1:])
    try:
        Acceptance.of(chances)
    except ValueError as error:
        raise TreeFileError(path, "chances", str(error)) from None
    if len(chances) > 1 and chances[-1] > chances[-2]:
        warnings.warn(
            f"{path}: the last chance, {chances[-1]:g}, exceeds its neighbour, {chances[-2]:g}; if it is reject mass, the "
            f"layout is not {layout!r}",
            stacklevel=2,
        )
    return chances


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Sequoia's optimiser configuration. Times have whatever unit their author typed; nodes and levels count the root.

    acceptance_path  as written in the file, relative to where the optimiser ran; read it with load_acceptance
    verify_time      by nodes; the entry for 1 is the baseline
    """

    acceptance_path: str
    levels: int
    verify_time: Mapping[int, float]
    draft_time: float
    destination: str

    def choose(self, acceptance: RankChances) -> Choice:
        """Sequoia's rule on these times: minimise (D * draft_time + target_time) / G(n, D)."""
        return choose(acceptance, self.draft_time, self.verify_time, self.levels, draft_forwards="levels")


def load_optimizer_config(path: FilePath) -> OptimizerConfig:
    """Sequoia's optimiser configuration from its `.json`.

    TreeFileError names the check: readable, keys, valid_budget, target_time, baseline, draft_time, max_depth, max_budget.
    """
    data = read_file(path)
    if not isinstance(data, Mapping):
        raise TreeFileError(path, "keys", f"a configuration is an object, this is of type {type(data).__name__}")
    if missing := [key for key in OPTIMIZER_KEYS if key not in data]:
        raise TreeFileError(path, "keys", f"{', '.join(missing)} missing; a configuration has {', '.join(OPTIMIZER_KEYS)}")
    sizes, times = data["valid_budget"], data["target_time"]
    _check_times(path, sizes, times)
    if not is_time(data["draft_time"]):
        raise TreeFileError(path, "draft_time", f"must be a time of 0 or more, got {data['draft_time']!r}")
    levels, most = data["max_depth"], data["max_budget"]
    if not is_whole(levels) or not 1 <= levels <= MAX_DEPTH + 1:
        raise TreeFileError(path, "max_depth", f"must be 1 to {MAX_DEPTH + 1} levels, the root's counted, got {levels!r}")
    if not is_whole(most) or most < sizes[-1]:
        raise TreeFileError(path, "max_budget", f"must reach the largest valid_budget, {sizes[-1]}, got {most!r}")
    return OptimizerConfig(
        acceptance_path=str(data["acceptance_rate_vector"]),
        levels=levels,
        verify_time=dict(zip(sizes, times, strict=True)),
        draft_time=data["draft_time"],
        destination=str(data["dst"]),
    )


def _check_times(path: FilePath, sizes: Any, times: Any) -> None:
    if not isinstance(sizes, list) or not sizes or not all(is_whole(n) and 1 <= n <= MAX_NODES + 1 for n in sizes):
        raise TreeFileError(path, "valid_budget", f"must be numbers of nodes, 1 to {MAX_NODES + 1}, got {sizes!r}")
    if any(low >= high for low, high in pairwise(sizes)):
        raise TreeFileError(path, "valid_budget", f"sizes must rise, got {sizes}")
    if not isinstance(times, list) or len(times) != len(sizes) or not all(is_time(t) and t > 0 for t in times):
        raise TreeFileError(path, "target_time", f"must be {len(sizes)} positive times, one per valid_budget, got {times!r}")
    if sizes[0] != 1:
        raise TreeFileError(
            path, "baseline", f"valid_budget starts with {sizes[0]}; it must start with 1, the plain step to compare with"
        )
