"""The gates that the shipped weights must pass, each a function from text and models to plain data.

Losses are nats per token. Intervals are 95% over files: two files hold a third of the held-out text, so that the
positions of one file must not count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from ..records import KvView
from . import streams

Buckets = dict[str, tuple[int, int]]
# First and last position (exclusive) of a bucket, by the index of the token that predicts.
LOSS_BUCKETS: Buckets = {
    "0-256": (0, 256), "to 1K": (256, 1024), "to 2K": (1024, 2048), "to 4K": (2048, 4096), "to 6K": (4096, 6144),
    "to 8K": (6144, 8192), "all": (0, 8192),
}  # fmt: skip
BANDS: Buckets = {"1K": (768, 1024), "4K": (3072, 4096), "8K": (6144, 8192)}  # the last quarter of a context
WINDOW = KvView.window(4, 512)
SELF_VIEWS = (KvView.window(4, 64), KvView.window(4, 256), KvView.window(4, 512))
DRAFT_VIEWS = (KvView.window(4, 128), KvView.full())
NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a gate: at most 8193 tokens from its start, so that every position has its true next token."""

    source: str  # "code", "manual" or "revision"
    name: str
    tokens: Tensor  # [T + 1]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens with its interval over files, None where there is one file only."""

    mean: float
    low: float | None
    high: float | None
    tokens: int
    files: int


def estimate(per_file: Sequence[tuple[float, int]]) -> Estimate | None:
    """The mean from (sum, tokens) per file; files are resampled for the interval. None without tokens."""
    kept = np.array([f for f in per_file if f[1]], dtype=float)
    if not len(kept):
        return None
    sums, tokens = kept.T
    low = high = None
    if len(kept) > 1:
        draws = np.random.default_rng(0).integers(len(kept), size=(NUM_RESAMPLES, len(kept)))
        low, high = np.quantile(sums[draws].sum(1) / tokens[draws].sum(1), (0.025, 0.975)).tolist()
    return Estimate(sums.sum() / tokens.sum(), low, high, int(tokens.sum()), len(kept))


def _estimates(per_text: Iterable[tuple[str, Tensor]], buckets: Buckets) -> dict[str, Any]:
    """name of bucket -> estimate as plain data, from (file, value per position) pairs."""
    values = list(per_text)
    found = {}
    for bucket, (first, last) in buckets.items():
        sums: dict[str, tuple[float, int]] = {}
        for file, value in values:
            part, (total, count) = value[first:last], sums.get(file, (0.0, 0))
            sums[file] = (total + part.double().sum().item(), count + len(part))
        if result := estimate(list(sums.values())):
            found[bucket] = asdict(result)
    return found


def token_losses(logits: Tensor, text: Text) -> Tensor:
    """[T] nats of the true next token at every position."""
    return F.cross_entropy(logits, text.tokens[1:], reduction="none")


def _full_losses(model: LlamaForCausalLM, text: Text) -> Tensor:
    return token_losses(streams.full(model, text.tokens[:-1])[0], text)


def loss_by_position(
    models: dict[str, LlamaForCausalLM], texts: list[Text], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """Gate 1: held-out loss of every model, per source and position."""
    characters = sum(len(decode(t.tokens[1:].tolist())) for t in texts)
    found: dict[str, Any] = {"texts": len(texts), "characters": characters}
    for name, model in models.items():
        losses = [(t.source, t.name, _full_losses(model, t)) for t in texts]
        by_source = {
            source: _estimates([(n, v) for s, n, v in losses if source in (s, "all")], LOSS_BUCKETS)
            for source in ("code", "manual", "all")
        }
        nats = sum(value.double().sum().item() for *_, value in losses)
        found[name] = {**by_source, "bits_per_character": nats / math.log(2) / characters}
    return found


def sample_loss(models: dict[str, LlamaForCausalLM], texts: list[Text], max_tokens: int) -> dict[str, Any]:
    """Loss over the shortest texts, `max_tokens` in all: quick to reproduce, so that a test can."""
    chosen: list[Text] = []
    for text in sorted(texts, key=lambda t: (len(t.tokens), t.name)):
        if sum(len(t.tokens) - 1 for t in chosen) + len(text.tokens) - 1 > max_tokens:
            break
        chosen.append(text)
    tokens = sum(len(t.tokens) - 1 for t in chosen)
    if not tokens:
        raise ValueError(f"no text is as short as {max_tokens} tokens: nothing to reproduce the loss on")
    losses = {n: sum(_full_losses(m, t).double().sum().item() for t in chosen) / tokens for n, m in models.items()}
    return {"texts": [t.name for t in chosen], "tokens": tokens, "loss": losses}


def context_value(target: LlamaForCausalLM, texts: list[Text], bands: Buckets) -> dict[str, Any]:
    """Gate 2: loss with the full context, of the same weights seeing a window, and the paired difference.

    The window masks every layer, so that information may still travel one window further per layer.
    """
    full, seen, gain = [], [], []
    for text in texts:
        complete = _full_losses(target, text)
        partial = token_losses(streams.windowed(target, text.tokens[:-1], WINDOW), text)
        full.append((text.name, complete))
        seen.append((text.name, partial))
        gain.append((text.name, complete - partial))
    return {
        "full": _estimates(full, bands), str(WINDOW): _estimates(seen, bands), "difference": _estimates(gain, bands)
    }  # fmt: skip


def is_context_worth_reading(difference: dict[str, Any]) -> bool:
    """Whether gate 2 passes: the full context is not worse than the window, at 4K and at 8K."""
    return all(band in difference and difference[band]["mean"] <= 0 for band in ("4K", "8K"))


def agreement(target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """First-position acceptance at every position, from logits [T, V]: greedy (0 or 1), and 1 - TV at temperature 1."""
    same = (target.argmax(1) == draft.argmax(1)).float()
    overlap = torch.minimum(target.softmax(1), draft.softmax(1)).sum(1)
    return same, overlap


def acceptance(
    target: LlamaForCausalLM, draft: LlamaForCausalLM | None, texts: list[Text], bands: Buckets
) -> dict[str, Any]:
    """Gate 3: first-position acceptance of self-drafts through windows, and of the draft model, over real text."""
    greedy: dict[str, list[tuple[str, Tensor]]] = {}
    sampled: dict[str, list[tuple[str, Tensor]]] = {}
    for text in texts:
        tokens = text.tokens[:-1]
        wanted, cache = streams.full(target, tokens)
        proposals = {f"self:{view}": streams.windowed(target, tokens, view, cache) for view in SELF_VIEWS}
        if draft is not None:
            proposals |= {f"model:{view}": streams.windowed(draft, tokens, view) for view in DRAFT_VIEWS}
        for drafter, logits in proposals.items():
            same, overlap = agreement(wanted, logits)
            greedy.setdefault(drafter, []).append((text.name, same))
            sampled.setdefault(drafter, []).append((text.name, overlap))
    return {
        drafter: {"T=0": _estimates(greedy[drafter], bands), "T=1": _estimates(sampled[drafter], bands)}
        for drafter in greedy
    }


def repeated_share(tokens: Sequence[int], length: int = 8) -> float:
    """Share of the n-grams of a text that occurred in it before."""
    grams = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def continuations(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int = 0
) -> list[list[int]]:
    """Continue prompts of one length; the end of text does not stop a row. temperature 0 is greedy, else 1 is meant."""
    torch.manual_seed(seed)
    inputs = torch.tensor([list(p) for p in prompts])
    model.generation_config.eos_token_id = None
    options = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    with torch.inference_mode():
        out = model.generate(  # type: ignore[misc]  # transformers annotates self with a protocol
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num_tokens, pad_token_id=0, **options
        )
    rows: list[list[int]] = out[:, inputs.shape[1] :].tolist()
    return rows
