"""`policy` and `export`: what was tuned, why, whether it belongs here, and in whose words it can be deployed."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.tables import aligned
from ..records import Cell
from .files import writable_folder
from .lab import Lab
from .mistakes import UserMistake, asked
from .outcome import OK, RED, Outcome, Words
from .tree_sizes import outcome

if TYPE_CHECKING:
    from ..export import Exported
    from ..policy import Policy

DEFAULT = Path("policy.json")
MATCH_OPTION = "ngram_match"
NUMBERS = ("batch", "max_num_seqs", "max_batch_size")


def policy(lab: Lab, args: Namespace) -> Outcome:
    """Show the table or one answer, explain an answer, or check the policy against this machine and pair."""
    with asked():
        found = _policy(lab, args.policy)
    if args.action == "check":
        return _check(lab, args, found)
    if args.action == "trees":
        return outcome(found, args.out)
    if args.out:
        raise UserMistake(f"policy {args.action} writes no file; --out belongs to policy trees")
    if args.action == "explain":
        if args.cell is None:
            raise UserMistake("policy explain needs a cell, batch and length, for example: policy explain 8x4k")
        words = found.explain(args.cell.batch, args.cell.length)
        return Outcome(Words(words), words, {**_answer(found, args.cell), "explanation": words})
    if args.cell is None:
        return Outcome(found, policy_words(found), found.to_dict())
    answer = _answer(found, args.cell)
    words = f"{args.cell}: {answer['config']}, because {answer['reason']}"
    return Outcome(found.lookup(args.cell.batch, args.cell.length), words, answer)


def _policy(lab: Lab, path: str | None) -> Policy:
    from ..policy import Policy

    if path is None and lab.policy is not None:
        return lab.policy
    if path is None and not DEFAULT.exists():
        raise UserMistake(f"there is no {DEFAULT} here; `tune` writes one, or name one with --policy FILE")
    lab.policy = Policy.load(path or DEFAULT)
    return lab.policy


def _answer(found: Policy, cell: Cell) -> dict[str, Any]:
    choice = found.choice(cell.batch, cell.length)
    return {"cell": str(cell), "config": choice.config, "reason": choice.reason, "log_speedups": dict(choice.values)}


def _check(lab: Lab, args: Namespace, found: Policy) -> Outcome:
    """Whether the policy belongs to the pair and machine in use; where not, it would answer `off`."""
    engine = lab.engine_for(args)
    reason = found.mismatch(engine.identity())
    if reason is None:
        words = f"this policy belongs to {engine.pair.name} on {engine.identity().device}: {found.headline()}"
    else:
        words = f"this policy does not belong here and would answer off: {reason}"
    data = {"belongs": reason is None, "reason": reason, "device": engine.identity().device}
    return Outcome(Words(words), words, data, OK if reason is None else RED)


def policy_words(found: Policy) -> str:
    """Headline, where the numbers come from, and the table."""
    header = found.header
    labels = f"; labels: {', '.join(header['labels'])}" if header["labels"] else ""
    measured = f"{header['target']}, workload {header['workload']}, {header['device']}, {header['dtype']}"
    about = f"{measured}, {header['created'][:10]}{labels}"
    head = ("cell", "state", "config", "speed-up", "95% interval", "tokens/s", "plain tokens/s")
    return "\n".join([found.headline(), about, *machine_words(found), "", *aligned([head, *map(row_cells, found.table)])])


def machine_words(found: Policy) -> list[str]:
    """How steady the machine was while it was tuned, and what that leaves to be claimed; nothing where nobody knows."""
    said = {row.cell: row.details["sentinel"] for row in found.table if row.details.get("sentinel")}
    lines = []
    if cvs := [sentinel["cv"] for sentinel in said.values() if "cv" in sentinel]:
        least = max(found.rules.min_speedup, *(sentinel["least_speedup"] for sentinel in said.values()))
        lines.append(f"plain decoding of one cell, repeated, varied by {max(cvs):.1%}: nothing below {least:.3f}x is claimed")
    if drifted := [str(cell) for cell, sentinel in said.items() if "drift" in sentinel]:
        lines.append(f"the machine drifted while {', '.join(drifted)} were measured: less than the drift is not claimed there")
    return lines


def row_cells(row: Any) -> tuple[str, ...]:
    """One row of a policy as texts."""
    if not row.is_decided:
        return str(row.cell), row.state, row.reason, "", "", "", ""
    low, high = row.speedup_ci95
    interval = "" if row.config == "off" else f"{low:.2f} to {high:.2f}"
    speed = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
    return str(row.cell), row.state, row.config, f"{row.speedup:.2f}x", interval, speed, f"{row.baseline_tokens_per_s:,.0f}"


def export(lab: Lab, args: Namespace) -> Outcome:
    """The policy in the words of an engine."""
    with asked():
        from ..export import export as write

        found = _policy(lab, args.policy)
        options = dict(_option(text) for text in args.option)
        exported = write(found, args.to, length=args.length, allow_labelled=args.allow_labelled, **options)
    written = _write(exported, args.out) if args.out else []
    data = {
        "target": exported.target, "files": dict(exported.files), "command": exported.command,
        "dropped": list(exported.dropped), "notes": list(exported.notes), "written": [str(path) for path in written],
    }  # fmt: skip
    return Outcome(exported, exported_words(exported, written), data)


def _option(text: str) -> tuple[str, Any]:
    """`draft_model=my/draft`; counts become numbers, `ngram_match=2,4` a pair."""
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise UserMistake(f"an option is written NAME=VALUE, for example draft_model=my/draft, got {text!r}")
    if name in NUMBERS or name == MATCH_OPTION:
        parts = value.split(",")
        if not all(part.strip().isdigit() for part in parts) or len(parts) != (2 if name == MATCH_OPTION else 1):
            needed = "two numbers such as 2,4" if name == MATCH_OPTION else "a number"
            raise UserMistake(f"option {name} needs {needed}, got {value!r}")
        numbers = tuple(int(part) for part in parts)
        return name, numbers if name == MATCH_OPTION else numbers[0]
    return name, value


def _write(exported: Exported, folder: str) -> list[Path]:
    place = writable_folder(folder)
    written = []
    for name, content in exported.files.items():
        (place / name).write_text(content, encoding="utf-8")
        written.append(place / name)
    return written


def exported_words(exported: Exported, written: list[Path] | None = None) -> str:
    """Files (or where they were written), the command, what was lost, and notes."""
    parts = [f"written: {path}" for path in written or ()]
    if not written:
        parts += [f"--- {name} ---\n{content.rstrip()}" for name, content in exported.files.items()]
    if exported.command:
        parts.append(f"start it with:\n{exported.command}")
    parts += [f"{title}:\n" + "\n".join(f"  {line}" for line in lines)
              for title, lines in (("lost", exported.dropped), ("notes", exported.notes)) if lines]
    return "\n\n".join(parts)
