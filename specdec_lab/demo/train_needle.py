"""Train the needle model, a tiny Llama that copies from far away: `python -m specdec_lab.demo.train_needle --out FOLDER`.

Texts are filler with needles (workload/needle_text.py), each of which comes again later; the loss counts the tokens that can
be known: copied ones fully, filler a little. Texts grow with the tokens spent, never with the clock, and every draw comes
from the seed. Not known here: the engine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from .. import machine
from ..workload import needle_text as language
from .training import descend, init_weights, learning_rate_factor, llama_config, make_optimizers, save_rounded

HOME = Path(__file__).parent / "needle"
CONTEXT = 2112  # prompts of 2048 tokens and a value after them
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
FILLER_WEIGHT = 0.1
WARM_UP_STEPS = 20


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the training: its share of the token budget, texts of `length` tokens, `rows` of them a step."""

    share: float
    length: int
    rows: int


PHASES = (
    Phase(0.46, 128, 16), Phase(0.14, 256, 8), Phase(0.14, 512, 4), Phase(0.13, 1024, 2), Phase(0.13, CONTEXT, 1),
)


def make_config() -> Any:
    """The Llama configuration."""
    return llama_config(language.VOCABULARY, CONTEXT, 1e6, SHAPE)


def draw_text(length: int, rng: random.Random) -> tuple[list[int], list[float]]:
    """A text and the weight of each token in the loss: needles once in the first half, again, in any order, in the second.

    Half of the later ones come with a question, as far as there is room.
    returns tokens [length], weights [length]: 1 copied, FILLER_WEIGHT filler, 0 what nothing could predict
    """
    half = length // 2
    needles = list(language.draw_needles(rng, min(language.NUM_NEEDLES, half // language.LONGEST_NEEDLE)))
    first = language.scatter([n.text for n in needles], half, rng)
    rng.shuffle(needles)
    room = length - half - sum(len(n.text) for n in needles)
    pieces = []
    for needle in needles:
        is_asked = rng.random() < 0.5 and len(needle.named) <= room
        pieces.append(needle.named + needle.text if is_asked else needle.text)
        room -= len(needle.named) if is_asked else 0
    second = language.scatter(pieces, length - half, rng)
    return first + second, _weights(first, 0.0) + _weights(second, 1.0)


def _weights(tokens: list[int], copied: float) -> list[float]:
    weights, before, is_needle = [], language.CLOSE, False
    for token in tokens:
        is_needle = token == language.MARK or is_needle and before != language.CLOSE
        if is_needle:
            weights.append(0.0 if token == language.MARK or before == language.MARK else copied)
        else:
            weights.append(FILLER_WEIGHT if token in language.FILLER and before in language.FILLER else 0.0)
        before = token
    return weights


def draw_batch(phase: Phase, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weights, both [rows, length]."""
    drawn = [draw_text(phase.length, rng) for _ in range(phase.rows)]
    return torch.tensor([tokens for tokens, _ in drawn]), torch.tensor([weights for _, weights in drawn])


def weighted_loss(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weighted mean of the next-token cross-entropy in nats, and the share of copied tokens that the model says."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    targets, weights = tokens[:, 1:], weights[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    copied = weights == 1
    said = (logits.argmax(-1) == targets)[copied].float().mean().item()
    return (losses * weights.flatten()).sum() / weights.sum(), said


def steps_of(budget: int, phases: tuple[Phase, ...] = PHASES) -> list[Phase]:
    """The phase of every step."""
    return [p for p in phases for _ in range(max(1, round(p.share * budget / (p.length * p.rows))))]


def train(model: LlamaForCausalLM, budget: int, seed: int, report: Callable[[str], None] = print,
          phases: tuple[Phase, ...] = PHASES) -> list[float]:
    """Train in place until `budget` tokens are spent, phase after phase; returns the loss of every step."""
    rng, optimizers, losses, plan = random.Random(seed), make_optimizers(model), [], steps_of(budget, phases)
    started = time.perf_counter()
    for step, phase in enumerate(plan):
        loss, said = weighted_loss(model, *draw_batch(phase, rng))
        descend(model, optimizers, loss, min((step + 1) / WARM_UP_STEPS, learning_rate_factor(step / len(plan))))
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            report(f"step {step + 1}/{len(plan)} length {phase.length} loss {np.mean(losses[-50:]):.3f} "
                   f"said {said:.3f} {time.perf_counter() - started:.0f} s")
    return losses


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, length: int, num_texts: int, seed: int) -> float:
    """Share of the copied tokens of fresh texts that are the arg-max, the tokens before them given."""
    rng = random.Random(f"accuracy {seed} {length}")
    shares = [weighted_loss(model, *draw_batch(Phase(1.0, length, 1), rng))[1] for _ in range(num_texts)]
    return sum(shares) / num_texts


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model as save_rounded does; the model takes the rounded weights too."""
    model.load_state_dict(save_rounded(model, folder).float().state_dict())


def main(argv: list[str] | None = None) -> int:
    """Command line of the training."""
    parser = argparse.ArgumentParser(prog="train_needle", description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_300_000, help="training budget in tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--texts", type=int, default=16, help="fresh texts a length to score")
    arguments = parser.parse_args(argv)
    started_at = machine.commit()
    model = LlamaForCausalLM(make_config())
    init_weights(model, torch.Generator().manual_seed(arguments.seed))
    losses = train(model, arguments.tokens, arguments.seed, lambda line: print(line, flush=True))
    save(model, arguments.out)
    lengths = (128, 256, 512, 1024, CONTEXT)
    record = {
        "seed": arguments.seed, "tokens": sum(p.length * p.rows for p in steps_of(arguments.tokens)), "steps": len(losses),
        "parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads(),
        "phases": [asdict(p) for p in PHASES], "commit": started_at,
        "loss_first_50_steps": round(float(np.mean(losses[:50])), 4),
        "loss_last_50_steps": round(float(np.mean(losses[-50:])), 4),
        "accuracy_texts": arguments.texts,
        "accuracy": {str(n): round(accuracy(model, n, arguments.texts, arguments.seed), 4) for n in lengths},
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    (arguments.out / "TRAINING.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["accuracy"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
