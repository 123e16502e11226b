"""The part of the parser for `acceptance`. Building it loads nothing heavy."""

from __future__ import annotations

from ..records import Cell, parse_count
from .bench_parser import save_options
from .parser import Verbs, choose_model, offer_json, sampling_options, shipped_workload
from .spelling import spelled


def add_acceptance(verbs: Verbs) -> None:
    """The verb."""
    verb = verbs.add(
        "acceptance", "measure how often the k-th child of a tree is accepted, and what trees that is worth",
        "--config self:4+60 --width 8 --depth 3 --cell 4x1024 --temperature 0.8", "--config model:4+252 --cell 1x2k --save",
        handler="acceptance:acceptance",
    )
    verb.add_argument("--config", required=True, metavar="DRAFTER:VIEW", help="without a tree: self:4+60, model:full, ngram")
    verb.add_argument("--cell", type=spelled(Cell.parse), default=Cell(4, 1024), metavar="BxL", help="default: 4x1024")
    verb.add_argument("--width", type=spelled(parse_count), default=8, metavar="K", help="children of a node (default: 8)")
    verb.add_argument("--depth", type=spelled(parse_count), default=3, metavar="D", help="levels of children (default: 3)")
    shipped_workload(verb)
    verb.add_argument("--max-new-tokens", type=spelled(parse_count), default=128, metavar="N", help="per prompt (default: 128)")
    sampling_options(verb)
    save_options(verb)
    choose_model(verb)
    offer_json(verb)
