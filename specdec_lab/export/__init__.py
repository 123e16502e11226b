"""A policy in the words of an engine: its own configuration, and the list of what could not be said in it.

    out = export(policy, "vllm", length=4096, draft_model="my/draft")
    out.files, out.command, out.dropped

One module per engine, each with the engine's own rules as a validator. Nothing here runs an engine, or knows which
version of it the user has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..policy import Policy
from ..records import not_measured
from . import hf, llama_cpp, sglang, tensorrt_llm, vllm
from .column import Exported, ExportError, slices

__all__ = ["TARGETS", "ExportError", "Exported", "export"]

TARGETS: Mapping[str, Callable[..., Exported]] = {
    "vllm": vllm.export,
    "sglang": sglang.export,
    "tensorrt_llm": tensorrt_llm.export,
    "transformers": hf.export,
    "llama_cpp": llama_cpp.export,
}


def export(
    policy: Policy,
    to: str,
    *,
    length: int | str | None = None,
    traffic: Mapping[str, float] | None = None,
    allow_labelled: bool = False,
    **options: Any,
) -> Exported:
    """The policy as a configuration of the engine `to`, one of TARGETS.

    length          median context of the deployment, the nearest tabled length is exported; "each": one table per length
    traffic         instead: context tokens -> weight; picks by expected log speed-up over this mix
    allow_labelled  export although the policy is labelled forced, random or modelled
    options         of the engine: the keyword arguments of its export function
    """
    if to not in TARGETS:
        raise ExportError(f"no exporter for {to!r}. Pass one of: {', '.join(TARGETS)}")
    known = [name for name in inspect.signature(TARGETS[to]).parameters if name != "piece"]
    if unknown := sorted(set(options) - set(known)):
        raise ExportError(f"{to} takes no option {', '.join(unknown)}. Its options: {', '.join(known)}")
    _refuse_labels(policy, allow_labelled)
    parts = {piece.name: TARGETS[to](piece, **options) for piece in slices(policy, length, traffic)}
    return _joined(to, parts, _origin(policy))


def _refuse_labels(policy: Policy, allow_labelled: bool) -> None:
    labels = not_measured(policy.header["labels"])
    if labels and not allow_labelled:
        raise ExportError(
            f"the policy is labelled {', '.join(labels)}: its numbers are not those of a trained model on real text, and "
            "a server would run on them. Tune without, or pass allow_labelled=True for a test"
        )


def _origin(policy: Policy) -> tuple[str, ...]:
    """Where the numbers come from: a number never travels without its header."""
    header = policy.header
    made = f"policy of {header['created'][:10]}, workload {header['workload']}, {header['device']}, {header['dtype']}"
    labels = (f"labels of the policy: {', '.join(header['labels'])}",) if header["labels"] else ()
    composed = sum(row.state == "composed" for row in policy.table)
    share = f"{composed} of {len(policy.table)} rows are composed from measured parts, not measured end to end"
    return (made, *labels, *((share,) if composed else ()))


def _joined(to: str, parts: Mapping[str, Exported], origin: tuple[str, ...]) -> Exported:
    """One export of several: all files, the commands under one another, every loss once."""
    files = {name: content for part in parts.values() for name, content in part.files.items()}
    heads = {name: f"# {name}\n" if len(parts) > 1 else "" for name in parts}
    commands = [heads[name] + part.command for name, part in parts.items() if part.command]
    dropped = dict.fromkeys(loss for part in parts.values() for loss in part.dropped)
    notes = dict.fromkeys([*origin, *(note for part in parts.values() for note in part.notes)])
    return Exported(to, files, "\n".join(commands) or None, tuple(dropped), tuple(notes))
