"""TensorRT-LLM 1.1 and later: `speculative_config` of the YAML that trtllm-serve reads.

    speculative_config:
      decoding_type: Draft_Target
      max_draft_len: 4
      speculative_model: "my/draft"
      draft_len_schedule: {4: 4, 8: 2, 32: 1}

The keys of the schedule changed their meaning and nothing in the file says which is meant, so the version must be given.
1.1 and 1.2: lower bounds, key 1 is mandatory. From pull request 10860 (1.3) on: upper bounds, plain decoding above the
largest. In both, the smallest key maps to max_draft_len, the longest draft of all. Read in documentation and source of
1.2 and 1.3; no TensorRT-LLM ran here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from .column import NGRAM_MATCH, PLAIN, Column, Exported, ExportError, Slice, chains_of, other_drafter

METHODS = ("Draft_Target", "Eagle3")
NGRAM = {"is_use_oldest": False, "is_public_pool": False}  # latest match, in the row's own text, as measured
KEYS = ("decoding_type", "max_draft_len", "speculative_model", "draft_len_schedule", "max_matching_ngram_size", *NGRAM)


def export(
    piece: Slice,
    *,
    version: str = "",
    draft_model: str | None = None,
    target_model: str = "TARGET_MODEL",
    drafter: str | None = None,
    method: str = "Draft_Target",
    ngram_match: tuple[int, int] = NGRAM_MATCH,
    max_batch_size: int = 2048,
) -> Exported:
    """The YAML of one slice for TensorRT-LLM `version`, which decides what the schedule's keys mean."""
    upper = keys_are_upper_bounds(version)
    loaded = piece.drafter(draft_model, drafter)
    column = piece.choose(chains_of(loaded, "TensorRT-LLM"))
    lost = (*column.lost, *column.lost_views("TensorRT-LLM"))
    serve = ["trtllm-serve", target_model]
    if not column.max_depth:
        return Exported("tensorrt_llm", {}, shlex.join(serve), lost, PLAIN)
    config: dict[str, Any] = {"decoding_type": "NGram" if loaded == "ngram" else method, "max_draft_len": column.max_depth}
    if loaded == "ngram":
        config |= {"max_matching_ngram_size": ngram_match[1], **NGRAM}
        lost += (f"ngram: TensorRT-LLM has no shortest match, the policy's is {ngram_match[0]} tokens",)
    else:
        config |= {"speculative_model": draft_model}
        lost += other_drafter("Draft_Target", method)
    config["draft_len_schedule"] = schedule(column, upper, max_batch_size)
    validate(config, version)
    name = f"trtllm.{column.name}.yaml"
    command = shlex.join([*serve, "--extra_llm_api_options", name])
    return Exported("tensorrt_llm", {name: _yaml(config)}, command, lost, _notes(config, version, upper))


def keys_are_upper_bounds(version: str) -> bool:
    """Whether the keys of draft_len_schedule are upper bounds in this version; ExportError when that cannot be told."""
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+)?(.*)", version.strip())
    if match is None:
        raise ExportError(
            f"TensorRT-LLM version {version!r}: the keys of draft_len_schedule were lower bounds in 1.1 and 1.2 and are "
            "upper bounds since 1.3, and the file does not say which. Pass version='1.2' or version='1.3'"
        )
    release = int(match[1]), int(match[2])
    if release < (1, 1):
        raise ExportError(f"TensorRT-LLM {version} has no draft_len_schedule. Use 1.1 or later")
    if release == (1, 3) and match[3]:
        raise ExportError(
            f"TensorRT-LLM {version}: the keys changed their meaning between pre-releases of 1.3 (pull request 10860). "
            "Pass version='1.3' if yours has it, version='1.2' if not"
        )
    return release >= (1, 3)


def schedule(column: Column, upper: bool, max_batch_size: int) -> dict[int, int]:
    """Batch -> draft length, keyed by the last (upper) or the first batch of every range."""
    if not upper:
        return {first: k for first, _, k in column.ranges()}
    keyed = [(max(first, max_batch_size) if last is None else last, k) for first, last, k in column.ranges()]
    return dict(keyed if keyed[-1][1] else keyed[:-1])  # above the largest key nothing is drafted


def _yaml(config: Mapping[str, Any]) -> str:
    return "\n".join(["speculative_config:", *(f"  {key}: {_scalar(value)}" for key, value in config.items()), ""])


def _scalar(value: Any) -> str:
    if isinstance(value, dict):  # JSON would turn the keys into strings
        return "{" + ", ".join(f"{key}: {k}" for key, k in value.items()) + "}"
    return json.dumps(value)


def _notes(config: Mapping[str, Any], version: str, upper: bool) -> tuple[str, ...]:
    bounds = f"the schedule's keys are {'upper' if upper else 'lower'} bounds, as TensorRT-LLM {version} reads them"
    zero = "pull request 16888, if your build has it, drafts 1 token where this schedule drafts none"
    overlap = "TensorRT-LLM's examples of this decoding type set disable_overlap_scheduler: true"
    return (bounds, *((zero,) if upper else ()), *((overlap,) if config["decoding_type"] != "Eagle3" else ()))


def validate(config: Mapping[str, Any], version: str) -> None:
    """Raise ExportError where TensorRT-LLM `version` would reject the configuration or read it differently."""
    upper = keys_are_upper_bounds(version)
    if unknown := sorted(set(config) - set(KEYS)):
        raise ExportError(f"keys {unknown} are unknown or exclude a schedule. Keep to {', '.join(KEYS)}")
    kind, most = config.get("decoding_type"), config.get("max_draft_len")
    if kind not in (*METHODS, "NGram") or (kind == "Eagle3" and not upper):
        raise ExportError(f"{kind!r} reads no schedule in TensorRT-LLM {version}. Pass method='Draft_Target'")
    if (kind == "NGram") == bool(config.get("speculative_model")):
        raise ExportError(f"{kind} with draft model {config.get('speculative_model')!r}: NGram takes none, the others need one")
    if type(most) is not int or most < 1:
        raise ExportError(f"max_draft_len must be a whole number above 0, got {most!r}")
    _validate_schedule(config.get("draft_len_schedule"), most, None if upper else 1)


def _validate_schedule(table: Any, most: int, first: int | None) -> None:
    if not isinstance(table, dict) or not table:
        raise ExportError(f"draft_len_schedule must map batches to draft lengths, got {table!r}")
    whole = all(type(number) is int for pair in table.items() for number in pair)
    if not whole or min(table) < 1 or min(table.values()) < 0:
        raise ExportError(f"draft_len_schedule must map batches from 1 to draft lengths from 0, got {table}")
    if first is not None and min(table) != first:
        raise ExportError(f"draft_len_schedule {table} needs the key {first} where keys are lower bounds")
    if table[min(table)] != most or max(table.values()) > most:
        raise ExportError(
            f"draft_len_schedule {table} does not draft most ({most}) at its smallest batch, as TensorRT-LLM demands. "
            "Export another length, or another engine"
        )
