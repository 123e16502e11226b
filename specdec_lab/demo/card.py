"""The measured parts of the model card, written from TRAINING.json and EVALUATION.json and never by hand.

The card, README.md, holds `<!-- filled: NAME -->` … `<!-- end -->` places. Standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import machine

NOT_YET = "*Not measured yet.*"
PLACE = re.compile(r"(<!-- filled: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
SOURCES = {"text": "code and manual", "revision": "revisions"}


def fill_card(folder: Path) -> str:
    """Fill the places of folder/README.md, if there is one, and return what was filled in."""
    training, evaluation = _json(folder / "TRAINING.json"), _json(folder / "EVALUATION.json")
    results = evaluation.get("gates", {})
    parts = {
        "training": _training(training),
        "loss": _loss(results.get("1")),
        "context": _context(results.get("2")),
        "acceptance": _acceptance(results.get("3")),
        "text": _text(results.get("4"), results.get("5")),
    }
    if evaluation.get("tokens_limit", 8192) < 8192:
        parts["loss"] += f"\n\n**Only the first {evaluation['tokens_limit']} tokens of each text were read.**"
    card = folder / "README.md"
    if card.exists():
        text = card.read_text(encoding="utf-8")
        card.write_text(PLACE.sub(lambda m: m[1] + parts[m[2]] + m[3], text), encoding="utf-8")
    return "\n\n".join(parts.values())


def _json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return data


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] + ["--:"] * (len(lines[0]) - 1))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(estimate: dict[str, Any] | None, digits: int = 3) -> str:
    """`3.12 [3.05, 3.20]`, or a dash where no text is that long."""
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['mean']:.{digits}f} (1 file)"
    return f"{estimate['mean']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def _training(training: dict[str, Any]) -> str:
    if not training:
        return NOT_YET
    rows = [
        [
            name, f"{run['tokens']:,}", f"{run['seconds'] / 60:.0f} min", run["precision"],
            f"{run['device']}, {run['threads']} threads", str(run["seed"]), run["versions"]["torch"],
            machine.short(run["commit"]),
        ]
        for name, run in training.items()
    ]
    return _table(["model", "tokens", "time", "precision", "device", "seed", "torch", "commit"], rows)


def _loss(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return NOT_YET
    models = [name for name in ("target", "draft") if name in gate]
    buckets = list(gate["target"]["all"])
    rows = [
        [f"{name}, {source}", *(_number(gate[name][source].get(b), 2) for b in buckets)]
        for name in models
        for source in ("code", "manual", "all")
    ]
    bits = ", ".join(f"{name} {gate[name]['bits_per_character']:.3f}" for name in models)
    return _table(["nats per token, by position", *buckets], rows) + f"\n\nBits per character, all positions: {bits}."


def _context(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return NOT_YET
    (window,) = set(gate["text"]) - {"full", "difference", "passes"}
    rows = [
        [f"{SOURCES[part]}, {band}", *(_number(gate[part][column][band]) for column in ("full", window, "difference"))]
        for part in SOURCES
        for band in gate[part].get("difference", {})
    ]
    table = _table(["loss at", "full context", f"window {window}", "full − window"], rows)
    return table + "\n\n" + "\n".join(_verdict(part, gate[part], window) for part in SOURCES)


def _verdict(part: str, result: dict[str, Any], window: str) -> str:
    name = SOURCES[part].capitalize()
    if result["passes"]:
        return f"- {name}: **passed**. The full context predicts no worse than the window, at 4K and at 8K."
    worse = [band for band, value in result.get("difference", {}).items() if band != "1K" and value["mean"] > 0]
    if not worse:
        return f"- {name}: not decided, no text was read up to 8K."
    return (
        f"- {name}: **not passed**. At {' and '.join(worse)} the same weights predict better through `{window}` than "
        "with their full context, so a window has nothing to lose there: no acceptance at that length is a property of "
        "windowing."
    )


def _acceptance(gate: dict[str, Any] | None) -> str:
    if gate is None:
        return NOT_YET
    tables = []
    for part, name in SOURCES.items():
        drafters = gate[part]
        bands = list(dict.fromkeys(band for d in drafters.values() for band in d["T=0"]))
        head = [f"first position, {name}", *(f"{band}, {t}" for t in ("T=0", "T=1") for band in bands)]
        rows = [
            [f"`{drafter}`", *(_number(values[t].get(band), 2) for t in ("T=0", "T=1") for band in bands)]
            for drafter, values in drafters.items()
        ]
        tables.append(_table(head, rows))
    return "\n\n".join(tables)


def _text(checks: dict[str, Any] | None, loops: dict[str, Any] | None) -> str:
    lines = []
    if checks is not None:
        trip, sampled = checks["round_trip"], checks["sampled"]
        lines.append(
            f"- {trip['texts'] - len(trip['differing'])} of {trip['texts']} held-out texts come back from the tokenizer"
            f" unchanged; {sampled['tokens']:,} sampled tokens hold {sampled['private_strings']} paths of the machine "
            f"and {len(sampled['home_folders'])} home folders that the shipped text does not show."
        )
    if loops is not None:
        shares = "; ".join(f"{k} {v['greedy']:.0%} (real text {v['real_text']:.0%})" for k, v in loops.items())
        lines.append(
            f"- Greedy continuations repeat themselves, which inflates free-running acceptance. Share of 8-grams that "
            f"occurred before within {next(iter(loops.values()))['tokens']} tokens: {shares}."
        )
    return "\n".join(lines) or NOT_YET
