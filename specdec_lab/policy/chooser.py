"""A policy at work: one object per generation that answers round by round, switches rarely, and watches acceptance.

Lookup is pure; all state is here. Switching costs (graphs, tiers, caches), so a change needs a gain and a dwell time; a draft
whose acceptance does not pay on this text (guard.py) steps down to another drafter, a shorter chain or `off`, and is tried
again at growing intervals.
"""

from __future__ import annotations

import math
import warnings

from ..records import SpecConfig, StepRecord
from .guard import Watch
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
        self._watches: dict[str, Watch] = {}  # of what has run since the last switch
        self._stand_in = OFF  # what runs while the current configuration rests
        self._running = OFF  # the last answer
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
        rests = self._watch(self._current).is_resting
        name = self._stand_in if rests else self._current
        if not rests and self._running != name and self._watch(name).is_probing:
            self._note = f"tries {name} again after its rest"
        for watch in self._watches.values():
            watch.tick()
        self._running = name
        return self._configs[name]

    def observe(self, step: StepRecord) -> None:
        """Feed a finished round to the guard."""
        if self._refused or step.kind != "round" or step.config != self._running or step.config == OFF:
            return
        needed = break_even(self._grid, self._rules, *self._here, self._running)
        watch = self._watch(self._running)
        if not watch.rings(step, needed) or needed is None:
            return
        self._stand_in = self._step_down()
        self._note = (
            f"fell back to {self._stand_in}: {self._running} yields {watch.seen:.2f} tokens per row and round here, "
            f"below its break-even {needed:.2f}"
        )

    def take_note(self) -> str:
        """What the guard did before the round that was just answered for, in words; empty when nothing. Given once."""
        note, self._note = self._note, ""
        return note

    def _watch(self, name: str) -> Watch:
        if name not in self._watches:
            rules = self._rules.guard
            depth = self._configs[name].depth
            self._watches[name] = Watch(depth, rules.window_steps, rules.cooldown_steps, rules.margin)
        return self._watches[name]

    def _step_down(self) -> str:
        """The best candidate here that is expected to pay and that nothing at rest speaks against, or `off`."""
        values = choose(self._grid, self._rules, *self._here).values
        resting = {name: watch.seen for name, watch in self._watches.items() if watch.is_resting}
        fitting = [
            name for name, value in values.items()
            if value > 0 and all(self._may_replace(name, failed, seen) for failed, seen in resting.items())
        ]
        return max(fitting, key=lambda name: values[name], default=OFF)

    def _may_replace(self, name: str, failed: str, seen: float) -> bool:
        """Another drafter, or a shorter chain of the same draft that would pay at what the longer one yielded."""
        old, new = self._configs[failed], self._configs[name]
        if new.drafter != old.drafter:
            return True
        needed = break_even(self._grid, self._rules, *self._here, name)
        is_shorter = new.view == old.view and new.is_chain and new.depth < old.depth
        return is_shorter and needed is not None and needed <= seen  # a shorter chain yields no more than a longer one

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
            self._watches.clear()  # another configuration runs: what was seen says nothing about it
            self._stand_in = OFF
        elif choice.values.get(self._stand_in, -1.0) <= 0:
            self._stand_in = OFF  # what stood in may not pay at this batch or length
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
