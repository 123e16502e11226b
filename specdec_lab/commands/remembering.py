"""The words of a tuning, kept in its run folder, so that `resume` needs none."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from .lab import PLACEMENT, Lab
from .mistakes import UserMistake
from .spelling import cells_shard

COMMAND = "command.json"
SCHEMA = "specdec_lab.command/1"
LOADED = ("model", "draft", "backend", "forced_acceptance", "random_weights", *PLACEMENT)


def remember(folder: Path, lab: Lab, args: Namespace) -> None:
    """Keep what was asked for, with the engine that was in use named as it was loaded."""
    words = {name: value for name, value in vars(args).items() if name not in ("handler", "json", *LOADED)}
    model, draft = lab.source
    forced = lab.engine.forced if lab.engine is not None else None
    loaded = {"model": model, "draft": draft, "backend": lab.backend_name, **lab.placement}
    words |= loaded | {"forced_acceptance": None if forced is None else str(forced)}
    shard = args.cells_shard
    words |= {"cells_shard": str(shard) if shard else None, "run": str(folder).removesuffix(shard.suffix if shard else "")}
    new = folder / f".{COMMAND}.new"
    new.write_text(json.dumps({"schema": SCHEMA, "words": words}, indent=1, sort_keys=True) + "\n")
    new.replace(folder / COMMAND)


def recall(run: str | None) -> Namespace:
    """What was asked for in this run folder, or in the one below runs/ that was used last."""
    folder = Path(run) if run else _latest()
    path = folder / COMMAND
    if not path.exists():
        raise UserMistake(f"{folder} is no run folder of tune: it holds no {COMMAND}. Name one, or run tune again")
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise UserMistake(f"{path} cannot be read: {error}. Run tune again with its own words") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise UserMistake(f"{path} was not written by this version of specdec_lab. Run tune again with its own words")
    words: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in data["words"].items()}
    words["cells_shard"] = cells_shard(words["cells_shard"]) if words["cells_shard"] else None
    return Namespace(**dict.fromkeys(LOADED) | words)


def _latest() -> Path:
    found = sorted(Path("runs").glob(f"*/{COMMAND}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserMistake("there is no run of tune below runs/ here; name its folder: resume runs/tune-prose-1a2b3c4d")
    return found[-1].parent
