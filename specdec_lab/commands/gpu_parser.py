"""The part of the parser below `gpu`. Building it loads nothing heavy."""

from __future__ import annotations

from pathlib import Path

from ..bench.gpu.plan import MINUTES, STAGES
from .parser import Verbs, offer_json
from .spelling import positive, spelled


def add_gpu(verbs: Verbs) -> None:
    """The verb."""
    verb = verbs.add("gpu", "measure this machine's GPU in stages that are recorded and resume", "", "calibrate kernels",
                     "--rehearse", "rounds headline --again --minutes 5", handler="gpu:gpu")
    stages = "; ".join(f"{stage.name}: {stage.gives}" for stage in STAGES)
    verb.add_argument("stages", nargs="*", metavar="STAGE", help=f"default: all. {stages}".replace("%", "%%"))
    verb.add_argument("--rehearse", action="store_true",
                      help="every stage with tiny shapes on the CPU, labelled, into a temporary folder: to see that it runs")
    verb.add_argument("--again", action="store_true", help="also stages that these very sources have done on this machine")
    verb.add_argument("--out", metavar="DIR", help="where rows go (default: the tuning database: ./tuning_db, else the user's)")
    verb.add_argument("--gpt-fast", type=Path, metavar="PATH", help="a checkout of gpt-fast: adds the stage of that name, "
                      "whose time is mostly compiling and beside the minutes that the other stages are planned for")
    verb.add_argument("--minutes", type=spelled(positive), default=MINUTES, metavar="N",
                      help=f"of all stages together (default: {MINUTES:g})")
    offer_json(verb)
