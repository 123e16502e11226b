"""transformers 5.17 to 5.23: assisted generation, for one sequence.

    {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}

These belong to the **assistant's** generation_config; on the target's they are ignored. Left to the defaults (20 tokens,
threshold 0.4, which stops a draft early) the drafts would not be the policy's. Prompt lookup is set on the target. A
batch above 1 raises ValueError in transformers, so only the batch-1 column is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .column import NGRAM_MATCH, Exported, ExportError, Slice, chains_of

TOKENS, SCHEDULE, THRESHOLD = "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"
LOOKUP, MATCH = "prompt_lookup_num_tokens", "max_matching_ngram_size"
LOAD = "AutoModelForCausalLM.from_pretrained"


def export(
    piece: Slice,
    *,
    draft_model: str | None = None,
    target_model: str = "TARGET_MODEL",
    drafter: str | None = None,
    ngram_match: tuple[int, int] = NGRAM_MATCH,
) -> Exported:
    """The generation config that carries the policy's draft length at batch 1, and the calls that use it."""
    loaded = piece.drafter(draft_model, drafter)
    column = piece.choose(chains_of(loaded, "transformers")).single(1, "transformers")
    depth, lost = column.max_depth, (*column.lost, *column.lost_views("transformers"))
    lines = ["from transformers import AutoModelForCausalLM", f"model = {LOAD}({target_model!r})"]
    config: dict[str, Any]
    if not depth:
        lines.append("model.generate(**inputs)")
        return Exported("transformers", {}, "\n".join(lines), lost, ("nothing speculates at batch 1: plain generate",))
    if loaded == "ngram":
        owner, config = "target", {LOOKUP: depth, MATCH: ngram_match[1]}
        lost += (f"ngram: transformers tries matches down to 1 token, the policy's stop at {ngram_match[0]}",)
        lines.append(f"model.generate(**inputs, {_arguments(config)})")
    else:
        owner, config = "assistant", {TOKENS: depth, SCHEDULE: "constant", THRESHOLD: 0.0}
        lines += [
            f"assistant = {LOAD}({draft_model!r})",
            f"assistant.generation_config.update({_arguments(config)})",
            "model.generate(**inputs, assistant_model=assistant)",
        ]
    validate(config)
    files = {f"{owner}-generation-config.{column.name}.json": json.dumps(config, indent=2) + "\n"}
    note = f"the file belongs to the {owner}'s generation_config"
    return Exported("transformers", files, "\n".join(lines), lost, (note,))


def _arguments(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in config.items())


def validate(config: Mapping[str, Any]) -> None:
    """Raise ExportError unless this is a whole assistant or prompt-lookup setting with a constant draft length."""
    wanted = (TOKENS, SCHEDULE, THRESHOLD) if TOKENS in config else (LOOKUP, MATCH)
    if set(config) != set(wanted):
        raise ExportError(
            f"generation config holds {sorted(config)}, wanted {sorted(wanted)}: transformers fills in its own defaults "
            "(20 tokens, threshold 0.4, match 2) and ignores what belongs to the other model"
        )
    for key in (TOKENS, LOOKUP, MATCH):
        if key in config and (type(config[key]) is not int or config[key] < 1):
            raise ExportError(f"{key} must be a whole number above 0, got {config[key]!r}")
    if config.get(SCHEDULE, "constant") != "constant":
        raise ExportError(f"{SCHEDULE} {config[SCHEDULE]!r} changes the draft length. Write 'constant'")
    if config.get(THRESHOLD, 0) != 0:
        raise ExportError(f"{THRESHOLD} {config[THRESHOLD]!r} stops drafts early. Write 0.0")
