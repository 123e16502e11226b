"""What came out of a check: per case a verdict, over all of them a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cases import Case, dtype_name

GREEN, RED, NOTHING_RAN = "green", "RED", "nothing ran"
SHOWN_FAULTS = 10


class NotConforming(AssertionError):
    """A back end failed a case, or could run none; the message is the report."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case.

    error    worst relative error of an output row (norm of the difference over norm of the row), inf for NaN
    allowed  the most that this dtype and this case may show
    faults   what is wrong, in words; none in a good case
    refusal  why the back end said that it cannot, in which case nothing was run
    """

    case: Case
    error: float = 0.0
    allowed: float = 0.0
    faults: tuple[str, ...] = ()
    refusal: str | None = None

    def __str__(self) -> str:
        return f"{self.case.name}: {self.refusal or '; '.join(self.faults) or 'good'}"


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts on one back end. `str()` is a table."""

    backend: str
    verdicts: tuple[Verdict, ...]

    @property
    def ran(self) -> tuple[Verdict, ...]:
        """What was run."""
        return tuple(v for v in self.verdicts if v.refusal is None)

    @property
    def faulty(self) -> tuple[Verdict, ...]:
        """What was run and is wrong."""
        return tuple(v for v in self.verdicts if v.faults)

    @property
    def refusals(self) -> dict[str, int]:
        """Cases by the reason for which the back end refused them."""
        return dict(Counter(v.refusal for v in self.verdicts if v.refusal is not None))

    @property
    def verdict(self) -> str:
        """green, RED, or nothing ran."""
        if not self.ran:
            return NOTHING_RAN
        return RED if self.faulty else GREEN

    @property
    def worst(self) -> dict[str, Verdict]:
        """Per dtype the case that comes closest to what is allowed, or exceeds it most."""
        worst: dict[str, Verdict] = {}
        for verdict in self.ran:
            dtype = dtype_name(verdict.case.need.dtype)
            worst[dtype] = max(worst.get(dtype, verdict), verdict, key=lambda v: v.error / v.allowed)
        return worst

    def raise_if_red(self) -> None:
        """NotConforming with the report unless something ran and all of it is right."""
        if self.verdict != GREEN:
            raise NotConforming(str(self))

    def __str__(self) -> str:
        faults = [str(verdict) for verdict in self.faulty[:SHOWN_FAULTS]]
        if len(self.faulty) > SHOWN_FAULTS:
            faults.append(f"and {len(self.faulty) - SHOWN_FAULTS} more cases")
        return "\n".join([self._headline(), *self._table(), *self._refusal_lines(), *faults])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _headline(self) -> str:
        failed = f", {len(self.faulty)} of them wrong" if self.faulty else ""
        return f"attention back end {self.backend}: {self.verdict}, {len(self.ran)} cases run{failed}"

    def _table(self) -> Iterable[str]:
        if not self.ran:
            return
        counts = Counter(dtype_name(verdict.case.need.dtype) for verdict in self.ran)
        yield f"{'dtype':10}{'cases':>6}  {'worst row':>9}  {'allowed':>7}  in the case"
        for dtype, worst in self.worst.items():
            yield f"{dtype:10}{counts[dtype]:6}  {worst.error:9.1e}  {worst.allowed:7.0e}  {worst.case.name}"

    def _refusal_lines(self) -> Iterable[str]:
        for reason, count in self.refusals.items():
            yield f"refused {count} cases: {reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, without the cases that are right."""
        worst = {d: {"error": v.error, "allowed": v.allowed, "case": v.case.name} for d, v in self.worst.items()}
        return {
            "backend": self.backend, "verdict": self.verdict, "cases": len(self.ran), "worst": worst,
            "refusals": self.refusals, "faults": [str(verdict) for verdict in self.faulty],
        }  # fmt: skip

