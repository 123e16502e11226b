"""Whether a back end computes what attention means: run it in every case of `cases` and compare with float64.

    from specdec_lab.engine import conformance
    report = conformance.check(MyBackend())  # an AttentionBackend, wherever it was written
    print(report)
    report.raise_if_red()

or `python -m specdec_lab.engine.conformance NAME`. A back end is held to what it can (`why_not`) and to what it promises
(`promises`), on this machine. Not known here: how a back end works, and how fast.
"""

from .cases import Case, Corner, Situation, cases
from .judging import check, judge, meaning
from .report import NotConforming, Report, Verdict

__all__ = ["Case", "Corner", "NotConforming", "Report", "Situation", "Verdict", "cases", "check", "judge", "meaning"]
