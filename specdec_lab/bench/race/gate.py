"""Who may be timed: a peer whose greedy tokens are those of our plain decoding, row by row.

Engines round differently, so two tokens whose logits differ by less than rounding moves them may change places, and all
that follows is other text. A judge that is neither engine (float64) then says how far below the best token each token of
the row was: within NEAR_TIE everywhere, the row is greedy in its own right and the difference is recorded as a near-tie.
Our own configurations get no tolerance: they run the same arithmetic as our plain decoding. Knows neither torch nor peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .peer import Rows

# In logits. float32 moves the logits of such models by about 1e-5; sums in another order over thousands of keys by 1e-4.
NEAR_TIE = 1e-3
Judge = Callable[[list[int], list[int]], list[float]]  # (prompt, tokens) -> how far below the best each token's logit is


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. state is "equal", "near-tie" or "red"; a red peer has no speed.

    row, place  where the peer first left the tokens of plain decoding; place counts new tokens from 0
    gap         in logits: between the two tokens there (near-tie), or how far below the best token the wrong one is (red)
    """

    state: str
    words: str = ""
    row: int | None = None
    place: int | None = None
    gap: float | None = None

    @property
    def is_red(self) -> bool:
        """Whether no number of this peer means anything."""
        return self.state == "red"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"state": self.state, "words": self.words, "row": self.row, "place": self.place, "gap": self.gap}


EQUAL = Verdict("equal")


class Gate:
    """Judges the tokens of one cell. `plain` are those of our plain decoding."""

    def __init__(self, prompts: Rows, plain: Rows, judge: Judge) -> None:
        self.plain = plain
        self.plain_verdict = EQUAL  # red once the judge found plain decoding itself in the wrong
        self._prompts, self._judge = prompts, judge
        self._known: dict[tuple[bool, str], Verdict] = {}

    def judge(self, tokens: Rows, *, is_ours: bool) -> Verdict:
        """The verdict on what a peer emitted; the same tokens are judged once."""
        key = is_ours, str(tokens)
        if key not in self._known:
            self._known[key] = self._misshapen(tokens) or self._compare(tokens, is_ours)
        return self._known[key]

    def _misshapen(self, tokens: Rows) -> Verdict | None:
        wanted, got = [len(row) for row in self.plain], [len(row) for row in tokens]
        if wanted == got:
            return None
        return Verdict("red", f"emitted {got} tokens per row, {wanted} were asked for")

    def _compare(self, tokens: Rows, is_ours: bool) -> Verdict:
        different = [row for row, (mine, right) in enumerate(zip(tokens, self.plain, strict=True)) if mine != right]
        verdicts = [self._row(row, tokens[row], is_ours) for row in different]
        reds = [verdict for verdict in verdicts if verdict.is_red]
        return next(iter(reds), max(verdicts, key=lambda verdict: verdict.gap or 0.0, default=EQUAL))

    def _row(self, row: int, mine: list[int], is_ours: bool) -> Verdict:
        right = self.plain[row]
        place = next(i for i, (got, expected) in enumerate(zip(mine, right, strict=True)) if got != expected)
        got = f"row {row} emits token {mine[place]} at new token {place}, plain decoding {right[place]}"
        if is_ours:
            return Verdict("red", f"{got}; our configurations must give the very tokens of plain decoding", row, place)
        prompt = self._prompts[row]
        gaps, plain_gaps = self._judge(prompt, mine), self._judge(prompt, right)
        self._check_plain(row, plain_gaps)
        wrong = _first_above(gaps)
        if wrong is None:
            gap = abs(gaps[place] - plain_gaps[place])
            return Verdict("near-tie", f"near-tie at token {place}, gap {gap:.1e}", row, place, gap)
        there = f"its token {wrong} is {gaps[wrong]:.1e} below the best logit in float64"
        return Verdict("red", f"{got}; {there}, a near-tie is below {NEAR_TIE:g}", row, place, gaps[wrong])

    def _check_plain(self, row: int, gaps: list[float]) -> None:
        wrong = _first_above(gaps)
        if wrong is not None:
            words = f"row {row}: token {wrong} of our plain decoding is {gaps[wrong]:.1e} below the best logit in float64"
            self.plain_verdict = Verdict("red", words, row, wrong, gaps[wrong])


def _first_above(gaps: list[float]) -> int | None:
    return next((place for place, gap in enumerate(gaps) if not gap < NEAR_TIE), None)
