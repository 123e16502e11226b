"""`bench race`: our engine against others on the same prompts, with the tokens checked before anything is timed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_parser import GRIDS, PeerOption
from .bench_rows import Keep, keeper
from .files import writable_file, writable_folder
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import INTERRUPTED, MISTAKE, OK, RED, Outcome
from .screen import Screen

if TYPE_CHECKING:
    from ..bench.race.peer import Peer
    from ..bench.race.report import RaceReport
    from ..bench.race.rows import CellResult
    from ..engine.loop import Engine


def race(lab: Lab, args: Namespace) -> Outcome:
    """Race over cells; with `--save` a cell's rows are on disk before the next cell begins."""
    from ..bench.race.hf import Reference, quiet
    from ..bench.race.report import header_of
    from ..bench.race.runner import Race
    from ..bench.sessions import Sessions

    lab.check_idle("bench")
    keep = keeper(args, "race.jsonl")
    markdown = writable_file(args.markdown, ".md") if args.markdown else None
    screen = Screen(lab.err)
    engine = lab.engine_for(args)
    _check_float32(engine)
    if engine.forced is not None:
        raise UserMistake(f"{engine.forced.label}: the tokens mean nothing, so no race can check them. Race without it")
    target, draft = _checkpoints(lab)
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with asked():
            peers = _line_up(engine, args, target, draft, place, screen)
            sessions = Sessions(engine, args.workload, max_new_tokens=args.new_tokens)
            racing = stack.enter_context(Race(
                peers, sessions, Reference(target), blocks=args.blocks, new_tokens=args.new_tokens, seed=args.seed,
                say=screen.say, show=lambda line: screen.draw(lambda: line),
            ))  # fmt: skip
        header = header_of(engine, workload=args.workload, new_tokens=args.new_tokens, blocks=args.blocks, seed=args.seed)
        report = _drain(racing, args.cells or GRIDS[args.grid], header, keep)
        screen.wipe()
    if markdown is not None:
        markdown.write_text(report.markdown(), encoding="utf-8")
    return Outcome(report, str(report), report.to_dict(), _exit_code(report))


def _drain(racing: Any, cells: Any, header: dict[str, Any], keep: Keep) -> RaceReport:
    """Run it; an interrupt keeps every finished cell."""
    from ..bench.race.report import RaceReport, rows_to_save

    results: list[CellResult] = []
    try:
        for result in racing.run(cells):
            keep(rows_to_save(header, result))
            results.append(result)
    except KeyboardInterrupt:
        return RaceReport(header, tuple(results), is_interrupted=True)
    return RaceReport(header, tuple(results))


def _exit_code(report: RaceReport) -> int:
    if report.is_interrupted:
        return INTERRUPTED
    if report.is_red:
        return RED
    return MISTAKE if any(result.skipped is not None for result in report.results) else OK


def _check_float32(engine: Engine) -> None:
    dtype = str(engine.pair.target.dtype).removeprefix("torch.")
    if dtype != "float32":
        raise UserMistake(
            f"the race compares engines token by token in float32, and this engine runs in {dtype}; ask for --dtype float32"
        )


def _checkpoints(lab: Lab) -> tuple[str, str | None]:
    """Where the engine's weights came from, so that other engines load the same ones."""
    from ..engine.models.loading import DEMO

    model, draft = lab.source
    if model == "demo":
        return str(DEMO / "target"), draft or str(DEMO / "draft")
    if model == "needle":
        return str(DEMO / "needle"), draft
    return model, draft


def _line_up(
    engine: Engine, args: Namespace, target: str, draft: str | None, place: Path, screen: Screen
) -> list[Peer]:  # fmt: skip
    """All peers that were asked for, ours first."""
    from ..bench.race.lineup import DEFAULT_CONFIGS, our_peers, transformers_peers
    from ..policy import Policy

    policy = Policy.load(args.policy) if args.policy else None
    peers = our_peers(engine, args.configs or DEFAULT_CONFIGS, policy)
    if _is_wanted("transformers", args.peers):
        screen.say("loading the same weights with transformers")
        peers += transformers_peers(target, draft, engine.pair.target.dtype, engine.pair.target.device)
    for option in args.peer:
        peers += _workers(option, target, draft, place, screen)
    plain, *others = peers
    return [plain, *(peer for peer in others if args.peers is None or _is_named(peer.name, args.peers))]


def _is_wanted(group: str, names: tuple[str, ...] | None) -> bool:
    return names is None or any(name == group or name.startswith(f"{group}/") for name in names)


def _is_named(peer: str, names: tuple[str, ...]) -> bool:
    return any(peer == name or peer.startswith(f"{name}/") for name in names)


def _workers(option: PeerOption, target: str, draft: str | None, place: Path, screen: Screen) -> list[Peer]:
    """The processes of one `--peer`, with its models converted by its own environment where they are not there yet."""
    import torch

    from ..bench.race.lineup import convert, worker_peers

    if shutil.which(option.python) is None:
        raise UserMistake(f"--peer {option.name}: there is no program {option.python}; name the Python of its environment")
    folder = writable_folder(option.models or place / option.name)
    screen.say(f"converting the same weights for {option.name}")
    made = convert(option.name, option.python, target, folder, "target")
    made_draft = convert(option.name, option.python, draft, folder, "draft") if draft is not None else None
    return worker_peers(option.name, option.python, made, made_draft, torch.get_num_threads())
