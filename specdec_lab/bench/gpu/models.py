"""Models of random weights at real sizes, and sessions at any length without reading a prompt: for times.

Times do not depend on values. Every header of what is made here is labelled.

Not known here: stages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...engine.cache import CacheTooLarge
from ...engine.loop import Engine, OpenSession
from ...engine.models.loading import load
from ...records import RANDOM_CONTEXT, RANDOM_WEIGHTS, Cell, Run, SpecConfig, StepRecord
from ...workload import Workload, random_context
from .context import Context, release
from .ledger import Row
from .sizes import ModelCells

LABELS = (RANDOM_WEIGHTS, RANDOM_CONTEXT)
WARM_UP_ROUNDS = 3
SLACK_TOKENS = 512  # of the cache beyond prompt and new tokens: drafts, and rounding up


def random_text(cell: Cell, new_tokens: int, vocab: int) -> Workload:
    """Prompts of random tokens, to be read, that never end by themselves."""
    draw = random.Random(f"{cell} {vocab}")
    prompts = tuple(tuple(draw.choices(range(vocab), k=cell.length)) for _ in range(cell.batch))
    return Workload("random", prompts, new_tokens, stop_at_eos=False)


def engine_for(context: Context, model: ModelCells, forced: float | None = None) -> Engine:
    """An engine over a model of random weights; `forced`: the chance with which a draft is accepted."""
    release(context.device)
    dtype: torch.dtype = getattr(torch, context.sizes.dtype)
    return Engine(load(model.loads, device=context.device.type, dtype=dtype), forced=forced)


def fitting(context: Context, engine: Engine, cell: Cell, new_tokens: int) -> tuple[Cell | None, Row | None]:
    """The cell, or the largest batch of its length whose KV fits (None: not even one) and a row that says what was wanted."""
    target = engine.pair.target
    per_row = (cell.length + new_tokens + SLACK_TOKENS) * target.shape.kv_bytes_per_token(target.kv_dtype.itemsize)
    free = context.free_bytes
    if cell.batch * per_row <= free:
        return cell, None
    most = int(free // per_row)
    values = {"needed_bytes": cell.batch * per_row, "free_bytes": int(free), "largest_batch": most}
    row = Row("left out", f"{target.name} {cell}", values, reason="its KV does not fit beside the weights")
    return (Cell(most, cell.length) if most else None), row


def opened(engine: Engine, cell: Cell, new_tokens: int) -> OpenSession | Row:
    """As `assumed`; a row with the reason where the engine finds that it needs more than is free."""
    try:
        return assumed(engine, cell, new_tokens)
    except CacheTooLarge as error:
        return Row("left out", f"{engine.pair.target.name} {cell}", reason=str(error))


def assumed(engine: Engine, cell: Cell, new_tokens: int) -> OpenSession:
    """A session at the end of prompts that were never read."""
    release(engine.pair.target.device)
    return engine.open(random_context(cell, engine.pair.target.shape.vocab, max_new_tokens=new_tokens))


def rounds_of(session: OpenSession, config: SpecConfig, count: int, *, block: int | None = None) -> Run:
    """`count` rounds after the warm-up, as a run of its own."""
    kept: list[StepRecord] = []
    with session.steps(config, block=block) as stream:
        for step in _rounds(stream):
            kept.append(step)
            if len(kept) == WARM_UP_ROUNDS + count:
                break
    if len(kept) <= WARM_UP_ROUNDS:
        raise ValueError(f"{config}: only {len(kept)} rounds ran, more than {WARM_UP_ROUNDS} are needed")
    return Run(stream.header, tuple(kept[WARM_UP_ROUNDS:]), interrupted=False)


def tokens_in(session: OpenSession, config: SpecConfig, seconds: float, now: Callable[[], float]) -> int:
    """Tokens that the session emits in so many seconds, beginning again from its prompts as often as it takes."""
    end, tokens = now() + seconds, 0
    while True:
        with session.steps(config) as stream:
            for step in _rounds(stream):
                tokens += step.num_emitted
                if now() >= end:
                    return tokens


def _rounds(stream: Any) -> Iterator[StepRecord]:
    return (step for step in stream if step.kind == "round")


def tokens_for(config: SpecConfig, rounds: int) -> int:
    """New tokens that so many rounds can emit, and the warm-up before them."""
    return (rounds + WARM_UP_ROUNDS) * (config.depth + 1)
