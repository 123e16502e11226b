"""A comparison in words: the speed-up with its interval, what a round costs and yields, and what to keep in mind."""

from __future__ import annotations

from ..records import Summary, not_measured
from .intervals import PairedRatio


def step_s(summary: Summary) -> float:
    """Mean seconds of a round, all its parts together."""
    return sum(summary.parts_s.values())


def verdict(summary: Summary, speedup: PairedRatio, off_step_s: float, tokens_per_round: float) -> str:
    """One sentence: what was measured against plain decoding, and what a round costs and yields beside a plain step."""
    ratio = f"{speedup.mean:.2f}x"
    interval = f"({speedup.low:.2f} to {speedup.high:.2f}, {speedup.num_blocks} blocks)"
    because = f"a round costs {_cost_words(summary, off_step_s)} and yields {tokens_per_round:.2f} tokens"
    if speedup.num_blocks == 1:
        words = f"not significant: {ratio} in 1 block, which gives no interval; {because}"
    elif not speedup.is_significant:
        words = f"not significant: {ratio} {interval}; {because}"
    elif speedup.low > 1:
        words = f"{ratio} faster {interval}: {because}"
    else:
        most = len(summary.acceptance_histogram)  # K drafted tokens and the bonus
        hopeless = 0 < most * off_step_s < step_s(summary)
        words = f"slower, {ratio} {interval}: {because}"
        words += f"; even full acceptance, {most} tokens, would not pay" if hopeless else ""
    cost = step_s(summary) / off_step_s
    if speedup.is_significant and (tokens_per_round > cost) != (speedup.mean > 1):
        words += " (all blocks pooled say the opposite: measure more blocks)"
    return words + _caveats(summary)


def _cost_words(summary: Summary, off_step_s: float) -> str:
    """`3.10 plain steps (draft 1.90, verify 1.10, rest 0.10)`."""
    parts = {name: seconds / off_step_s for name, seconds in summary.parts_s.items()}
    draft, verify = parts["draft_s"], parts["linear_s"] + parts["attention_s"]
    total = sum(parts.values())
    rest = total - draft - verify
    return f"{total:.2f} plain steps (draft {draft:.2f}, verify {verify:.2f}, rest {rest:.2f})"


def _caveats(summary: Summary) -> str:
    said = list(not_measured(summary.labels))
    if summary.busy_steps:
        said.append(f"machine busy in {summary.busy_steps} rounds")
    return f" [{', '.join(said)}]" if said else ""
