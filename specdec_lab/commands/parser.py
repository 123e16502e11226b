"""The one parser of `specdec-lab VERB ...` and `%specdec VERB ...`. Building it and its help loads nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

from .. import __version__
from ..records import Cell, parse_count
from .mistakes import UserMistake
from .spelling import cells_shard, positive, seconds, spelled, split_cells, split_configs, split_counts

WORKLOADS = ("prose", "code", "revision", "conversation", "needle")
LOADS = (*WORKLOADS, "random")
ENGINES = ("vllm", "sglang", "tensorrt_llm", "transformers", "llama_cpp")
ROUNDS = ("auto", "host", "eager", "device")
EXECUTORS = ("inline", "process", "ray")
SHELL, NOTEBOOK = "specdec-lab", "%specdec"
EXIT_CODES = """
exit codes: 0 done, 1 measured but a check is red, 2 a mistake in what was asked, 3 the budget ended before all cells were
tuned, 4 nothing beats plain decoding, 130 interrupted (what was measured is kept)"""


class Finished(Exception):
    """The parser has said what was asked for (help, version) and there is nothing to run."""


class Parser(argparse.ArgumentParser):
    """Mistakes raise UserMistake and help raises Finished, so that a notebook kernel survives both."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """One line that ends with where to look."""
        raise UserMistake(f"{message}. See {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Help and version end here."""
        raise Finished(message or "")


def build_parser(prog: str = SHELL) -> Parser:
    """The parser, with the two verbs that only a notebook has when `prog` is the magic's name."""
    codes = "" if prog == NOTEBOOK else f"\n{EXIT_CODES}"
    parser = Parser(prog=prog, description="See where speculative decoding pays, by batch size and sequence length.",
                    epilog=f"Every verb has its own help with examples: {prog} profile --help{codes}")
    parser.add_argument("--version", action="version", version=f"specdec_lab {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    from .acceptance_parser import add_acceptance
    from .bench_parser import add_bench
    from .database_parser import add_db
    from .gpu_parser import add_gpu
    from .limits_parser import add_limits

    measuring = (_load, _run, _profile, _tune, _resume, add_db, _policy, _export, _replay)
    for add in (*measuring, _doctor, add_limits, add_bench, add_gpu, add_acceptance, _demo):
        add(Verbs(verbs, prog))
    if prog == NOTEBOOK:
        _stop(Verbs(verbs, prog))
    return parser


class Verbs:
    """Adds verbs whose examples carry the name under which the user called."""

    def __init__(self, actions: Any, prog: str) -> None:
        self._actions, self._prog = actions, prog

    def add(self, name: str, gives: str, *examples: str, handler: str = "", parser_class: type[Parser] | None = None) -> Parser:
        """A verb; with a parser class of its own if it reads its words differently."""
        lines = "\n".join(f"  {self._prog} {name} {example}".rstrip() for example in examples)
        usual = self._actions._parser_class
        self._actions._parser_class = parser_class or usual
        made: Parser = self._actions.add_parser(name, help=gives, description=gives[0].upper() + gives[1:] + ".",
                                                epilog=f"examples:\n{lines}" if lines else None)
        self._actions._parser_class = usual
        made.set_defaults(handler=handler)
        return made


def _load(verbs: Verbs) -> None:
    verb = verbs.add(
        "load", "load a target and its draft, and say what they are", "", "path/to/model --draft path/to/draft",
        "demo --runner hf", handler="models:load",
    )
    verb.add_argument("model", nargs="?", metavar="MODEL", help="demo (the shipped pair, default), a folder or a hub name")
    _placement(verb)
    verb.add_argument("--as", dest="name", metavar="NAME", help="in a notebook: keep the engine under this variable name too")
    offer_json(verb)


def _run(verbs: Verbs) -> None:
    verb = verbs.add(
        "run", "continue a prompt and show every step", "--prompt 'import os' --config self:4+60/chain3",
        "--workload revision --cell 8x4k --config ngram/chain8", "--file notes.txt --config policy.json --trace run.jsonl.gz",
        handler="generation:run",
    )
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", action="append", help="text to continue; repeat it for a batch")
    source.add_argument("--file", metavar="FILE", help='a text file, or .jsonl with one {"text": ...} per line; - reads stdin')
    source.add_argument("--workload", choices=LOADS,
                        help="shipped text, needle with --model needle, or random ids and KV (timing); needs --cell")
    verb.add_argument("--cell", type=spelled(Cell.parse), metavar="BxL", help="batch and prompt length of the workload: 1x1024")
    verb.add_argument("--config", default="off", metavar="CONFIG",
                      help="off, self:4+60/chain3, model:4+252/chain4, ngram/chain8, or a policy file (default: off)")
    sampling_options(verb)
    verb.add_argument("--max-new-tokens", type=spelled(parse_count), default=128, metavar="N", help="per prompt (default: 128)")
    verb.add_argument("--trace", metavar="PATH", help="write every step here: .jsonl or .jsonl.gz")
    verb.add_argument("--perfetto", metavar="PATH", help="write a timeline for ui.perfetto.dev: .json or .json.gz")
    choose_model(verb)
    offer_json(verb)


def _profile(verbs: Verbs) -> None:
    verb = verbs.add(
        "profile", "measure configurations against plain decoding, interleaved in blocks",
        "--cells 1x1024,8x4096 --configs off,self:4+60/chain3",
        "--cells 8x4k --configs ngram/chain8 --workload revision --report report.html",
        handler="profiling:profile",
    )
    verb.add_argument("--cells", type=spelled(split_cells), required=True, metavar="BxL,...", help="for example 1x1024,8x4k")
    verb.add_argument("--configs", type=spelled(split_configs), required=True, metavar="CONFIG,...",
                      help="for example off,self:4+60/chain3; off is added if left out")
    any_workload(verb)
    verb.add_argument("--blocks", type=spelled(parse_count), default=4, metavar="N",
                      help="interleaved repetitions; the interval comes from them (default: 4)")
    verb.add_argument("--block-seconds", type=spelled(seconds), default=0.5, metavar="S",
                      help="of one configuration in a block (default: 0.5)")
    sampling_options(verb)
    verb.add_argument("--trace", metavar="DIR", help="write every block as a trace into this folder")
    verb.add_argument("--report", metavar="FILE.html", help="write a self-contained report")
    choose_model(verb)
    offer_json(verb)


def _tune(verbs: Verbs) -> None:
    verb = verbs.add(
        "tune", "search the best configuration per batch size and length, and write a policy",
        "--batches 1,4,8 --lengths 512,1k,4k --budget 120s", "--batches 8 --lengths 4k --workload revision --dry-run",
        "--devices cuda:0,cuda:1", "--cells-shard 2/8",
        handler="tuning:tune",
    )
    verb.add_argument("--batches", type=spelled(split_counts), default=(1, 4, 8), metavar="N,...", help="default: 1,4,8")
    verb.add_argument("--lengths", type=spelled(split_counts), default=(512, 1024, 4096), metavar="N,...",
                      help="default: 512,1k,4k")
    verb.add_argument("--budget", type=spelled(seconds), default=120.0, metavar="TIME", help="90s, 2m (default: 120s)")
    any_workload(verb)
    verb.add_argument("--db", metavar="PATH", help="tuning database (default: ./tuning_db, else the user's own)")
    verb.add_argument("--run", metavar="DIR", help="run folder; the same one again resumes (default: runs/tune-WORKLOAD-...)")
    verb.add_argument("--out", default="policy.json", metavar="FILE", help="where the policy goes (default: policy.json)")
    verb.add_argument("--devices", metavar="NAME,...",
                      help="measure cells side by side, a process per device: cuda:0,cuda:1 (default: this process alone)")
    verb.add_argument("--executor", choices=EXECUTORS,
                      help="who measures: inline, this process; process, one per device; ray, actors with a GPU each (default: "
                           "process with --devices, else inline)")
    verb.add_argument("--workers", type=spelled(parse_count), metavar="N", help="of --executor ray: how many actors")
    verb.add_argument("--cells-shard", type=spelled(cells_shard), metavar="I/N",
                      help="tune the I-th of N parts of the cells, with a run folder and records of its own, for `db merge`; "
                           "all/N: what N shards would find, in one process")
    verb.add_argument("--remeasure", action="store_true", help="use nothing that is recorded, in a new run folder")
    verb.add_argument("--dry-run", action="store_true", help="say what would be tuned, with times, and stop")
    verb.add_argument("--allow-forced", action="store_true", help="write a policy although acceptance is forced")
    sampling_options(verb)
    choose_model(verb)
    offer_json(verb)


def _resume(verbs: Verbs) -> None:
    verb = verbs.add("resume", "go on with a tuning that was interrupted or whose budget ended", "", "runs/tune-prose-1a2b3c4d",
                     "--budget 10m", handler="tuning:resume")
    verb.add_argument("run", nargs="?", metavar="RUN", help="its run folder (default: the one that was used last, below runs/)")
    verb.add_argument("--budget", type=spelled(seconds), metavar="TIME", help="90s, 2m (default: as before)")
    offer_json(verb)


def _policy(verbs: Verbs) -> None:
    verb = verbs.add(
        "policy", "show a policy, explain an answer, draw its trees, or check it against this machine", "show", "show 8x4k",
        "explain 4x2k --policy runs/demo/policy.json", "trees --out trees.svg", "check", handler="policies:policy",
    )
    verb.add_argument("action", choices=("show", "explain", "trees", "check"),
                      help="trees: how large a tree pays where, and why")
    verb.add_argument("cell", nargs="?", type=spelled(Cell.parse), metavar="CELL", help="batch and length: 8x4k")
    verb.add_argument("--policy", metavar="FILE", help="default: policy.json, as tune writes it")
    verb.add_argument("--out", metavar="FILE", help="of trees: write the picture here, .svg or .html")
    choose_model(verb)
    offer_json(verb)


def _export(verbs: Verbs) -> None:
    verb = verbs.add(
        "export", "say a policy in the words of a serving engine, with what gets lost", "policy.json --to vllm --length 4k",
        "policy.json --to sglang --option draft_model=my/draft --out deploy/", handler="policies:export",
    )
    verb.add_argument("policy", metavar="POLICY", nargs="?", help="policy file (default: policy.json)")
    verb.add_argument("--to", required=True, choices=ENGINES, help="the engine")
    verb.add_argument("--length", metavar="N", help="usual context of the deployment, for example 4k; or: each")
    verb.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                      help="of the engine, for example draft_model=my/draft")
    verb.add_argument("--allow-labelled", "--allow-forced", action="store_true",
                      help="export a policy labelled forced, random-weights or modelled")
    verb.add_argument("--out", metavar="DIR", help="write the files here instead of printing them")
    offer_json(verb)


def _replay(verbs: Verbs) -> None:
    verb = verbs.add(
        "replay", "show recorded runs again, as they happened", "run.jsonl.gz", "traces/ --speed 10",
        "run.jsonl.gz --perfetto run.json.gz", handler="replaying:replay",
    )
    verb.add_argument("traces", nargs="+", metavar="TRACE", help="trace files, or folders of them")
    verb.add_argument("--speed", type=spelled(positive), metavar="X",
                      help="times real time (default: 1 in a notebook, at once in a shell)")
    verb.add_argument("--perfetto", metavar="PATH", help="write a timeline of one trace for ui.perfetto.dev")
    offer_json(verb)


def _doctor(verbs: Verbs) -> None:
    verb = verbs.add("doctor", "say what this machine can run, how fast it reads, and what is missing", "", "--json",
                     handler="examining:doctor")
    choose_model(verb)
    offer_json(verb)


def _demo(verbs: Verbs) -> None:
    verb = verbs.add("demo", "do the main job on this machine with the shipped pair: profile, tune, write a policy", "",
                     handler="examining:demo")
    verb.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything is written (default: runs/demo)")
    verb.add_argument("--budget", type=spelled(seconds), default=120.0, metavar="TIME", help="of the tuning (default: 120s)")
    choose_model(verb)
    offer_json(verb)


def _stop(verbs: Verbs) -> None:
    stop = verbs.add("stop", "stop what runs in the background; everything recorded is kept", "", "profile",
                     handler="background:stop")
    stop.add_argument("name", nargs="?", metavar="NAME", help="run, profile, replay or tune (default: all)")
    verbs.add("status", "say what runs in the background, and which engine is loaded", "", handler="background:status")


def _placement(verb: Parser) -> None:
    verb.add_argument("--random-weights", metavar="NAME",
                      help="a model by its sizes, with random weights, for timing: llama-3.1-8b, llama-2-7b-32k, qwen3-1.7b, "
                           "draft-1b, tiny; as --model random:NAME")
    verb.add_argument("--draft", metavar="MODEL", help="draft model: a folder, a hub name, or random:draft-1b")
    verb.add_argument("--device", metavar="DEVICE", help="auto, cpu or cuda (default: auto)")
    verb.add_argument("--dtype", metavar="DTYPE", help="auto, float32, bfloat16 (default: auto)")
    verb.add_argument("--kv-dtype", metavar="DTYPE", help="of keys and values in the cache (default: as --dtype)")
    verb.add_argument("--runner", choices=("auto", "fast", "hf"), help="fast: ours; hf: transformers' modules (default: auto)")
    verb.add_argument("--draft-positions", choices=("absolute", "cache"),
                      help="cache: for a draft trained on shorter texts than these; its window then fits (default: absolute)")
    verb.add_argument("--forced-acceptance", metavar="ALPHA",
                      help="accept each draft with this chance instead of testing it, all else runs: for timing; also "
                           "marginals:0.8,0.6 or ranks:0.6,0.2")
    verb.add_argument("--tensor-parallel", type=spelled(parse_count), metavar="N",
                      help="cut the target among N processes: torchrun --nproc-per-node N -m specdec_lab ...")
    verb.add_argument("--shard", metavar="N/RANKS", help="one shard alone, for timing: 1/8; its tokens mean nothing")
    verb.add_argument("--backend", metavar="NAME", help="attention back end (default: auto; doctor lists them)")
    choose_rounds(verb)


def choose_rounds(verb: Parser) -> None:
    """Where rounds run."""
    verb.add_argument("--rounds", choices=ROUNDS,
                      help="device: captured as CUDA graphs; eager: the same work without graphs, on a CPU too; host: step by "
                           "step (default: auto, device where that can be)")


def choose_model(verb: Parser) -> None:
    """Which model, where and how."""
    group = verb.add_argument_group("model", "default: the engine in use, else the shipped pair")
    group.add_argument("--model", metavar="MODEL", help="demo (the shipped pair), needle, a folder or a hub name")
    _placement(group)  # type: ignore[arg-type]  # a group adds arguments as a parser does


def any_workload(verb: Parser) -> None:
    """Which text the prompts are cut from, or none."""
    verb.add_argument("--workload", choices=LOADS, default="prose",
                      help="shipped text (default: prose), needle with --model needle, or random ids and KV (timing only)")


def shipped_workload(verb: Parser) -> None:
    """Which text the prompts are cut from, where what is said matters."""
    verb.add_argument("--workload", choices=WORKLOADS, default="prose",
                      help="shipped text, or needle with --model needle (default: prose)")


def sampling_options(verb: Parser) -> None:
    """How tokens are drawn."""
    verb.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep this much probability (default: 1, all)")
    verb.add_argument("--top-k", type=int, default=0, metavar="K", help="keep this many tokens (default: 0, all)")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling and of the places in the text (default: 0)")
    verb.add_argument("--verifier", choices=("rejection", "coupled"), default="rejection",
                      help="rejection: the target's law; coupled: plain sampling's own tokens (default: rejection)")


def offer_json(verb: Parser) -> None:
    """Output for machines."""
    verb.add_argument("--json", action="store_true", help="print JSON only")


def options_of(parser: argparse.ArgumentParser, words: Iterable[str]) -> list[str]:
    """What may come after these complete words: verbs, then options and choices, for completion."""
    verbs = _choices(parser)
    known = [word for word in words if word in verbs]
    if not known:
        return sorted([*verbs, *(option for action in parser._actions for option in action.option_strings)])
    verb, words = verbs[known[0]], list(words)
    if _choices(verb):  # a verb with actions of its own, as bench
        return options_of(verb, words[words.index(known[0]) + 1 :])
    last = words[-1] if words else ""
    for action in verb._actions:
        if last in action.option_strings and action.nargs != 0:
            return [str(choice) for choice in action.choices or ()]
    options = [option for action in verb._actions for option in action.option_strings]
    positional = [str(c) for action in verb._actions if not action.option_strings for c in action.choices or ()]
    return sorted({*positional, *options} - {word for word in words if word.startswith("-")})


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
