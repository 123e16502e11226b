"""From finished runs to the numbers people quote: acceptance, time, speed-up with its interval, a verdict in words.

Names and definitions follow vLLM's per-request metrics. Knows records and numpy; neither how a step was produced nor
how a number is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from .records import PHASES, Cell, Run, RunHeader, SpecConfig, Spread, StepRecord, Summary, forced_label, not_measured
from .trees import Counts, observed


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts over row-rounds that drafted and were not cut by end of text or length limit; all rates derive from them.

    histogram[j]   row-rounds that accepted exactly j drafted tokens, j = 0..K; K is the deepest draft. Valid for trees
    drafted_at[i]  row-rounds whose draft reached position i (0 = first drafted token)
    at_risk[i]     row-rounds whose draft reached position i and that accepted all positions before it
    """

    histogram: tuple[int, ...]
    drafted_at: tuple[int, ...]
    at_risk: tuple[int, ...]
    num_draft_tokens: int

    @property
    def num_spec_steps(self) -> int:
        """Row-rounds that were counted."""
        return sum(self.histogram)

    @property
    def num_accepted_draft_tokens(self) -> int:
        """Accepted drafted tokens, bonus not counted."""
        return sum(j * count for j, count in enumerate(self.histogram))

    @property
    def mean_acceptance_length(self) -> float:
        """1 + accepted/steps, bonus included; 1.0 where nothing was drafted."""
        return 1 + self.num_accepted_draft_tokens / max(self.num_spec_steps, 1)

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Accepted/proposed; tokens after the first miss count as rejected. None where nothing was proposed."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else None

    @property
    def _accepted_at(self) -> tuple[int, ...]:
        return tuple(sum(self.histogram[i + 1 :]) for i in range(len(self.drafted_at)))

    @property
    def acceptance_rate_per_pos(self) -> tuple[float, ...]:
        """Marginal: of the row-rounds that drafted position i, the share that accepted positions 0..i.

        Non-increasing while all rows draft equally deep. Positions that nobody drafted are left out.
        """
        return tuple(a / n for a, n in zip(self._accepted_at, self.drafted_at, strict=True) if n)

    @property
    def conditional_acceptance(self) -> tuple[float, ...]:
        """Hazard: of the row-rounds that reached position i, the share that accepted it.

        Equal to the ratio of neighbouring marginals while all rows draft equally deep, and a probability also where
        they do not. Positions that nobody reached are left out.
        """
        return tuple(a / n for a, n in zip(self._accepted_at, self.at_risk, strict=True) if n)

    @property
    def alpha_censored(self) -> float | None:
        """Accepted / (accepted + row-rounds with a rejection): maximum likelihood of an i.i.d. acceptance."""
        examined = sum(self.at_risk)
        return self.num_accepted_draft_tokens / examined if examined else None

    @property
    def system_efficiency(self) -> float | None:
        """Emitted / (steps * (K+1)): how much of the longest possible yield was had."""
        full = self.num_spec_steps * len(self.histogram)
        return (self.num_accepted_draft_tokens + self.num_spec_steps) / full if full else None


@lru_cache(maxsize=256)
def _depths(config: str) -> tuple[int, ...]:
    """Depth of every node that a configuration can draft."""
    tree = SpecConfig.parse(config).tree
    return tree.depths if tree else ()


def _reached(step: StepRecord, row: int) -> int:
    """Depth of the deepest node that a row drafted; -1 where its configuration has no such nodes."""
    depths, nodes = _depths(step.config), step.nodes[row] if step.nodes else range(step.drafted[row])
    return max(depths[n] for n in nodes) if max(nodes) < len(depths) else -1


def _outcomes(step: StepRecord) -> Iterable[tuple[int, int, int, int]]:
    """(row, reached depth, accepted, drafted nodes) of the rows that drafted, are live and were not cut."""
    for row, (nodes, accepted) in enumerate(zip(step.drafted, step.accepted, strict=True)):
        if nodes and step.tokens[row] and not step.censored[row]:
            reached = _reached(step, row)
            if accepted > reached:
                raise ValueError(
                    f"step {step.index}, row {row}: {step.config!r} cannot draft {nodes} nodes and accept {accepted}; "
                    "the record does not belong to its configuration"
                )
            yield row, reached, accepted, nodes


def acceptance(steps: Iterable[StepRecord]) -> Acceptance:
    """Acceptance counts of these steps, pooled over rows; prefills, frozen and censored rows are left out."""
    outcomes: list[tuple[int, int, int]] = []
    most = 0
    for step in steps:
        if step.kind == "round":
            found = [o[1:] for o in _outcomes(step)]
            most = max(most, *_depths(step.config)) if found else most
            outcomes += found
    histogram, drafted_at, at_risk = [0] * (most + 1 if most else 0), [0] * most, [0] * most
    for depth, accepted, _ in outcomes:
        histogram[accepted] += 1
        for i in range(depth):
            drafted_at[i] += 1
            at_risk[i] += accepted >= i
    return Acceptance(tuple(histogram), tuple(drafted_at), tuple(at_risk), sum(o[2] for o in outcomes))


def request_acceptance_lengths(run: Run) -> tuple[float | None, ...]:
    """Mean acceptance length per row, None for a row that never drafted; their mean is not the pooled one."""
    lengths: list[list[int]] = [[] for _ in range(run.header.cell.batch)]
    for step in run.rounds:
        for row, _, accepted, _ in _outcomes(step):
            lengths[row].append(accepted)
    return tuple(1 + sum(row) / len(row) if row else None for row in lengths)


def steady_rounds(runs: Iterable[Run]) -> tuple[StepRecord, ...]:
    """The rounds that timing is taken from: all rows live and none of them cut; where there is none such, all."""
    rounds = [s for run in runs for s in run.rounds]
    return tuple(s for s in rounds if all(s.live) and not any(s.censored)) or tuple(rounds)


def _spread(values: Sequence[float]) -> Spread:
    if not values:
        return Spread(0.0, 0.0, 0.0, 0)
    p05, median, p95 = np.percentile(np.asarray(values, dtype=np.float64), (5, 50, 95))
    return Spread(float(median), float(p05), float(p95), len(values))


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
        "step_s": _spread([s.wall_s for s in rounds]),
        "tokens_per_s": _per(sum(s.num_emitted for s in rounds), sum(s.wall_s for s in rounds)),
        "tokens_per_s_spread": _spread([s.num_emitted / s.wall_s for s in rounds if s.wall_s]),
        "parts_s": {name: _per(sum(getattr(s, name) for s in rounds), len(rounds)) for name in PHASES},
        "kv_read_bytes": _per(sum(s.kv_read_bytes + s.draft_kv_read_bytes for s in rounds), len(rounds)),
        "kv_floor_share": kv_floor_s / attention_s if kv_floor_s and attention_s else None,
        "kv_read_bytes_per_s": sum(s.kv_read_bytes for s in rounds) / attention_s if attention_s else None,
    }


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a proportion (Wilson 1927), honest near 0 and 1; (0, 1) without trials."""
    if not 0 <= successes <= trials:
        raise ValueError(f"wilson_interval needs 0 <= successes <= trials, got {successes} of {trials}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, width = successes / trials, z * z / trials
    middle = share + width / 2
    half = z * math.sqrt(share * (1 - share) / trials + width / (4 * trials))
    return max(0.0, (middle - half) / (1 + width)), min(1.0, (middle + half) / (1 + width))


def _student_share(t: float, dof: int) -> float:
    """P(|T| <= t) for an integer number of degrees of freedom: the finite series of Abramowitz & Stegun 26.7.3-4."""
    theta = math.atan(t / math.sqrt(dof))
    cos2 = math.cos(theta) ** 2
    odd = dof % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, dof + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    share = math.sin(theta) * total
    return (share + theta) * 2 / math.pi if odd else share


def student_quantile(confidence: float, dof: int) -> float:
    """The t with P(|T| <= t) = confidence."""
    if not 0 < confidence < 1 or dof < 1:
        raise ValueError(f"student_quantile needs 0 < confidence < 1 and dof >= 1, got {confidence} and {dof}")
    low, high = 0.0, 1.0
    while _student_share(high, dof) < confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, dof) < confidence else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """Geometric mean of candidate/baseline over paired blocks, with its interval.

    One block gives no interval: low is 0 and high is infinite, so nothing compares as significant.
    """

    mean: float
    low: float
    high: float
    num_blocks: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves 1 out."""
        return self.low > 1 or self.high < 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; JSON knows no infinity, so an unbounded `high` is None."""
        return {**asdict(self), "high": self.high if math.isfinite(self.high) else None}


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> PairedRatio:
    """Candidate over baseline, block by block: exp of the mean log ratio with Student's t interval over the blocks."""
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(f"paired_ratio needs equally many of both, got {len(baseline)} and {len(candidate)}")
    if any(not 0 < value < math.inf for value in (*baseline, *candidate)):
        raise ValueError("paired_ratio needs positive finite values; a block that measured nothing must be left out")
    logs = np.log(np.asarray(candidate, dtype=np.float64) / np.asarray(baseline, dtype=np.float64))
    mean, blocks = float(logs.mean()), len(logs)
    if blocks == 1:
        return PairedRatio(math.exp(mean), 0.0, math.inf, 1)
    half = student_quantile(confidence, blocks - 1) * float(logs.std(ddof=1)) / math.sqrt(blocks)
    return PairedRatio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), blocks)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One configuration in one cell against plain decoding of the same cell, block by block.

    speedup                       tokens/s over plain decoding; None for `off` and where no block holds both
    break_even_acceptance_length  mean round over mean plain step: the tokens per row a round must yield to pay
    tokens_per_round              tokens per row that a round did yield (rows without a draft included)
    """

    cell: Cell
    workload: str
    config: str
    summary: Summary
    speedup: PairedRatio | None
    break_even_acceptance_length: float | None
    tokens_per_round: float
    verdict: str


def _conditions(header: RunHeader) -> tuple[Any, ...]:
    """What must be equal for two runs to be compared, the configuration apart."""
    target = header.target.get("fingerprint") or header.target.get("name")
    machine = header.machine.get("device")
    return header.cell, header.workload, header.temperature, header.backend, header.instrumented, target, machine


def _step_s(summary: Summary) -> float:
    return sum(summary.parts_s.values())


def compare(runs: Sequence[Run]) -> tuple[Comparison, ...]:
    """Every (cell, configuration) of `runs` against `off`, in the order of first appearance.

    Runs are paired through `header.block`; several runs of one configuration in a block count as one, pooled. Only runs
    of equal workload, temperature, back end, instrumentation, target and device are paired.
    """
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(_conditions(run.header), {}).setdefault(run.header.config, []).append(run)
    return tuple(
        _comparison(members, configs.get("off", [])) for configs in groups.values() for members in configs.values()
    )


def _by_block(runs: Sequence[Run]) -> Mapping[int | None, Summary]:
    """Block -> pooled summary, blocks that measured no speed left out."""
    blocks: dict[int | None, list[Run]] = {}
    for run in runs:
        blocks.setdefault(run.header.block, []).append(run)
    pooled = {block: pool(members) for block, members in blocks.items()}
    return {block: summary for block, summary in pooled.items() if summary.tokens_per_s > 0}


def _comparison(runs: Sequence[Run], off_runs: Sequence[Run]) -> Comparison:
    header, summary = runs[0].header, pool(runs)
    identity = (header.cell, header.workload, header.config, summary)
    if header.config == "off":
        return Comparison(*identity, None, None, _tokens_per_round(summary, header), "plain decoding, the baseline")
    ours, plain = _by_block(runs), _by_block(off_runs)
    shared = [block for block in ours if block in plain]
    if not shared:
        words = "no verdict: no block measured plain decoding beside it"
        return Comparison(*identity, None, None, _tokens_per_round(summary, header), words)
    speedup = paired_ratio([plain[b].tokens_per_s for b in shared], [ours[b].tokens_per_s for b in shared])
    paired = pool([run for run in runs if run.header.block in shared])
    off_step_s = _step_s(pool([run for run in off_runs if run.header.block in shared]))
    tokens = _tokens_per_round(paired, header)
    words = verdict(paired, speedup, off_step_s, tokens)
    return Comparison(*identity, speedup, _step_s(paired) / off_step_s, tokens, words)


def _tokens_per_round(summary: Summary, header: RunHeader) -> float:
    return summary.tokens_per_s * _step_s(summary) / header.cell.batch


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
        hopeless = 0 < most * off_step_s < _step_s(summary)
        words = f"slower, {ratio} {interval}: {because}"
        words += f"; even full acceptance, {most} tokens, would not pay" if hopeless else ""
    cost = _step_s(summary) / off_step_s
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
