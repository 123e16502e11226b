"""SGLang 0.5.23: launch flags, and for EAGLE drafts a table of draft lengths by batch.

    --speculative-algorithm EAGLE --speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6
    --speculative-draft-window-size 508 --speculative-draft-sink-size 4
    --speculative-adaptive --speculative-adaptive-config f.json
    {"1": {"candidate_steps": [5]}, "9": {"candidate_steps": [0]}}

A chain of K drafts is steps K, topk 1, tokens K+1 (the root counts). Keys of the table are lower bounds, and the batch
is padded to a captured graph size first; a list of one step pins the draft length. STANDALONE and NGRAM take one setting
for every batch. This module does not know the draft's attention back end, which decides whether a window is honoured.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from ..records import KvView, SpecConfig
from .column import PLAIN, Column, Exported, ExportError, Slice, WhyNot, chains_of, other_drafter

ADAPTIVE = ("EAGLE", "EAGLE3")  # for any other, SGLang turns adaptive mode off with a warning
ALGORITHMS = (*ADAPTIVE, "STANDALONE", "NGRAM")
KNOBS = ("ema_alpha", "update_interval", "warmup_batches", "up_hysteresis", "down_hysteresis", "ceiling_coeff")
ALGORITHM, DRAFT = "--speculative-algorithm", "--speculative-draft-model-path"
STEPS, TOPK, TOKENS = "--speculative-num-steps", "--speculative-eagle-topk", "--speculative-num-draft-tokens"
WINDOW, SINK = "--speculative-draft-window-size", "--speculative-draft-sink-size"
SWITCH, TABLE_PATH = "--speculative-adaptive", "--speculative-adaptive-config"
BREADTH = "--speculative-ngram-max-bfs-breadth"
Flags = Mapping[str, str | int | None]  # None: a switch without a value


def export(
    piece: Slice,
    *,
    draft_model: str | None = None,
    target_model: str = "TARGET_MODEL",
    drafter: str | None = None,
    algorithm: str = "STANDALONE",
    batch: int | None = None,
) -> Exported:
    """The flags of one slice: the policy's setting at `batch`, or (EAGLE, EAGLE3) a table over all batches."""
    loaded = piece.drafter(draft_model, drafter)
    algorithm = "NGRAM" if loaded == "ngram" else algorithm
    if batch is None and algorithm not in ADAPTIVE:
        raise ExportError(
            f"SGLang changes the draft length with the batch for {' and '.join(ADAPTIVE)} only, {algorithm} takes one "
            "setting. Pass batch=<usual running batch> to export the policy's setting there"
        )
    column = piece.choose(_why_not(loaded, trees=batch is not None and loaded == "model"))
    if batch is not None:
        column = column.single(batch, "SGLang")
    serve = ["python", "-m", "sglang.launch_server", "--model-path", target_model]
    if not column.max_depth:
        return Exported("sglang", {}, shlex.join(serve), column.lost, PLAIN)
    path = f"adaptive.{column.name}.json"
    table = {str(first): {"candidate_steps": [k]} for first, _, k in column.ranges()} if batch is None else None
    shape = _adaptive(column, path) if batch is None else _setting(column.choices[batch], algorithm)
    window, lost_views = _window(column.choices.values(), algorithm)
    flags = {ALGORITHM: algorithm, **({DRAFT: draft_model} if loaded == "model" else {}), **shape, **window}
    validate(flags, table)
    lost = (*column.lost, *lost_views, *_lost_shape(column.choices.values(), algorithm))
    argv = [str(part) for flag, value in flags.items() for part in (flag, value) if part is not None]
    files = {} if table is None else {path: json.dumps(table) + "\n"}
    return Exported("sglang", files, shlex.join([*serve, *argv]), lost, _notes(flags))


def _why_not(loaded: str, *, trees: bool) -> WhyNot:
    common = chains_of(loaded, "SGLang", trees=trees)

    def why_not(config: SpecConfig) -> str | None:
        limit = config.depth * _topk(config)
        return common(config) or (
            None if config.num_nodes <= limit else f"SGLang's tree of this depth and width holds {limit} nodes"
        )

    return why_not


def _topk(config: SpecConfig) -> int:
    """The most children of one node, the root included."""
    parents = config.tree.parents if config.tree else ()
    return max((parents.count(node) for node in set(parents)), default=0)


def _adaptive(column: Column, path: str) -> Flags:
    return {STEPS: column.max_depth, TOPK: 1, TOKENS: column.max_depth + 1, SWITCH: None, TABLE_PATH: path}


def _setting(config: SpecConfig, algorithm: str) -> Flags:
    if algorithm == "NGRAM":
        return {TOKENS: config.depth + 1, BREADTH: 1}
    return {STEPS: config.depth, TOPK: _topk(config), TOKENS: config.num_nodes + 1}


def _window(configs: Collection[SpecConfig], algorithm: str) -> tuple[Flags, tuple[str, ...]]:
    """The flags of the widest view, since one is set at launch, and what of the views is lost."""
    views: set[KvView] = {config.view for config in configs if config.view is not None}
    names = ", ".join(sorted(map(str, views)))
    if not views or views == {KvView.full()}:
        return {}, ()
    if algorithm not in ADAPTIVE or any(view.kind == "snapkv" for view in views):
        return {}, (f"window {names}: SGLang drafts with the full context here, the speed-up was measured through the window",)
    widest = max(views, key=lambda view: view.max_tokens or float("inf"))
    lost = (f"window: one view is set at launch, {widest}, the widest of {names}",) if len(views) > 1 else ()
    if widest.kind == "full":
        return {}, lost
    if widest.sink and algorithm == "EAGLE3":
        return {WINDOW: widest.recent}, (*lost, f"sink {widest.sink}: SGLang's EAGLE3 window would drop it silently")
    return {WINDOW: widest.recent, **({SINK: widest.sink} if widest.sink else {})}, lost


def _lost_shape(configs: Collection[SpecConfig], algorithm: str) -> tuple[str, ...]:
    if algorithm == "NGRAM":
        return ("ngram: SGLang drafts from a trie that all requests share, so acceptance may differ",)
    trees = [str(c.tree) for c in configs if c.tree is not None and not c.tree.is_chain]
    shape = tuple(f"tree {tree}: SGLang grows a tree of this depth, width and size anew in each round" for tree in trees)
    return (*shape, *other_drafter("STANDALONE", algorithm))


def _notes(flags: Flags) -> tuple[str, ...]:
    window = "only the Triton and FlashInfer draft back ends read the window, and not for a draft with its own"
    padded = "batches are padded to a captured graph size before the table is read: capture those at which it changes"
    return (*((window,) if WINDOW in flags else ()), *((padded,) if SWITCH in flags else ()))


def validate(flags: Flags, table: Mapping[str, Any] | None = None) -> None:
    """Raise ExportError where SGLang would reject the flags or the adaptive table, or ignore a part of them."""
    algorithm, tokens = flags.get(ALGORITHM), flags.get(TOKENS)
    if algorithm not in ALGORITHMS:
        raise ExportError(f"algorithm {algorithm!r} cannot be exported. Pass one of: {', '.join(ALGORITHMS)}")
    if (algorithm == "NGRAM") == bool(flags.get(DRAFT)):
        raise ExportError(f"{algorithm} with draft model {flags.get(DRAFT)!r}: NGRAM takes none, the others need one")
    if type(tokens) is not int or tokens < 2:
        raise ExportError(f"{TOKENS} must be at least 2, the root and one draft, got {tokens!r}")
    if algorithm != "NGRAM":
        _validate_shape(flags.get(STEPS), flags.get(TOPK), tokens)
    elif flags.get(BREADTH) != 1:
        raise ExportError(f"{BREADTH} must be 1, got {flags.get(BREADTH)!r}: above it SGLang drafts a tree, not a chain")
    _validate_window(algorithm, flags.get(WINDOW), flags.get(SINK))
    if len({table is not None, SWITCH in flags, TABLE_PATH in flags}) > 1:
        raise ExportError(f"an adaptive table goes with {SWITCH} and {TABLE_PATH}, else SGLang runs its own or none")
    if table is not None:
        _validate_adaptive(flags, table)


def _validate_shape(steps: Any, topk: Any, tokens: int) -> None:
    if type(steps) is not int or type(topk) is not int or steps < 1 or topk < 1:
        raise ExportError(f"{STEPS} and {TOPK} must be at least 1, got {steps!r} and {topk!r}: SGLang wants all three")
    if topk == 1 and tokens != steps + 1:
        raise ExportError(f"{TOKENS}={tokens} with topk 1 and {steps} steps: SGLang would change it. Write {steps + 1}")
    if tokens > steps * topk + 1:
        raise ExportError(f"{TOKENS}={tokens} is above steps * topk + 1 = {steps * topk + 1}. Choose a smaller tree")


def _validate_window(algorithm: Any, window: Any, sink: Any) -> None:
    if window is None and sink is not None:
        raise ExportError(f"{SINK} without {WINDOW} is an error in SGLang. Pass both, or neither")
    if window is not None and algorithm not in ADAPTIVE:
        raise ExportError(f"{algorithm} ignores {WINDOW} with a warning. Leave it out, or use {' or '.join(ADAPTIVE)}")
    if window is not None and (type(window) is not int or window < 1):
        raise ExportError(f"{WINDOW} must be above 0, got {window!r}")
    if sink is not None and (type(sink) is not int or sink < 0):
        raise ExportError(f"{SINK} must not be negative, got {sink!r}")
    if sink and algorithm == "EAGLE3":
        raise ExportError(f"EAGLE3 drops {SINK}={sink} silently. Leave it out, or use EAGLE")


def _validate_adaptive(flags: Flags, table: Mapping[str, Any]) -> None:
    if flags[ALGORITHM] not in ADAPTIVE or flags[TOPK] != 1:
        raise ExportError(f"adaptive mode needs {' or '.join(ADAPTIVE)} and topk 1, else SGLang turns it off")
    slots = {key: entry for key, entry in table.items() if key.isdigit()}
    if unknown := sorted(set(table) - set(slots) - set(KNOBS)):
        raise ExportError(f"SGLang ignores the table's keys {unknown}. Keep to batches ('1', '9') and {', '.join(KNOBS)}")
    if "1" not in slots:
        raise ExportError(f"the table {sorted(slots)} has no row '1', so smaller batches take the first row. Write one")
    for key, entry in slots.items():
        steps = entry.get("candidate_steps") if isinstance(entry, dict) else None
        if not isinstance(steps, list) or not steps or any(type(step) is not int or step < 0 for step in steps):
            raise ExportError(f"batch {key}: candidate_steps must be a list of draft lengths from 0, got {steps!r}")
        if unknown := sorted(set(entry) - {"candidate_steps", *KNOBS}):
            raise ExportError(f"batch {key}: SGLang ignores {unknown}. Keep to candidate_steps, {', '.join(KNOBS)}")
    union = {step for entry in slots.values() for step in entry["candidate_steps"]}
    if flags[STEPS] not in union:
        raise ExportError(f"{STEPS}={flags[STEPS]} is not among the table's steps {sorted(union)}. Write their maximum")
