"""What happened in a run besides its rounds, in words: when the policy put a draft aside. Knows records only."""

from __future__ import annotations

from ..records import FELL_BACK, StepRecord


def event_words(step: StepRecord) -> tuple[str, ...]:
    """One line per event of this round: "round 57, context 2,101: fell back from self:4+60/chain4 to ngram/chain4"."""
    context = max(step.context_tokens)
    return tuple(
        f"round {step.index}, context {context:,}: {flag} to {step.config}" for flag in step.flags if flag.startswith(FELL_BACK)
    )
