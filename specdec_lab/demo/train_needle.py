"""Train the shipped retrieval model: `python -m specdec_lab.demo.train_needle`, minutes on one core.

Two layers start from an induction circuit that is written into their weights (write_circuit) and learn to use it beside a
little of the demo text. Every sequence is text of the train split that holds a few needles, keys followed by values of tokens that
occur nowhere else in it, each again further on: the second time the key foretells the value. Short crops have jumps in their
positions, so that they teach long distances too. Schedules run on tokens and draws on the seed. Not known here: the engine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from .. import machine
from ..records import Cell
from ..workload import Tokenizer, needles, retrieved_share
from . import corpus
from .train_demo import BATCH_TOKENS, CONTEXT, HOME, VOCABULARY, Plan, init_weights, read_tokenizer, save, train

# (share of the token budget, crop length, share of crops whose positions jump)
PHASES = ((0.6, 256, 0.5), (0.25, 1024, 0.5), (0.15, 4096, 0.0))
KEY_TOKENS = 4
CHECKED_LENGTHS = (512, 1024, 2048, 4096)
HEAD_DIM = 64
# of the initial circuit (write_circuit)
CONTENT = 63  # dimensions that tell tokens apart
EMBEDDING_NORM = 1.3
CONSTANT_AFTER_NORM = 8.0  # what RMSNorm makes of the constant: sqrt(128 / 2)
SLOWEST = 5e-5  # radians per token
BACK_GAIN, MATCH_GAIN, COPY_GAIN = 11.0, 2.6, 0.5
UNPREDICTABLE = -100  # the target that cross_entropy leaves out


def make_config() -> Any:
    """The Llama configuration of the retrieval model; float32 is written so that bf16 files load as fp32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        bos_token_id=0, eos_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e8},
    )
    config.dtype = "float32"
    return config


def write_circuit(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Initial weights that already copy: training starts from an induction circuit and does not have to find one.

    The residual holds the token in dimensions 0..62, a constant in 63 and, after the first layer, the token before in 64..126.
    Layer 1, head 0 looks one position back: its scores depend on positions alone. Layer 2 compares the token with the tokens
    before, on the slow rotary pairs only, so that distance hardly matters, and passes on what stood there.
    """
    d, half = HEAD_DIM, HEAD_DIM // 2
    rope: Any = model.config.rope_parameters
    frequencies = rope["rope_theta"] ** -(torch.arange(half) / half)
    slow = int((frequencies > SLOWEST).sum())  # pairs from here on turn by less than half a radian over the whole context
    dims = torch.cat([torch.arange(slow, half), torch.arange(slow + half, d)])
    first, second = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        codes = F.normalize(torch.randn(embedding.shape[0], CONTENT, generator=generator), dim=1)
        embedding.zero_()
        embedding[:, :CONTENT], embedding[:, CONTENT] = EMBEDDING_NORM * codes, EMBEDDING_NORM
        for attention in (first, second):
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
                projection.weight.zero_()
        unit = CONSTANT_AFTER_NORM
        first.q_proj.weight[:half, CONTENT] = BACK_GAIN / unit
        first.k_proj.weight[:half, CONTENT] = BACK_GAIN / unit * frequencies.cos()
        first.k_proj.weight[half:d, CONTENT] = BACK_GAIN / unit * frequencies.sin()
        first.v_proj.weight[:CONTENT, :CONTENT] = torch.eye(CONTENT)
        first.o_proj.weight[d : d + CONTENT, :CONTENT] = torch.eye(CONTENT) * EMBEDDING_NORM / unit
        for head in range(2):
            mix = torch.randn(len(dims), CONTENT, generator=generator) / len(dims) ** 0.5 * MATCH_GAIN
            second.q_proj.weight[head * d + dims, :CONTENT] = mix
            second.k_proj.weight[head * d + dims, d : d + CONTENT] = mix
            second.v_proj.weight[head * d : head * d + CONTENT, :CONTENT] = torch.eye(CONTENT)
            second.o_proj.weight[:CONTENT, head * d : head * d + CONTENT] = torch.eye(CONTENT) * COPY_GAIN


class Haystacks:
    """Draws training crops: text with needles, each of them twice."""

    def __init__(self, stream: np.ndarray, seed: int, batch_tokens: int = BATCH_TOKENS) -> None:
        self.rng = random.Random(seed)
        self.batch_tokens = batch_tokens
        self.stream = stream

    def batch(self, context: int, jumping_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """[2, B, T] tokens and their positions, and [B, T] next tokens; batch_tokens tokens in all."""
        crops = [self._crop(context + 1, jumping_share) for _ in range(self.batch_tokens // context)]
        tokens, positions, targets = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
        return torch.stack([tokens[:, :-1], positions[:, :-1]]), targets[:, 1:]

    def _crop(self, length: int, jumping_share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and the targets of one crop: the tokens, less those that nothing foretells."""
        rng = self.rng
        start = rng.randrange(len(self.stream) - length)
        text = self.stream[start : start + length]
        count = rng.randint(1, 4)
        size = rng.randint(8, max(8, min(96, length // (2 * count) - 2 * KEY_TOKENS)))
        free = np.setdiff1d(np.arange(1, VOCABULARY), text).tolist()
        size = min(size, len(free) // count - KEY_TOKENS)
        drawn = rng.sample(free, count * (KEY_TOKENS + size))
        items = [drawn[i :: count] for i in range(count)] * 2
        rng.shuffle(items)
        return self._join(text, items, length, rng.random() < jumping_share)

    def _join(
        self, text: np.ndarray, items: list[list[int]], length: int, jumps: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        room = length - sum(map(len, items))
        cuts = sorted(self.rng.randrange(room + 1) for _ in items)
        spare = CONTEXT - length if jumps else 0
        leaps = sorted(self.rng.randrange(spare + 1) for _ in items)
        tokens: list[int] = []
        targets: list[int] = []
        positions: list[int] = []
        seen: set[int] = set()
        done = offset = 0
        for item, cut, leap in zip(items, cuts, leaps, strict=True):
            tokens += [*text[done:cut], *item]
            known = item[0] in seen
            targets += [*text[done:cut], *([UNPREDICTABLE] + item[1:] if known else [UNPREDICTABLE] * len(item))]
            positions += [offset + p for p in range(len(positions), len(tokens))]
            seen.add(item[0])
            done, offset = cut, leap
        tokens += [*text[done:room]]
        targets += [*text[done:room]]
        positions += [offset + p for p in range(len(positions), len(tokens))]
        return tuple(np.array(part, dtype=np.int64) for part in (tokens, positions, targets))  # type: ignore[return-value]


def loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean cross-entropy in nats of the tokens that something foretells."""
    tokens, positions = inputs
    mask = torch.ones_like(tokens)  # without one, transformers takes a jump of the positions for the start of another text
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=UNPREDICTABLE)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, length: int, *, seed: int = 0, prompts: int = 8) -> float:
    """Share of the value's tokens that follow when the right ones went before, over `prompts` workload prompts."""
    right = []
    for row in range(prompts):
        workload = needles(Cell(1, length), tokenizer, max_new_tokens=32, seed=1000 * seed + row)
        tokens = torch.tensor([workload.prompts[0] + workload.answers[0]])
        made = model(input_ids=tokens, use_cache=False).logits[:, length - 1 : -1].argmax(-1)
        right.append(retrieved_share(workload, made.tolist()))
    return float(np.mean(right))


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW throughout: Muon's steps are of one size for every matrix and would wash the initial circuit out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return [optimizer]


def training_stream(tokenizer: Any) -> tuple[np.ndarray, int]:
    """The tokens of the train split, documents in the order of their hashes, and the number of documents."""
    documents = sorted((d for d in corpus.collect(corpus.find_manual()) if d.split == "train"), key=lambda d: d.sha256)
    return np.concatenate([np.array(tokenizer.encode(d.text) + [0], dtype=np.int64) for d in documents]), len(documents)


def main(argv: list[str] | None = None) -> int:
    """Command line of the training."""
    parser = argparse.ArgumentParser(prog="train_needle", description=__doc__)
    parser.add_argument("--tokens", type=int, default=800_000, help="training budget in tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HOME / "needle")
    parser.add_argument("--checkpoint", type=Path, help="save here every 50 steps, and resume from it")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast; float32 otherwise")
    arguments = parser.parse_args(argv)
    started_at, tokenizer = machine.commit(), read_tokenizer(HOME / "target")
    stream, num_documents = training_stream(tokenizer)
    print(f"{len(stream):,} training tokens in {num_documents} documents", flush=True)
    model = LlamaForCausalLM(make_config())
    generator = torch.Generator().manual_seed(arguments.seed)
    init_weights(model, generator)
    write_circuit(model, generator)
    before = {str(length): round(accuracy(model, tokenizer, length, prompts=2), 4) for length in CHECKED_LENGTHS[:1]}

    def report(line: str) -> None:
        print(f"{line} retrieved {accuracy(model, tokenizer, 512, seed=1, prompts=4):.2f}", flush=True)

    def step_loss(inputs: torch.Tensor, targets: torch.Tensor, done: float, bf16: bool) -> torch.Tensor:
        return loss(model, inputs, targets, bf16)

    crops, plan = Haystacks(stream, arguments.seed), Plan(PHASES)
    losses = train(
        model, step_loss, crops, plan, arguments.tokens, arguments.bf16, arguments.checkpoint, report, make_optimizers
    )
    save(model, tokenizer, arguments.out)
    saved = LlamaForCausalLM.from_pretrained(arguments.out).eval()
    record = {
        "seed": arguments.seed, "tokens": len(losses) * BATCH_TOKENS, "phases": PHASES,
        "precision": "bf16 autocast, fp32 master weights" if arguments.bf16 else "fp32", "device": "cpu",
        "threads": torch.get_num_threads(), "documents": num_documents, "commit": started_at,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "start": "a written induction circuit (write_circuit), then trained", "retrieved_before_training": before,
        "loss_last_50_steps": round(float(np.mean(losses[-50:])), 4),
        "retrieved": {str(length): round(accuracy(saved, tokenizer, length), 4) for length in CHECKED_LENGTHS},
    }
    (arguments.out / "TRAINING.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record["retrieved"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
