"""When a draft has stopped paying: acceptance of the running configuration against its break-even, round by round.

Two tests watch the same tokens per row and round, x, against m, the break-even less the margin. The mean of the last
`window_steps` rounds finds a slow decline. A sequential test finds a collapse sooner: its capital starts at 1, bets in
every round as much as it may that x falls short, capital = max(capital, 1) * (1 + (m - x) / (most - m)) with `most` =
depth + 1 tokens, and it rings at FALSE_ALARM_ROUNDS. While the expected x is at least m, whatever came before, that factor is 1
or less on average, so false alarms are at least FALSE_ALARM_ROUNDS rounds apart on average (an e-detector: Shin, Ramdas
and Rinaldo 2024); text that pays by more than a hair is further away. Once drafts are never accepted, it rings within
`reaction_rounds`. Standard library only.
"""

from __future__ import annotations

import math
from collections import deque

from ..records import StepRecord

FALSE_ALARM_ROUNDS = 10_000
MAX_BACKOFF = 16  # rests grow up to this factor
PROBE_SHARE = 8  # a probe is this much shorter than a window: it is expected to lose


def reaction_rounds(needed: float, depth: int, window_steps: int) -> int:
    """Most rounds from the first in which nothing is accepted until the guard rings, if nothing is accepted from then on.

    needed  break-even less the margin, in tokens per row and round; above 1
    """
    if needed <= 1:
        raise ValueError(f"a draft that breaks even at {needed} tokens per round always pays; only above 1 can it fail")
    if needed >= depth + 1:
        return 1
    sequential = math.ceil(math.log(FALSE_ALARM_ROUNDS) / math.log(depth / (depth + 1 - needed)))
    return min(sequential, window_steps)


class Watch:
    """The tests on one configuration, and how long it rests after they rang."""

    def __init__(self, depth: int, window_steps: int, cooldown_steps: int, margin: float) -> None:
        self._most = depth + 1
        self._window_steps, self._cooldown, self._margin = window_steps, cooldown_steps, margin
        self._window: deque[float] = deque(maxlen=window_steps)
        self._judged = window_steps  # rounds that the mean is taken over: fewer in a probe
        self._capital = 1.0
        self._rest, self._backoff = 0, 1  # rounds of rest to come; factor of the next rest
        self.seen = 0.0  # tokens per row and round when it last rang

    @property
    def is_resting(self) -> bool:
        """Whether the configuration is put aside."""
        return self._rest > 0

    @property
    def is_probing(self) -> bool:
        """Whether it runs again after a rest, on trial."""
        return self._judged < self._window_steps

    def tick(self) -> None:
        """A round of rest has passed."""
        self._rest = max(self._rest - 1, 0)

    def rings(self, step: StepRecord, break_even: float | None) -> bool:
        """Take a round; whether the draft has stopped paying, in which case its rest begins."""
        yields = [a + 1 for a, cut, on in zip(step.accepted, step.censored, step.live, strict=True) if on and not cut]
        if not yields or break_even is None:
            return False
        tokens, needed = sum(yields) / len(yields), break_even - self._margin
        self._window.append(tokens)
        if self._collapsed(tokens, needed) or self._declined(needed):
            self._start_rest()
            return True
        if self.is_probing and len(self._window) >= self._judged:  # the probe went well: judge by full windows again
            self._judged, self._backoff = self._window_steps, 1
        return False

    def _collapsed(self, tokens: float, needed: float) -> bool:
        if needed >= self._most:  # not even full acceptance would pay
            return True
        self._capital = max(self._capital, 1.0) * (1 + (needed - tokens) / (self._most - needed))
        return self._capital >= FALSE_ALARM_ROUNDS

    def _declined(self, needed: float) -> bool:
        return len(self._window) >= self._judged and self._mean(self._judged) < needed

    def _mean(self, rounds: int) -> float:
        last = list(self._window)[-rounds:]
        return sum(last) / len(last)

    def _start_rest(self) -> None:
        # the collapse may be younger than the window: what counts is the last rounds
        self.seen = self._mean(min(len(self._window), max(1, self._window_steps // PROBE_SHARE)))
        self._rest = self._cooldown * self._backoff
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        self._window.clear()
        self._capital = 1.0
        self._judged = max(1, self._window_steps // PROBE_SHARE)
