"""The part of the parser below `bench`: one action per thing that can be measured. Building it loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..bench.kernel_shapes import BLOCKS, CALLS, DTYPES, QUERIES, SHAPES, TREE, KernelShape
from ..records import Cell, TreeShape, parse_count
from .parser import LOADS, Parser, Verbs, choose_model, offer_json, shipped_workload
from .spelling import positive, seconds, spelled, split_cells, split_configs, split_counts, split_names

DEFAULT_ACTION = "race"
GRIDS = {
    "small": (Cell(1, 1024), Cell(1, 4096), Cell(8, 4096)),
    "full": tuple(Cell(batch, length) for batch in (1, 4, 8, 16) for length in (256, 1024, 4096, 8192)),
}
PEERS = ("llama.cpp", "openvino")  # engines that run in an environment of their own


class BenchParser(Parser):
    """`bench` alone, or with options only, means its default action."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse, with the default action put in where none is named."""
        words = list(args or ())
        if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
            words.insert(0, DEFAULT_ACTION)
        return super().parse_known_args(words, namespace)


def add_bench(verbs: Verbs) -> None:
    """The verb with its actions."""
    bench = verbs.add("bench", "measure the engine side by side with others, or with itself", "",
                      "race --cells 1x1k,8x4k --save", "overhead --cell 8x1k --config self:4+60/chain3 --save",
                      parser_class=BenchParser)
    actions = Verbs(bench.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser), bench.prog)
    add_actions: tuple[Callable[[Verbs], None], ...] = (_race, _attention, _scaling, _overhead, _lossless, _trees)
    for add in add_actions:
        add(actions)


@dataclass(frozen=True, slots=True)
class PeerOption:
    """`NAME=PYTHON`, or `NAME=PYTHON,FOLDER` with models that were converted before (or are to be kept) in FOLDER."""

    name: str
    python: str
    models: str | None = None

    @classmethod
    def parse(cls, text: str) -> PeerOption:
        """Read one option; ValueError says what is wrong."""
        name, equals, place = text.partition("=")
        python, _, models = place.partition(",")
        if name not in PEERS or not equals or not python:
            raise ValueError(f"a peer is written NAME=PYTHON with a name of {', '.join(PEERS)}, got {text!r}")
        return cls(name, python, models or None)


def _race(actions: Verbs) -> None:
    action = actions.add("race", "our engine and others on the same prompts; a peer with other tokens gets no speed", "",
                         "--cells 1x1k,8x4k --blocks 7 --save", "--grid full --markdown race.md",
                         "--peer llama.cpp=llama/bin/python --peers ours,llama.cpp", handler="racing:race")
    where = action.add_mutually_exclusive_group()
    where.add_argument("--cells", type=spelled(split_cells), metavar="BxL,...", help="default: those of --grid small")
    where.add_argument("--grid", choices=tuple(GRIDS), default="small",
                       help="small: 1x1024,1x4096,8x4096 (default); full: batches 1,4,8,16 x lengths 256,1k,4k,8k")
    action.add_argument("--configs", type=spelled(split_configs), default=(), metavar="CONFIG,...",
                        help="of ours, beside plain decoding (default: self:4+60/chain3,self:4+252/chain4,"
                             "model:4+124/chain3,ngram/chain6)")
    action.add_argument("--policy", metavar="FILE", help="race ours on this policy too")
    action.add_argument("--peers", type=spelled(split_names), metavar="NAME,...",
                        help="only these: ours, transformers, transformers/static, ... (default: all)")
    action.add_argument("--peer", type=spelled(PeerOption.parse), action="append", default=[], metavar="NAME=PYTHON[,FOLDER]",
                        help="llama.cpp or openvino in their own environment; FOLDER keeps converted models")
    action.add_argument("--blocks", type=spelled(parse_count), default=5, metavar="N",
                        help="interleaved repetitions; the interval comes from them (default: 5)")
    action.add_argument("--new-tokens", type=spelled(parse_count), default=32, metavar="N", help="per decode (default: 32)")
    shipped_workload(action)
    action.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the peers (default: 0)")
    action.add_argument("--markdown", metavar="FILE.md", help="write the table as markdown")
    save_options(action)
    choose_model(action)
    offer_json(action)


def _overhead(actions: Verbs) -> None:
    action = actions.add("overhead", "rounds with and without instrumentation, in turns", "",
                         "--cell 8x1k --config self:4+60/chain3 --save", handler="examining:overhead")
    action.add_argument("--cell", type=spelled(Cell.parse), default=Cell(8, 1024), metavar="BxL", help="default: 8x1024")
    action.add_argument("--config", type=spelled(split_configs), default=(), metavar="CONFIG,...",
                        help="default: off,self:4+60/chain3")
    action.add_argument("--rounds", type=spelled(parse_count), default=50, metavar="N", help="of one run (default: 50)")
    action.add_argument("--blocks", type=spelled(parse_count), default=8, metavar="N", help="of four runs each (default: 8)")
    shipped_workload(action)
    save_options(action)
    choose_model(action)
    offer_json(action)


def _attention(actions: Verbs) -> None:
    action = actions.add("attention", "the attention kernel beside torch's, by number of queries, after a check of both", "",
                         "--shapes 8x4k/3x64 --queries 1,5 --threads 1 --markdown", handler="attention:attention")
    action.add_argument("--shapes", type=spelled(split_shapes), default=SHAPES, metavar="BxL/HxD[gG],...",
                        help=f"batch x context / KV heads x head size, g: query heads per KV head (default: {_listed(SHAPES)})")
    action.add_argument("--queries", type=spelled(split_counts), default=QUERIES, metavar="N,...",
                        help=f"tokens per sequence of a chain, root counted (default: {_listed(QUERIES)})")
    action.add_argument("--tree", type=spelled(TreeShape.parse), default=TREE, metavar="TREE",
                        help=f"one more row, for a tree of drafted tokens below the root (default: {TREE})")
    action.add_argument("--threads", type=spelled(split_counts), metavar="N,...", help="default: one, and all cores")
    action.add_argument("--dtypes", type=spelled(split_dtypes), default=DTYPES, metavar="DTYPE,...",
                        help=f"of keys and values (default: {_listed(DTYPES)})")
    action.add_argument("--blocks", type=spelled(parse_count), default=BLOCKS, metavar="N",
                        help=f"of {CALLS} calls each (default: {BLOCKS})")
    save_options(action)
    output = action.add_mutually_exclusive_group()
    output.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    offer_json(output)  # type: ignore[arg-type]  # a group adds arguments as a parser does


def split_shapes(text: str) -> tuple[KernelShape, ...]:
    """`8x4096/3x64,8x8k/4x64g2`."""
    return tuple(KernelShape.parse(part) for part in text.split(","))


def split_dtypes(text: str) -> tuple[str, ...]:
    """`float32,bfloat16`."""
    names = tuple(part.strip() for part in text.split(","))
    if strange := [name for name in names if name not in DTYPES]:
        raise ValueError(f"KV dtype {strange[0]!r} is none of {', '.join(DTYPES)}")
    return names


def _listed(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def _scaling(actions: Verbs) -> None:
    action = actions.add(
        "scaling", "how time grows with length, batch and verified tokens, and what speculation gains", "",
        "--batches 1,4,16 --lengths 1k,8k --configs self:4+60/chain3 --svg pictures --save",
        "--from tuning_db/bench/scaling.jsonl --svg pictures --markdown", handler="scaling:scaling",
    )
    # Defaults are put in by the handler, so that it can tell what was asked for.
    action.add_argument("--batches", type=spelled(split_counts), metavar="N,...", help="at least two (default: 1,2,4,8,16)")
    action.add_argument("--lengths", type=spelled(split_counts), metavar="N,...", help="at least two (default: 1k,4k,8k)")
    action.add_argument("--configs", type=spelled(split_configs), metavar="CONFIG,...",
                        help="default: self:4+60/chain3,self:4+252/chain4,model:4+124/chain3; off always runs beside them")
    action.add_argument("--widths", type=spelled(split_counts), metavar="N,...",
                        help="verified tokens measured in three spread cells (default: 1,2,4,5,8,9,16)")
    action.add_argument("--workload", choices=LOADS, help="shipped text, needle with --model needle, or random (timing only)")
    action.add_argument("--temperature", type=spelled(positive), metavar="T", help="sample at T (default: greedy)")
    action.add_argument("--verifier", choices=("rejection", "coupled"), help="when sampling (default: rejection)")
    action.add_argument("--seed", type=int, metavar="N", help="of sampling and of the places in the text (default: 0)")
    action.add_argument("--blocks", type=spelled(parse_count), metavar="N", help="interleaved repetitions (default: 4)")
    action.add_argument("--block-seconds", type=spelled(seconds), metavar="S",
                        help="of one configuration in a block (default: 0.5)")
    action.add_argument("--from", dest="source", metavar="FILE", help="measure nothing: show the newest row of this file again")
    action.add_argument("--svg", metavar="DIR", help="write both pictures into this folder")
    action.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    save_options(action)
    choose_model(action)
    offer_json(action)


def _lossless(actions: Verbs) -> None:
    action = actions.add("lossless", "chi-square of what is said, chains and trees of every drafter, against the exact law", "",
                         "--samples 12000 --save", handler="examining:lossless")
    action.add_argument("--samples", type=spelled(parse_count), default=12_000, metavar="N",
                        help="texts per configuration, at least 3000 (default: 12000)")
    action.add_argument("--backend", metavar="NAME", default="auto", help="attention back end (doctor lists them)")
    save_options(action)
    offer_json(action)


def _trees(actions: Verbs) -> None:
    action = actions.add(
        "trees", "tokens per round: the best tree by measured ranks, a chain, plain top-k trees of equal size", "",
        "--drafts self:4+60,ngram --lengths 1k,4k --sizes 8,16 --save", handler="trees:trees",
    )
    action.add_argument("--drafts", metavar="DRAFTER:VIEW,...",
                        help="default: self:4+60,self:4+252,self:snapkv256+32,model:4+252,ngram")
    action.add_argument("--lengths", type=spelled(split_counts), default=(1024, 4096, 7936), metavar="N,...",
                        help="default: 1024,4096,7936 (the shipped pair knows 8192 positions)")
    action.add_argument("--temperatures", type=spelled(split_temperatures), default=(0.0, 0.8), metavar="T,...",
                        help="default: 0,0.8")
    action.add_argument("--batch", type=spelled(parse_count), default=4, metavar="B", help="prompts (default: 4)")
    action.add_argument("--sizes", type=spelled(split_counts), default=(8, 16), metavar="N,...",
                        help="nodes, root counted (default: 8,16)")
    action.add_argument("--new-tokens", type=spelled(parse_count), default=128, metavar="N", help="per prompt (default: 128)")
    shipped_workload(action)
    action.add_argument("--verifier", choices=("rejection", "coupled"), default="rejection", help="when sampling")
    action.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling and of the places in the text")
    action.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    save_options(action)
    choose_model(action)
    offer_json(action)


def split_temperatures(text: str) -> tuple[float, ...]:
    """`0,0.8`."""
    return tuple(0.0 if float(part) == 0 else positive(part) for part in text.split(","))


def save_options(action: Parser) -> None:
    """Where a result may be kept."""
    action.add_argument("--save", action="store_true", help="append the result to the bench folder of the tuning database")
    action.add_argument("--db", metavar="PATH", help="tuning database (default: ./tuning_db, else the user's own)")

