"""The metrics of runs of one configuration, as if their rounds had been one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..records import PHASES, Run, StepRecord, Summary, forced_label
from ..trees import Counts, observed
from .intervals import spread
from .rates import acceptance


def steady_rounds(runs: Iterable[Run]) -> tuple[StepRecord, ...]:
    """The rounds that timing is taken from: all rows live and none of them cut; where there is none such, all."""
    rounds = [s for run in runs for s in run.rounds]
    return tuple(s for s in rounds if all(s.live) and not any(s.censored)) or tuple(rounds)


def _per(total: float, count: float) -> float:
    return total / count if count else 0.0


def summarize(run: Run) -> Summary:
    """The metrics of one run; see `pool`."""
    return pool((run,))


def check_one_acceptance(runs: Iterable[Run]) -> str | None:
    """The label of forced acceptance that these runs share, None if theirs is measured; ValueError for a mixture."""
    found = {forced_label(run.header.labels): run.header.run_id for run in runs}
    if len(found) > 1:
        kinds = ", ".join(f"{label or 'acceptance: measured'} ({run})" for label, run in found.items())
        raise ValueError(f"runs of different acceptance are never pooled: {kinds}. Look at them one by one.")
    return next(iter(found), None)


def pool(runs: Sequence[Run]) -> Summary:
    """The metrics of runs of one configuration, as if their rounds had been one run.

    Counts and acceptance come from all rounds (frozen and censored rows left out of acceptance). Everything with a time
    in it comes from `steady_rounds`, so that the tail in which few rows are left does not dilute it: `tokens_per_s` is
    the tokens they emitted over the sum of their wall times. `prefill_s` is the mean over runs of all their prefills.
    Plain decoding has no draft statistics: rate None, mean acceptance length 1.0, empty histogram.
    """
    configs = sorted({run.header.config for run in runs})
    if len(configs) != 1:
        raise ValueError(f"pool() takes runs of one configuration, got {', '.join(configs) or 'no run'}; use compare()")
    check_one_acceptance(runs)
    rounds = [step for run in runs for step in run.rounds]
    steady = steady_rounds(runs)
    counts = acceptance(rounds)
    prefill_s = sum(s.wall_s for run in runs for s in run.steps if s.kind == "prefill")
    return Summary(
        config=configs[0],
        num_spec_steps=counts.num_spec_steps,
        num_draft_tokens=counts.num_draft_tokens,
        num_accepted_draft_tokens=counts.num_accepted_draft_tokens,
        num_emitted_tokens=sum(s.num_emitted for s in rounds),
        mean_acceptance_length=counts.mean_acceptance_length,
        draft_acceptance_rate=counts.draft_acceptance_rate,
        acceptance_histogram=counts.histogram,
        acceptance_rate_per_pos=counts.acceptance_rate_per_pos,
        conditional_acceptance=counts.conditional_acceptance,
        rank_acceptance=sum(observed(rounds, with_cut=False), Counts()).vector(),
        **_timing(steady),
        prefill_s=prefill_s / len(runs),
        busy_steps=sum("busy" in s.flags for s in rounds),
        labels=tuple(dict.fromkeys(label for run in runs for label in run.header.labels)),
    )


def _timing(rounds: Sequence[StepRecord]) -> dict[str, Any]:
    attention_s = sum(s.attention_s for s in rounds)
    kv_floor_s = sum(s.kv_floor_s for s in rounds)
    return {
        "step_s": spread([s.wall_s for s in rounds]),
        "tokens_per_s": _per(sum(s.num_emitted for s in rounds), sum(s.wall_s for s in rounds)),
        "tokens_per_s_spread": spread([s.num_emitted / s.wall_s for s in rounds if s.wall_s]),
        "parts_s": {name: _per(sum(getattr(s, name) for s in rounds), len(rounds)) for name in PHASES},
        "kv_read_bytes": _per(sum(s.kv_read_bytes + s.draft_kv_read_bytes for s in rounds), len(rounds)),
        "kv_floor_share": kv_floor_s / attention_s if kv_floor_s and attention_s else None,
        "kv_read_bytes_per_s": sum(s.kv_read_bytes for s in rounds) / attention_s if attention_s else None,
    }
