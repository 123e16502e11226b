"""`peers`: transformers' generate on the very weights that our engine runs, in one process, plain decoding on both sides.

A decode is timed as generate of n tokens less generate of one, so that reading the prompt is in neither. Tokens are compared:
in bfloat16 other kernels round otherwise and near-ties flip, so the share of equal first tokens is reported and is no bar.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from ....engine.loop import Engine
from ....engine.models.loading import load
from ....engine.models.random_weights import PREFIX, config_of
from ....records import RANDOM_WEIGHTS, Cell, SpecConfig
from ....stream import record
from ..context import Context, Skipped
from ..ledger import Row
from ..models import random_text

REPEATS = 3
CACHES = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}


def stage(context: Context) -> Iterator[Row]:
    """A row per cell and contestant, then what could not be raced."""
    model = _random_model(context)
    engine = Engine(load(model))
    for cell in context.sizes.peer_cells:
        context.checkpoint(str(cell))
        yield from _cell(context, engine, model, cell)
    why = "found, but its interface is not one that is tested here" if find_spec("gpt_fast") else "not importable as gpt_fast"
    yield Row("refused", "gpt-fast", reason=why)


def _random_model(context: Context) -> Any:
    from transformers import AutoModelForCausalLM, GenerationConfig

    chosen, dtype = context.sizes.models[0], getattr(torch, context.sizes.dtype)
    config = config_of(chosen.loads.removeprefix(PREFIX))
    loader: Any = AutoModelForCausalLM
    with torch.device(context.device):
        model = loader.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model.name_or_path = f"{chosen.name} (random)"
    return model


def _cell(context: Context, engine: Engine, model: Any, cell: Cell) -> Iterator[Row]:
    tokens = context.sizes.peer_tokens
    text = random_text(cell, tokens, engine.pair.target.shape.vocab)
    session = engine.open(text)
    runs = [record(session.steps(SpecConfig.off())) for _ in range(REPEATS + 1)][1:]
    ours = median(sum(step.wall_s for step in run.rounds) / len(run.rounds) for run in runs)
    labels = (RANDOM_WEIGHTS, *runs[0].header.labels)
    reason = f"attention by {engine.backend.name}"
    yield Row("decode", f"ours {cell}", _values(ours, cell, tokens), labels=labels, reason=reason)
    ids = torch.tensor(text.prompts, device=context.device)
    mine = torch.tensor(runs[0].tokens())
    for name, options in CACHES.items():
        context.checkpoint(f"transformers/{name} {cell}")
        seconds, theirs = _decode(context, model, ids, tokens, options)
        equal = float((mine == theirs).long().cumprod(1).sum(1).float().mean())
        yield Row("decode", f"transformers/{name} {cell}", {
            **_values(seconds, cell, tokens), "ours_over_it": seconds / ours, "equal_first_tokens": equal,
        }, labels=labels)  # fmt: skip


def _values(step_s: float, cell: Cell, tokens: int) -> dict[str, float]:
    return {"step_s": step_s, "decode_tokens_per_s": cell.batch / step_s, "tokens": tokens}


def _decode(
    context: Context, model: Any, ids: torch.Tensor, tokens: int, options: dict[str, Any]
) -> tuple[float, torch.Tensor]:
    """Seconds per token after the first, and the new tokens."""

    def generate(count: int) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **options
        )[:, ids.shape[1] :]
        return out

    with torch.inference_mode():
        made = generate(tokens).cpu()
        long_s, one_s = _seconds(context, lambda: generate(tokens)), _seconds(context, lambda: generate(1))
    if long_s <= one_s:
        raise Skipped(f"{tokens} tokens took no longer than one: nothing can be said of so short a decode")
    return (long_s - one_s) / (tokens - 1), made


def _seconds(context: Context, work: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        context.synchronize()
        start = time.perf_counter()
        work()
        context.synchronize()
        found.append(time.perf_counter() - start)
    return median(found)
