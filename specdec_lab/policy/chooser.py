"""A policy at work: one object per generation that answers round by round, switches rarely, and watches acceptance.

Lookup is pure; all state is here. Switching costs (graphs, tiers, caches), so a change needs a gain and a dwell time;
a draft whose acceptance does not pay on this text is put aside and tried again at growing intervals. Meanwhile the best
other draft of the place runs, if one is expected to gain, else plain decoding.
"""

from __future__ import annotations

import math
import warnings

from ..records import FELL_BACK, SpecConfig, StepRecord
from .guard import AcceptanceGuard
from .lookup import OFF, Choice, Grid, Rules, batch_bucket, break_even, choose


class PolicyMismatch(UserWarning):
    """A policy of another device, target or drafter: it answers `off`."""


class Chooser:
    """(live batch, mean length) -> SpecConfig, once per round; `observe` takes the finished round if the engine offers it."""

    def __init__(self, grid: Grid, rules: Rules, refused: str | None = None) -> None:
        self._grid, self._rules = grid, rules
        self._refused = refused
        self._configs = {name: SpecConfig.parse(name) for name in (*grid.portfolio, OFF)}
        self._current = OFF
        self._dwell: int | None = None  # rounds since the last switch; None before the first answer
        self._bucket, self._length = -1, 0.0  # where the last look was
        self._guard = AcceptanceGuard(rules.guard)
        self._instead, self._second = OFF, AcceptanceGuard(rules.guard)  # what runs while the answer rests, and its guard
        self._failed: set[str] = set()  # what was put aside since the answer was
        self._note = ""
        self._here = (1, 0.0)
        if refused:
            warnings.warn(f"policy not used, decoding plainly: {refused}", PolicyMismatch, stacklevel=3)

    @property
    def mismatch(self) -> str | None:
        """Why this policy answers `off` for ever; None when it is in force."""
        return self._refused

    def __call__(self, batch: int, mean_length: float) -> SpecConfig:
        """The configuration of the next round."""
        if self._refused:
            return self._configs[OFF]
        self._here = batch, mean_length
        if self._dwell is not None:
            self._dwell += 1
        if self._is_due(batch, mean_length):
            self._look(batch, mean_length)
        self._guard.tick()
        return self._configs[self._running]

    @property
    def _running(self) -> str:
        return self._instead if self._guard.is_resting else self._current

    def observe(self, step: StepRecord) -> None:
        """Feed a finished round to the guard; a draft that does not pay is put aside from the next round on."""
        if self._refused or step.kind != "round" or step.config != self._running or step.config == OFF:
            return
        guard = self._second if self._guard.is_resting else self._guard
        needed = break_even(self._grid, self._rules, *self._here, step.config)
        if guard.observe(step, needed, self._configs[step.config].depth):
            self._fall_back(step.config, guard)

    def take_note(self) -> str | None:
        """Once, after a fall-back: what happened, as a flag of the first round of what runs now."""
        note, self._note = self._note, ""
        return note or None

    def _fall_back(self, failed: str, guard: AcceptanceGuard) -> None:
        if guard is self._guard:
            self._failed.clear()
        self._failed.add(failed)
        self._instead = self._other(self._configs[failed], guard.mean)
        if guard is self._guard:
            guard.rest()
        self._second.forget()
        self._note = f"{FELL_BACK} from {failed}"

    def _other(self, failed: SpecConfig, gained: float) -> str:
        """The best other draft of this place, n-gram first, since it costs nothing where it finds nothing; else `off`.

        A shorter tree of the same drafter counts only if what was accepted lately, `gained` tokens a round, would pay it.
        """
        values = choose(self._grid, self._rules, *self._here).values
        enough = math.log(self._rules.min_speedup)

        def may_gain(name: str) -> bool:
            config = self._configs[name]
            if name in self._failed or config.is_off or values[name] < enough:
                return False
            if config.drafter != failed.drafter:
                return True
            needed = break_even(self._grid, self._rules, *self._here, name)
            return config.depth < failed.depth and needed is not None and min(gained, config.depth + 1) >= needed

        gaining = [name for name in values if may_gain(name)]
        return max(gaining, key=lambda name: (self._configs[name].drafter == "ngram", values[name]), default=OFF)

    def _is_due(self, batch: int, length: float) -> bool:
        if self._dwell is None or batch_bucket(self._grid, batch) != self._bucket:
            return True
        return abs(length - self._length) >= self._rules.hysteresis.recheck_tokens

    def _look(self, batch: int, length: float) -> None:
        """Look again; a wish that must wait for its dwell time leaves the look open, so it is repeated."""
        choice = choose(self._grid, self._rules, batch, length)
        if self._wants(choice):
            if not self._may_switch(choice):
                return
            self._current, self._dwell = choice.config, 0
            self._guard.forget()
            self._second.forget()
        self._dwell = self._dwell or 0
        self._bucket, self._length = batch_bucket(self._grid, batch), length

    def _wants(self, choice: Choice) -> bool:
        if choice.config == self._current:
            return False
        held = choice.values.get(self._current)
        if self._dwell is None or held is None or held < 0:
            return True  # first answer, not eligible any more, or expected to be slower than plain decoding
        return choice.value - held >= math.log1p(self._rules.hysteresis.switch_gain)

    def _may_switch(self, choice: Choice) -> bool:
        forced = self._current not in choice.values
        return self._dwell is None or forced or self._dwell >= self._rules.hysteresis.min_dwell_steps
