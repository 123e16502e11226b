"""vLLM 0.33: `--speculative-config` with a table batch -> draft length.

    {"method": "draft_model", "model": "my/draft", "num_speculative_tokens": 5,
     "num_speculative_tokens_per_batch_size": [[1, 16, 5], [17, 64, 3], [65, 1024, 0]]}

The batch is the number of requests scheduled in the step, prefills included. Gaps and the tail of the table carry the
draft length before them. vLLM drafts with the full context and verifies chains. This module does not know which model
runner or parallelism the server will use.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from .column import NGRAM_MATCH, PLAIN, Exported, ExportError, Slice, chains_of, other_drafter

METHODS = ("draft_model", "ngram", "eagle", "eagle3", "mtp", "dflash")  # the others may ignore the table
TABLE = "num_speculative_tokens_per_batch_size"
KEYS = ("method", "model", "num_speculative_tokens", TABLE, "prompt_lookup_min", "prompt_lookup_max")


def export(
    piece: Slice,
    *,
    draft_model: str | None = None,
    target_model: str = "TARGET_MODEL",
    drafter: str | None = None,
    method: str = "draft_model",
    ngram_match: tuple[int, int] = NGRAM_MATCH,
    max_num_seqs: int = 1024,
) -> Exported:
    """The `--speculative-config` of one slice; `method` says what kind of draft `draft_model` is to vLLM."""
    loaded = piece.drafter(draft_model, drafter)
    column = piece.choose(chains_of(loaded, "vLLM"))
    lost = (*column.lost, *column.lost_views("vLLM"))
    serve = ["vllm", "serve", target_model]
    if not column.max_depth:
        return Exported("vllm", {}, shlex.join(serve), lost, PLAIN)
    if loaded == "ngram":
        head = {"method": "ngram", "prompt_lookup_min": ngram_match[0], "prompt_lookup_max": ngram_match[1]}
        lost += ("ngram: vLLM picks among matches in its own way, so acceptance may differ",)
    else:
        head = {"method": method, "model": draft_model}
        lost += other_drafter("draft_model", method)
    table = [[first, max(first, max_num_seqs) if last is None else last, k] for first, last, k in column.ranges()]
    config = {**head, "num_speculative_tokens": column.max_depth, TABLE: table}
    validate(config)
    text = json.dumps(config)
    command = shlex.join([*serve, "--speculative-config", text])
    note = "vLLM ignores the table under data parallelism, with one log line: run one engine per replica"
    return Exported("vllm", {f"speculative-config.{column.name}.json": text + "\n"}, command, lost, (note,))


def validate(config: Mapping[str, Any]) -> None:
    """Raise ExportError where vLLM would reject the configuration, clamp it or ignore a part of it."""
    if unknown := sorted(set(config) - set(KEYS)):
        raise ExportError(f"vLLM rejects or ignores the keys {unknown}. Keep to {', '.join(KEYS)}")
    method, most = config.get("method"), config.get("num_speculative_tokens")
    if method not in METHODS:
        raise ExportError(f"method {method!r} may ignore a batch table. Pass one of: {', '.join(METHODS)}")
    if type(most) is not int or most < 1:
        raise ExportError(f"num_speculative_tokens must be a whole number above 0, got {most!r}. Write the longest draft")
    if method == "ngram":
        low, high = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
        if type(low) is not int or type(high) is not int or not 1 <= low <= high:
            raise ExportError(f"ngram match lengths must be 1 <= min <= max, got {low!r}, {high!r}. Pass ngram_match=(2, 4)")
    elif method != "mtp" and not config.get("model"):
        raise ExportError(f"method {method} needs a draft model. Pass draft_model=<name or path>")
    _validate_table(config.get(TABLE), most)


def _validate_table(table: Any, most: int) -> None:
    if not isinstance(table, list) or not table:
        raise ExportError(f"{TABLE} must be a list of [first, last, draft length], got {table!r}; vLLM rejects dicts")
    end = 0
    for entry in table:
        if not isinstance(entry, list) or len(entry) != 3 or any(type(number) is not int for number in entry):
            raise ExportError(f"table entry {entry!r} must be 3 whole numbers: first batch, last batch, draft length")
        first, last, k = entry
        if end == 0 and first != 1:
            raise ExportError(f"the first range starts at batch {first}, vLLM wants 1. Begin the table with batch 1")
        if not end < first <= last:
            raise ExportError(f"range {entry} must start after batch {end} and end no earlier. Sort and split the ranges")
        if not 0 <= k <= most:
            raise ExportError(f"range {entry} drafts {k}: vLLM silently clamps to num_speculative_tokens={most}. Raise that")
        end = last
    if max(k for _, _, k in table) < most:
        raise ExportError(f"no range drafts num_speculative_tokens={most}, whose buffers are wasted. Lower it")
