"""A policy at work: one object per generation that answers round by round, switches rarely, and watches acceptance.

Lookup is pure; all state is here. Switching costs (graphs, tiers, caches), so a change needs a gain and a dwell time;
a draft whose acceptance does not pay on this text is put aside and tried again at growing intervals.
"""

from __future__ import annotations

import math
import warnings
from collections import deque

from ..records import SpecConfig, StepRecord
from .lookup import OFF, Choice, Grid, Rules, batch_bucket, break_even, choose

MAX_BACKOFF = 16  # cooldowns grow up to this factor


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
        self._guard = _AcceptanceGuard(rules)
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
        return self._configs[OFF if self._guard.is_resting else self._current]

    def observe(self, step: StepRecord) -> None:
        """Feed a finished round to the guard."""
        if self._refused or step.kind != "round" or step.config != self._current or step.config == OFF:
            return
        self._guard.observe(step, break_even(self._grid, self._rules, *self._here, self._current))

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


class _AcceptanceGuard:
    """Rolling tokens per row and round against the break-even of the running configuration."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules.guard
        self._window: deque[float] = deque(maxlen=self._rules.window_steps)
        self._needed = self._rules.window_steps
        self.is_resting = False  # whether the draft is put aside in the coming round
        self._rest, self._backoff = 0, 1  # rounds of rest to come; factor of the next rest

    def forget(self) -> None:
        """Another configuration runs: what was seen says nothing about it."""
        self._window.clear()
        self._needed = self._rules.window_steps
        self._rest, self._backoff = 0, 1

    def tick(self) -> None:
        """A round begins."""
        self.is_resting = self._rest > 0
        self._rest = max(self._rest - 1, 0)

    def observe(self, step: StepRecord, needed: float | None) -> None:
        """Take a round; start a rest when a full window stays below `needed` tokens minus the margin."""
        yields = [a + 1 for a, cut, on in zip(step.accepted, step.censored, step.live, strict=True) if on and not cut]
        if not yields or needed is None:
            return
        self._window.append(sum(yields) / len(yields))
        if len(self._window) < self._needed:
            return
        if sum(self._window) / len(self._window) < needed - self._rules.margin:
            self._start_rest()
        elif self._needed < self._rules.window_steps:  # a probe went well: judge by full windows again
            self._needed, self._backoff = self._rules.window_steps, 1

    def _start_rest(self) -> None:
        self._rest = self._rules.cooldown_steps * self._backoff
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        self._window.clear()
        self._needed = max(1, self._rules.window_steps // 8)  # a probe is short: it is expected to lose
