"""Models of random weights at real sizes, and sessions at any length without reading a prompt: for times.

Times do not depend on values. Everything made here carries its labels.

Not known here: stages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...costs import ModelShape
from ...engine.loop import RANDOM_KV, Engine, OpenSession
from ...engine.models.fast_llama import FastLlama, expected_tensors
from ...engine.models.loading import ModelPair
from ...records import Cell, Run, SpecConfig, StepRecord
from ...workload import Workload
from .context import Context, release
from .ledger import Row
from .sizes import ModelCells

RANDOM_WEIGHTS = "random-weights"
LABELS = (RANDOM_WEIGHTS, RANDOM_KV)
WARM_UP_ROUNDS = 3
SLACK_TOKENS = 512  # of the cache beyond prompt and new tokens: drafts, and rounding up


def config_of(shape: ModelShape, positions: int) -> Any:
    """transformers' configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=positions, tie_word_embeddings=shape.tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def random_weights(config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Normal numbers of a spread that keeps activations in range; norms are ones."""
    made = {}
    for name, size in expected_tensors(config).items():
        tensor = torch.empty(size, dtype=dtype, device=device)
        made[name] = tensor.fill_(1.0) if len(size) == 1 else tensor.normal_(0.0, size[-1] ** -0.5)
    return made


def random_pair(name: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, positions: int) -> ModelPair:
    """A target of random weights without a draft or a tokenizer."""
    config = config_of(shape, positions)
    target = FastLlama(config, random_weights(config, dtype, device), name=name, device=device, dtype=dtype)
    return ModelPair(name, target, None, None, ())


def random_text(cell: Cell, new_tokens: int, vocab: int, labels: tuple[str, ...] = LABELS) -> Workload:
    """Prompts of random tokens that never end by themselves."""
    draw = random.Random(f"{cell} {vocab}")
    prompts = tuple(tuple(draw.randrange(vocab) for _ in range(cell.length)) for _ in range(cell.batch))
    return Workload("random", prompts, new_tokens, stop_at_eos=False, labels=labels)


def engine_for(context: Context, model: ModelCells) -> Engine:
    """An engine over a model of random weights that takes the longest of its cells."""
    longest = max(cell.length for cell in (*model.cells, *(Cell(1, length) for length in context.sizes.headline)))
    dtype: torch.dtype = getattr(torch, context.sizes.dtype)
    return Engine(random_pair(model.name, model.shape, dtype, context.device, longest + 4 * SLACK_TOKENS))


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


def assumed(engine: Engine, cell: Cell, new_tokens: int) -> OpenSession:
    """A session at the end of prompts that were never read: random KV."""
    release(engine.pair.target.device)
    session = engine.open(random_text(cell, new_tokens, engine.pair.target.shape.vocab))
    session.assume_prompts()
    return session


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
