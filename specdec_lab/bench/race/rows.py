"""What a race found, as data: one row per cell and peer, with everything that its numbers depend on.

Knows records and the summary's arithmetic only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...records import Cell, Spread
from ...summary import PairedRatio, spread

SCHEMA = "specdec_lab.race/1"
ETA_ABOVE = 1.03  # share of the limit from which on the data cannot have come from memory


@dataclass(frozen=True, slots=True)
class Conditions:
    """What happened around the numbers of a row.

    load_before, load_after  load average at the start and the end of the cell; None where the system gives none
    disturbed_blocks         took far longer than the same work in the fastest block; left out of all numbers unless too few
                             others are left
    waiting_blocks           wall time well above the CPU time of the thread that drove the peer
    is_busy                  so much of this that no number of the row should be quoted
    """

    load_before: float | None
    load_after: float | None
    disturbed_blocks: tuple[int, ...] = ()
    waiting_blocks: tuple[int, ...] = ()
    is_busy: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One peer in one cell.

    state             "ok"; "near-tie": another token of practically equal logit, timed and labelled; "red": other tokens, no
                      speed; "failed": could not go on, what it had finished stands; "skipped": cannot run this cell.
                      `words` says why
    tokens_per_s      of every block, all rows of the batch together; used_blocks are those that numbers rest on
    eta               share of the physical limit (modelled): floor of the bytes and FLOPs over the measured time
    tokens_per_round  per row and round, the bonus token and cut rounds included; None for peers that do not speculate
    ratios            name of one of our rows -> its speed over this peer's, in the same blocks
    extra             what else the peer told of its last decode: rounds, forwards, drafted tokens
    """

    cell: Cell
    peer: str
    state: str
    words: str
    verdict: Mapping[str, Any]
    conditions: Conditions
    settings: Mapping[str, Any] = field(default_factory=dict)
    prefill_s: float | None = None
    tokens_per_s: Mapping[int, float] = field(default_factory=dict)
    used_blocks: tuple[int, ...] = ()
    eta: float | None = None
    tokens_per_round: float | None = None
    ratios: Mapping[str, PairedRatio] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @property
    def is_timed(self) -> bool:
        """Whether the row has a speed that may be shown."""
        return self.state != "red" and bool(self.used_blocks)

    @property
    def speed(self) -> Spread | None:
        """Median and spread of tokens/s over the blocks that count."""
        return spread([self.tokens_per_s[block] for block in self.used_blocks]) if self.is_timed else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data without the header of the run."""
        speed, c = self.speed, self.conditions
        return {
            "cell": str(self.cell), "peer": self.peer, "state": self.state, "reason": self.words, "gate": dict(self.verdict),
            "settings": dict(self.settings), "prefill_s": self.prefill_s,
            "tokens_per_s": None if speed is None else {
                "median": speed.median, "p05": speed.p05, "p95": speed.p95, "iqr": self._iqr(),
                "blocks": {str(block): value for block, value in sorted(self.tokens_per_s.items())},
                "used_blocks": list(self.used_blocks),
            },
            "eta": self.eta, "tokens_per_round": self.tokens_per_round, "extra": dict(self.extra),
            "ratios": {name: ratio.to_dict() for name, ratio in self.ratios.items()},
            "load": {"before": c.load_before, "after": c.load_after},
            "busy": {
                "is_busy": c.is_busy, "disturbed_blocks": list(c.disturbed_blocks), "waiting_blocks": list(c.waiting_blocks),
            },
            "labels": list(self.labels),
        }  # fmt: skip

    def _iqr(self) -> float:
        low, high = np.percentile([self.tokens_per_s[block] for block in self.used_blocks], (25, 75))
        return float(high - low)


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell: a row per peer, ours first, and what a reader must know besides.

    best     our fastest row by its median, chosen on these very blocks
    skipped  why the whole cell could not run
    """

    cell: Cell
    rows: tuple[Row, ...]
    best: str | None = None
    notices: tuple[str, ...] = ()
    skipped: str | None = None

    @property
    def is_red(self) -> bool:
        """Whether some peer gave other tokens than it must."""
        return any(row.state == "red" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "cell": str(self.cell), "skipped": self.skipped, "best_of_ours": self.best, "notices": list(self.notices),
            "rows": [row.to_dict() for row in self.rows],
        }  # fmt: skip
