"""How time per token grows with length, batch and verified tokens, against the fitted cost line, and what speculation gains.

    from specdec_lab.bench.scaling import ScalingReport, measure
    report = ScalingReport(measure(engine, batches=(1, 8), lengths=(1024, 4096)))

`measure` gives points, all else is a pure function of them: a saved row can be drawn again and cannot differ from its pictures.
"""

from .analysis import Analysis, analyse
from .measure import BATCHES, CONFIGS, LENGTHS, WIDTHS, Protocol, measure
from .report import ScalingReport, read_last
from .samples import Point, Scaling

__all__ = [
    "BATCHES", "CONFIGS", "LENGTHS", "WIDTHS", "Analysis", "Point", "Protocol", "Scaling", "ScalingReport", "analyse",
    "measure", "read_last",
]  # fmt: skip
