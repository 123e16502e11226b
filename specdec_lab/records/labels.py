"""Labels of numbers that are not those of a trained model on real text, and the questions asked of them."""

from __future__ import annotations

from collections.abc import Iterable

# The first and the last are followed by more words.
FORCED, RANDOM_WEIGHTS, RANDOM_CONTEXT, MODELLED, ONE_SHARD = (
    "acceptance: forced", "random-weights", "random context", "modelled", "one shard of "
)  # fmt: skip


def forced_label(labels: Iterable[str]) -> str | None:
    """The label of forced acceptance among these, if there is one."""
    return next((label for label in labels if label.startswith(FORCED) or label == "forced"), None)


def not_measured(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels that say: this is not a trained model on real text, a server must not run on it."""
    whole = ("forced", RANDOM_WEIGHTS, RANDOM_CONTEXT, MODELLED)
    return tuple(label for label in labels if label in whole or label.startswith((FORCED, ONE_SHARD)))
