"""Train the shipped pair: `python -m specdec_lab.demo.train_demo target`, then `... draft`.

The target learns next-token prediction on crops of 1024, then 4096, then 8192 tokens; part of the crops are a text followed
by its own revision, which teaches copying over distance. The draft learns from text first, then from the target's
distribution. Schedules run on tokens and draws on the seed, never on the clock. Not known here: the engine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .. import machine
from . import corpus
from .training import descend, init_weights, learning_rate_factor, llama_config, make_optimizers, save_rounded

HOME = Path(__file__).parent
END_OF_TEXT = "<|eot|>"
VOCABULARY, CONTEXT, BATCH_TOKENS = 2048, 8192, 8192
SHAPES = {
    "target": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 3},
    "draft": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2},
}
# (share of the token budget, crop length, share of crops that are revisions)
TARGET_PHASES = ((0.60, 1024, 0.15), (0.32, 4096, 0.25), (0.08, 8192, 0.25))
DRAFT_DISTILL_FROM = 0.4  # the first 40% of the draft's tokens use the text alone


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 entries over the train split; id 0 separates documents and is bos and eos."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_config(shape: str) -> Any:
    """The Llama configuration of "target" or "draft"."""
    return llama_config(VOCABULARY, CONTEXT, 1e5, SHAPES[shape])


class Crops:
    """Draws training crops: short ones anywhere in the shuffled stream, long ones inside one document or its revision."""

    def __init__(self, documents: list[corpus.Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.names = corpus.identifiers(documents)
        shuffled = documents[:]
        self.rng.shuffle(shuffled)
        self.ids = [np.array(tokenizer.encode(d.text) + [0], dtype=np.int32) for d in shuffled]
        self.stream = np.concatenate(self.ids)

    def _inside_one_document(self, length: int) -> np.ndarray:
        fitting = [d for d in self.ids if len(d) > length]
        # a document is drawn in proportion to the number of crops that it holds
        document = self.rng.choices(fitting, weights=[len(d) - length for d in fitting])[0]
        start = self.rng.randrange(len(document) - length)
        return document[start : start + length]

    def _revision(self, length: int) -> np.ndarray:
        original = self._inside_one_document(int(length * self.rng.uniform(0.3, 0.6)))
        edited = corpus.revise(str(self.tokenizer.decode(original)), self.rng, self.names)
        both = np.concatenate([original, np.array(self.tokenizer.encode("\n\n" + edited), dtype=np.int32)])
        missing = length - len(both)
        if missing > 0:  # cut or shortened: fill up with the stream
            start = self.rng.randrange(len(self.stream) - missing)
            both = np.concatenate([both, self.stream[start : start + missing]])
        return both[:length]

    def crop(self, length: int, revision_share: float) -> np.ndarray:
        """One crop of `length` tokens."""
        if self.rng.random() < revision_share:
            return self._revision(length)
        if length > 1100:
            return self._inside_one_document(length)
        start = self.rng.randrange(len(self.stream) - length)
        return self.stream[start : start + length]

    def batch(self, context: int, revision_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next tokens, each [8192 / context, context]."""
        rows = [self.crop(context + 1, revision_share) for _ in range(BATCH_TOKENS // context)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


def logits_of(model: LlamaForCausalLM, inputs: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Logits [B, T, V] in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits
    return logits.float()


def text_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean next-token cross-entropy in nats."""
    return F.cross_entropy(logits_of(model, inputs, bf16).flatten(0, 1), targets.flatten())


def distill_loss(
    model: LlamaForCausalLM, teacher: LlamaForCausalLM, inputs: torch.Tensor, bf16: bool
) -> torch.Tensor:
    """Cross-entropy of the draft against the frozen target's distribution (T = 1), nats per token."""
    with torch.no_grad():
        law = logits_of(teacher, inputs, bf16).softmax(-1)
    return F.cross_entropy(logits_of(model, inputs, bf16).flatten(0, 1), law.flatten(0, 1))


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step of training looks like at a share `done` of the budget: crop length and revisions."""

    phases: tuple[tuple[float, int, float], ...]

    def at(self, done: float) -> tuple[int, float]:
        for share, context, revisions in self.phases:
            if done < share:
                return context, revisions
            done -= share
        return self.phases[-1][1:]


Loss = Callable[[torch.Tensor, torch.Tensor, float, bool], torch.Tensor]


def pick_bf16(model: LlamaForCausalLM, loss: Loss, crops: Crops, plan: Plan, budget: int) -> bool:
    """Time three steps a phase in bf16 and fp32, print the estimate, return whether bf16 is the faster."""
    totals = {}
    for bf16 in (True, False):
        totals[bf16] = 0.0
        for share, context, revisions in plan.phases:
            inputs, targets = crops.batch(context, revisions)
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                loss(inputs, targets, 1.0, bf16).backward()
                seconds.append(time.perf_counter() - start)
                model.zero_grad()
            totals[bf16] += min(seconds) * share * budget / BATCH_TOKENS
    fastest = totals[True] < totals[False]
    print(f"estimate: bf16 {totals[True] / 60:.0f} min, fp32 {totals[False] / 60:.0f} min", flush=True)
    return fastest


def train(
    model: LlamaForCausalLM, loss: Loss, crops: Crops, plan: Plan, budget: int, bf16: bool,
    checkpoint: Path | None = None, report: Callable[[str], None] = print,
) -> list[float]:
    """Train in place for `budget` tokens; returns the loss of every step. Resumes from `checkpoint` if it exists."""
    optimizers, losses, steps = make_optimizers(model), [], math.ceil(budget / BATCH_TOKENS)
    first = 0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, losses = state["step"], state["losses"]
        crops.rng.seed(first)  # a resumed run draws other crops than an unbroken one, and says so
        report(f"resumed at step {first}; crops differ from an unbroken run")
    started = time.perf_counter()
    for step in range(first, steps):
        done = step / steps
        inputs, targets = crops.batch(*plan.at(done))
        value = loss(inputs, targets, done, bf16)
        descend(model, optimizers, value, learning_rate_factor(done) * min(1.0, (step + 1) / 20))
        losses.append(value.item())
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) * BATCH_TOKENS / (time.perf_counter() - started)
            report(f"step {step + 1}/{steps} context {plan.at(done)[0]} loss {np.mean(losses[-50:]):.3f} {rate:.0f} tok/s")
            if checkpoint:
                torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                            "step": step + 1, "losses": losses}, checkpoint)
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model as save_rounded does, and the tokenizer."""
    save_rounded(model, folder)
    tokenizer.save_pretrained(folder)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the trained target, with the options that it was made with."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _prepare(arguments: argparse.Namespace) -> list[corpus.Document]:
    documents = corpus.collect(Path(arguments.manual) if arguments.manual else corpus.find_manual())
    manifest = HOME / "CORPUS.json"
    if arguments.new_manifest or not manifest.exists():
        corpus.write_manifest(documents, manifest)
    else:
        corpus.check_manifest(documents, manifest)
    return documents


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_demo", description=__doc__)
    parser.add_argument("which", choices=("target", "draft"))
    parser.add_argument("--tokens", type=int, default=12_000_000, help="training budget in tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--manual", help="folder of the manual's reST sources")
    parser.add_argument("--new-manifest", action="store_true", help="accept the text of this machine")
    parser.add_argument("--checkpoint", type=Path, help="save here every 50 steps, and resume from it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line of the two trainings."""
    arguments = _arguments(argv)
    documents, started_at = _prepare(arguments), machine.commit()
    training_text = [d for d in documents if d.split == "train"]
    if arguments.which == "target":
        tokenizer = make_tokenizer(d.text for d in training_text)
        teacher = None
    else:
        tokenizer = read_tokenizer(arguments.out / "target")
        teacher = LlamaForCausalLM.from_pretrained(arguments.out / "target").eval()
    crops = Crops(training_text, tokenizer, arguments.seed)
    print(f"{len(crops.stream):,} training tokens in {len(training_text)} documents", flush=True)
    model = LlamaForCausalLM(make_config(arguments.which))
    init_weights(model, torch.Generator().manual_seed(arguments.seed))
    plan = Plan(TARGET_PHASES if teacher is None else ((1.0, 1024, 0.15),))

    def loss(inputs: torch.Tensor, targets: torch.Tensor, done: float, bf16: bool) -> torch.Tensor:
        if teacher is None or done < DRAFT_DISTILL_FROM:
            return text_loss(model, inputs, targets, bf16)
        return distill_loss(model, teacher, inputs, bf16)

    bf16 = pick_bf16(model, loss, crops, plan, arguments.tokens)
    crops.rng.seed(arguments.seed)
    started = time.perf_counter()
    losses = train(model, loss, crops, plan, arguments.tokens, bf16, arguments.checkpoint,
                   lambda line: print(line, flush=True))
    save(model, tokenizer, arguments.out / arguments.which)
    record = {
        "seed": arguments.seed, "tokens": len(losses) * BATCH_TOKENS, "seconds": round(time.perf_counter() - started),
        "precision": "bf16 autocast, fp32 master weights" if bf16 else "fp32", "device": "cpu",
        "threads": torch.get_num_threads(), "phases": plan.phases, "commit": started_at,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "loss_last_50_steps": round(float(np.mean(losses[-50:])), 4),
    }
    path = arguments.out / "TRAINING.json"
    training = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**training, arguments.which: record}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
