"""Whether a draft still pays: yields of its rounds against break-even, by a window and by a test that sees a collapse early.

Not known here: which configuration runs instead. Standard library only.
"""

from __future__ import annotations

import math
from collections import deque

from ..records import StepRecord
from .lookup import Guard

MAX_BACKOFF = 16  # cooldowns grow up to this factor
STAKE = 0.8  # of what a round can lose at most
EVIDENCE = 256.0  # an average of at least so many rounds between alarms on a draft that just breaks even


class AcceptanceGuard:
    """Tokens per row and round of the running draft, judged round by round.

    Two judges. A full window whose mean stays below break-even minus the margin: slow, and sees small losses. And a bet
    against "the mean yield is at least break-even": capital is multiplied by 1 + stake * (break-even - yield) each round,
    never falls below 1, and an alarm is raised when it reaches EVIDENCE. While the claim holds no bet gains on average,
    whatever the law of the yields, so alarms are at least EVIDENCE rounds apart on average at break-even itself and far
    rarer above it (betting: Waudby-Smith and Ramdas 2023; change detection: Shin, Ramdas and Rinaldo 2023). A draft of
    which nothing is accepted any more is found within `bound(break_even, depth)` rounds, whatever came before.
    """

    def __init__(self, rules: Guard) -> None:
        self._rules = rules
        self._window: deque[float] = deque(maxlen=rules.window_steps)
        self._needed = rules.window_steps
        self._capital = 1.0
        self._rest, self._backoff = 0, 1  # rounds of rest to come; factor of the next rest
        self.is_resting = False  # whether the draft is put aside in the coming round

    def forget(self) -> None:
        """Another configuration runs: what was seen says nothing about it."""
        self._window.clear()
        self._needed = self._rules.window_steps
        self._capital = 1.0
        self._rest, self._backoff = 0, 1

    def tick(self) -> None:
        """A round begins."""
        self.is_resting = self._rest > 0
        self._rest = max(self._rest - 1, 0)

    @property
    def mean(self) -> float:
        """Mean yield of what this guard remembers; 0 when that is nothing."""
        return sum(self._window) / len(self._window) if self._window else 0.0

    def observe(self, step: StepRecord, needed: float | None, depth: int) -> bool:
        """Take a round of a draft of this depth; True when the draft does not pay (its rest begins with `rest`).

        needed  tokens per row and round at break-even; None where it is not known, and nothing is judged
        """
        yields = [a + 1 for a, cut, on in zip(step.accepted, step.censored, step.live, strict=True) if on and not cut]
        if not yields or needed is None:
            return False
        gained = sum(yields) / len(yields)
        self._window.append(gained)
        self._capital = max(1.0, self._capital * (1 + stake(needed, depth) * (needed - gained)))
        if self._capital >= EVIDENCE:
            return True
        if len(self._window) < self._needed:
            return False
        if self.mean < needed - self._rules.margin:
            return True
        if self._needed < self._rules.window_steps:  # a probe went well: judge by full windows again
            self._needed, self._backoff = self._rules.window_steps, 1
        return False

    def rest(self) -> None:
        """Put the draft aside for a while, longer each time; after that it is probed."""
        self._rest = self._rules.cooldown_steps * self._backoff
        self._backoff = min(2 * self._backoff, MAX_BACKOFF)
        self._window.clear()
        self._capital = 1.0
        self._needed = max(1, self._rules.window_steps // 8)  # a probe is short: it is expected to lose


def stake(needed: float, depth: int) -> float:
    """What the bet puts on each token below break-even: so much that the best round, depth + 1 tokens, costs STAKE of all.

    0 where no round can beat break-even: then the window alone decides.
    """
    return STAKE / (depth + 1 - needed) if 1 < needed < depth + 1 else 0.0


def bound(needed: float, depth: int) -> float:
    """Rounds after which a draft of which nothing is accepted has been found, by the bet alone."""
    grows = math.log1p(stake(needed, depth) * (needed - 1))
    return math.ceil(math.log(EVIDENCE) / grows) if grows else math.inf
