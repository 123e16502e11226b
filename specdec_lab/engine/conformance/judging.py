"""What is asked of the answers: the right numbers in the right form, nothing else touched, and every promise kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..attention import AttentionBackend, Need, ReferenceBackend
from ..threads import torch_threads
from .cases import CHANGES, Case, Situation, cases
from .report import Report, Verdict

# Worst relative error of a row against float64 from the same rounded inputs. Rounding the output alone may cost 3.9e-3 in
# bfloat16 and 4.9e-4 in float16; half as much again is left for what a back end rounds on the way.
ALLOWED = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 7.5e-4, torch.bfloat16: 6e-3}
FAILURES = (ValueError, RuntimeError, TypeError, LookupError, AssertionError)
THREADS = (1, 2)
_meaning = ReferenceBackend()


def check(
    backend: AttentionBackend, need: Need | None = None, on_case: Callable[[Verdict], None] = lambda verdict: None
) -> Report:
    """Run every case within `need` (None: all that we know) that the back end does not refuse.

    on_case  is told of every verdict as it comes; what it raises ends the check
    """
    verdicts = []
    for case in cases(need):
        verdicts.append(judge(backend, case))
        on_case(verdicts[-1])
    return Report(backend.name, tuple(verdicts))


def judge(backend: AttentionBackend, case: Case) -> Verdict:
    """Build a case and look for faults; an error that the back end raises is one."""
    refusal = backend.why_not(case.need)
    if refusal is not None:
        return Verdict(case, refusal=refusal)
    situation = case.build(backend.promises.masks_loads)
    allowed = allowed_error(case.need.dtype, situation.q.dtype, case.gain)
    right, before = meaning(situation), (situation.q.clone(), situation.cache.kv.clone())
    try:
        whole = situation.answers(backend, situation.plan(backend))
        faults = [*_form(whole, situation), *_touched(situation, before)]
        answers = _live(whole, situation)
        error = worst_row(answers, right)
        faults += [*_numbers("rows are", error, allowed), *_repeats(backend, situation, answers)]
        if case.family == CHANGES:
            faults += _alone(backend, situation, answers, right, allowed)
            faults += _threads(backend, situation, right, allowed)
            faults += _two_plans(backend, situation, answers, allowed)
    except FAILURES as raised:
        return Verdict(case, math.inf, allowed, (f"raised {type(raised).__name__}: {raised}",))
    return Verdict(case, error, allowed, tuple(faults))


def meaning(situation: Situation) -> list[Tensor]:
    """What every layer must give for the live rows, [R, T, Hq, D] in float64: the softmax over exactly the visible keys."""
    exact = replace(situation, q=situation.q.double())
    return _live(exact.answers(_meaning, exact.plan(_meaning)), exact)


def _live(answers: list[Tensor], situation: Situation) -> list[Tensor]:
    return answers if situation.reads.rows is None else [answer[situation.live] for answer in answers]


def _ask(backend: AttentionBackend, situation: Situation) -> list[Tensor]:
    """A new plan, and the answers for the live rows."""
    return _live(situation.answers(backend, situation.plan(backend)), situation)


def worst_row(answers: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """Largest |answer - right| / |right| over the rows of all layers; inf where an answer is not finite."""
    worst = 0.0
    for answer, truth in zip(answers, right, strict=True):
        if answer.shape != truth.shape or not bool(answer.isfinite().all()):
            return math.inf
        errors = (answer.double() - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-6)
        worst = max(worst, float(errors.max()))
    return worst


def allowed_error(kv: torch.dtype, queries: torch.dtype, gain: float = 1.0) -> float:
    """The most that `worst_row` may be.

    Scores in float32 carry rounding errors that grow with them; a back end may round queries to the dtype of its keys.
    """
    return ALLOWED[kv] * (gain if kv == torch.float32 else 1.0) * (1.0 if queries == kv else 2.0)


def _form(answers: list[Tensor], situation: Situation) -> Iterator[str]:
    q = situation.q
    for answer in answers:
        if (answer.shape, answer.dtype, answer.device) != (q.shape, q.dtype, q.device):
            yield (
                f"gives {list(answer.shape)} {answer.dtype} on {answer.device} for queries of {list(q.shape)} {q.dtype} on "
                f"{q.device}"
            )
            return


def _numbers(what: str, error: float, allowed: float) -> Iterator[str]:
    if not error <= allowed:
        wrong = "not finite" if math.isinf(error) else f"wrong by {error:.2g}"
        yield f"{what} {wrong}, {allowed:.0e} is allowed"


def _touched(situation: Situation, before: tuple[Tensor, Tensor]) -> Iterator[str]:
    for name, now, then in (("queries", situation.q, before[0]), ("cache", situation.cache.kv, before[1])):
        if not torch.equal(_bits(now), _bits(then)):
            yield f"changed the {name}"


def _repeats(backend: AttentionBackend, situation: Situation, answers: list[Tensor]) -> Iterator[str]:
    """A new plan and the same numbers must give the same bits: nothing may be left over from the call before."""
    if not _same(_ask(backend, situation), answers):
        yield "gives other bits when asked again"


def _alone(
    backend: AttentionBackend, whole: Situation, answers: list[Tensor], right: list[Tensor], allowed: float
) -> Iterator[str]:
    for place, row in enumerate(whole.live):
        alone, pick = _ask(backend, whole.row(row)), slice(place, place + 1)
        yield from _numbers(f"row {row} alone is", worst_row(alone, [r[pick] for r in right]), allowed)
        if backend.promises.same_alone and not _same(alone, [a[pick] for a in answers]):
            yield f"row {row} has other bits alone than in the batch"


def _threads(backend: AttentionBackend, situation: Situation, right: list[Tensor], allowed: float) -> Iterator[str]:
    first: list[Tensor] = []
    for threads in THREADS:
        with torch_threads(threads):
            answers = _ask(backend, situation)
        yield from _numbers(f"on {threads} threads rows are", worst_row(answers, right), allowed)
        first = first or answers
        if backend.promises.same_threads and not _same(answers, first):
            yield f"gives other bits on {threads} threads than on {THREADS[0]}"


def _two_plans(backend: AttentionBackend, situation: Situation, answers: list[Tensor], allowed: float) -> Iterator[str]:
    """A plan for the same cache after a rollback is right, and leaves an earlier plan as it was."""
    shorter, early = situation.shorter(), situation.plan(backend)
    error = worst_row(_ask(backend, shorter), meaning(shorter))
    yield from _numbers("with a token less in every row rows are", error, allowed)
    if not _same(_live(situation.answers(backend, early), situation), answers):
        yield "a plan gives other bits after another one was made and used"


def _bits(values: Tensor) -> Tensor:
    """As integers, in which NaN equals itself."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
