"""`gpt-fast`: gpt-fast at batch 1 beside our engine, plain and with a draft model, from a checkout that the user names.

First the shipped pair, with the same weights on both sides: a path whose greedy tokens are not ours has no speed. Then models
of random weights at real sizes, where only times are compared: in bfloat16 other kernels round otherwise, and other weights
draw other tokens. A step, or a round, is the difference of a long and a short decode, so that reading the prompt is in
neither; compiling happens before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ....engine.loop import Engine
from ....engine.models.loading import DEMO, load, read_weights
from ....engine.models.random_weights import PREFIX, config_of
from ....records import RANDOM_WEIGHTS, SpecConfig
from ....stream import record
from ....workload import held_out
from ...race.gate import Gate
from ...race.hf import Reference
from ..attempts import one_by_one, one_of_theirs
from ..context import Context, Skipped, release
from ..gpt_fast import BOTH_RUN, WHAT_TO_DO, Checkout, Said, fill_with_noise, opened, weights_of
from ..ledger import PASS, RED, Row
from ..models import assumed, rounds_of, tokens_for

OFF = SpecConfig.off()
PATHS = ("plain", "speculation")
REPEATS = 3
SHORT = 8  # new tokens of the decode that is taken off
COMPILES_S = {"plain": 45.0, "speculation": 75.0}  # assumed, not measured; less left, and it is not begun
HINT = f"Both paths run at {BOTH_RUN}"
ONLY_TIME = "weights are random on both sides: only time is compared"


def stage(context: Context) -> Iterator[Row]:
    """Whether it emits our tokens, then its times beside ours."""
    if context.gpt_fast is None:
        raise Skipped(WHAT_TO_DO)
    if not context.gpt_fast.is_dir():
        raise Skipped(f"there is no folder {context.gpt_fast}. {WHAT_TO_DO}")
    with opened(context.gpt_fast) as checkout:
        right: list[str] = []
        for path in PATHS:
            context.checkpoint(f"tokens of gpt-fast, {path}")
            for row in one_of_theirs(context, f"gpt-fast {path}", _same_tokens(context, checkout, path)):
                if row.verdict == PASS:
                    right.append(path)
                yield row if row.kind != "failed" else replace(row, reason=f"{row.reason}. {HINT}")
        yield from _times(context, checkout, right)


def _same_tokens(context: Context, checkout: Checkout, path: str) -> Iterator[Row]:
    """The shipped pair in float32 with the very same weights: our plain greedy tokens, or no speed."""
    cell, count = context.sizes.gate_cells[0], context.sizes.peer_tokens
    engine = Engine(load("demo", device=context.device.type, dtype="float32"))
    assert engine.pair.tokenizer is not None  # the shipped pair has one
    text = held_out("prose", cell, engine.pair.tokenizer, max_new_tokens=count, stop_at_eos=False)
    ours = record(engine.open(text).steps(OFF)).tokens()
    gate = Gate([list(prompt) for prompt in text.prompts], ours, Reference(str(DEMO / "target")))
    target, draft = (_shipped(context, checkout, name, cell.length + 2 * count) for name in ("target", "draft"))
    prompt = torch.tensor(text.prompts[0], device=context.device)
    said = checkout.decode(target, prompt, count, draft if path == "speculation" else None, context.sizes.config.depth)
    found = gate.judge([said.tokens], is_ours=False)
    values = {"tokens": count, **({} if said.rounds is None else {"rounds": said.rounds}), **checkout.told}
    yield Row("same tokens", f"gpt-fast {path} demo-2M {cell}", values, RED if found.is_red else PASS,
              "our plain greedy tokens", reason=found.words)


def _shipped(context: Context, checkout: Checkout, name: str, block: int) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DEMO / name)
    made, _ = checkout.transformer(config, block, context.device, torch.float32)
    with torch.no_grad():
        made.load_state_dict(weights_of(config, read_weights(str(DEMO / name))))
    return made


def _times(context: Context, checkout: Checkout, paths: list[str]) -> Iterator[Row]:
    """Ours first, whose models are then given back; gpt-fast's compilers, which nothing can cut short, come last."""
    where = f"{context.sizes.gpt_fast[0].removeprefix(PREFIX)} {context.sizes.gpt_fast_cell}"
    for path in set(PATHS).difference(paths):
        yield Row("refused", f"gpt-fast {path} {where}", reason="it did not emit our tokens, so it gets no speed")
    ours: dict[str, float] = {}
    context.checkpoint(f"our times of {where}")
    yield from one_by_one(context, f"ours {where}", _ours(context, where, ours))
    release(context.device)
    for path in paths:
        what = f"gpt-fast {path} {where}"
        context.checkpoint(what)
        if not context.has_time_for(COMPILES_S[path]):
            yield Row("left out", what, reason=f"compiling it is taken to need {COMPILES_S[path]:.0f} s (assumed), "
                      f"{context.left_s:.0f} s are left: run this stage alone, with more minutes")
            continue
        yield from one_of_theirs(context, what, _theirs(context, checkout, path, what, ours))


def _speculates(context: Context) -> SpecConfig:
    """A draft model that reads everything, as gpt-fast's does."""
    return SpecConfig.parse(f"model:full/chain{context.sizes.config.depth}")


def _ours(context: Context, where: str, found: dict[str, float]) -> Iterator[Row]:
    """Our step and our round at the same shapes; into `found`, too."""
    sizes, cell = context.sizes, context.sizes.gpt_fast_cell
    config, rounds = _speculates(context), context.sizes.rounds
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    engine = Engine(load(*sizes.gpt_fast, device=context.device.type, dtype=dtype))
    session = assumed(engine, cell, tokens_for(config, rounds))
    for path, which in zip(PATHS, (OFF, config), strict=True):
        run = rounds_of(session, which, rounds)
        found[path] = median(step.wall_s for step in run.rounds)
        yield Row("decode", f"ours {path} {where}", _named(path, found[path]), labels=run.header.labels,
                  reason=f"{which}, attention by {engine.backend.name}")


def _named(path: str, seconds: float) -> dict[str, float]:
    return {"step_s" if path == "plain" else "round_s": seconds}


def _theirs(context: Context, checkout: Checkout, path: str, what: str, ours: dict[str, float]) -> Iterator[Row]:
    sizes, cell, count = context.sizes, context.sizes.gpt_fast_cell, 2 * context.sizes.peer_tokens
    speculates, depth = path == "speculation", sizes.config.depth
    names = sizes.gpt_fast if speculates else sizes.gpt_fast[:1]
    (target, lost), *drafts = [_random(context, checkout, seed, name) for seed, name in enumerate(names)]
    draft = drafts[0][0] if drafts else None
    drawn = torch.randint(target.config.vocab_size, (cell.length,), generator=torch.Generator().manual_seed(0))
    prompt = drawn.to(context.device)

    def decode(tokens: int) -> Said:
        return checkout.decode(target, prompt, tokens, draft, depth)

    options = {"mode": "reduce-overhead"} if context.is_gpu else {"backend": "eager"}
    started = context.now()
    with checkout.compiled(options):
        decode(count)  # compiles; its cache, which is the longest, is kept for the short ones
        compile_s = context.now() - started
        seconds, rounds, tokens = _difference(context, decode, count)
    each = seconds / (rounds if speculates else tokens)
    values = {**_named(path, each), "decode_tokens_per_s": tokens / seconds, "compile_s": compile_s, **checkout.told}
    values |= {"ours_over_it": each / ours[path]} if path in ours else {}
    values |= {"tokens_per_round": tokens / rounds, "k": depth} if speculates else {}
    notes = (ONLY_TIME, "" if context.is_gpu else "traced, not compiled: a rehearsal", lost)
    yield Row("decode", what, values, labels=(RANDOM_WEIGHTS,), reason="; ".join(filter(None, notes)))


def _random(context: Context, checkout: Checkout, seed: int, name: str) -> tuple[Any, str]:
    """A network of random weights, and what of its shape cannot be said."""
    sizes, dtype = context.sizes, getattr(torch, context.sizes.dtype)
    block = sizes.gpt_fast_cell.length + 4 * sizes.peer_tokens
    made, lost = checkout.transformer(config_of(name.removeprefix(PREFIX)), block, context.device, dtype)
    fill_with_noise(made, seed)
    return made, lost


def _difference(context: Context, decode: Callable[[int], Said], count: int) -> tuple[float, int, int]:
    """Seconds, rounds and tokens of a long decode less those of a short one."""
    long_s, many = _timed(context, lambda: decode(count))
    short_s, few = _timed(context, lambda: decode(SHORT if context.is_gpu else 2))
    rounds = (many.rounds or 0) - (few.rounds or 0)
    tokens = len(many.tokens) - len(few.tokens)
    if long_s <= short_s or (many.rounds is not None and rounds < 1):
        raise ValueError(f"{len(many.tokens)} tokens took no longer than {len(few.tokens)}: nothing can be said")
    return long_s - short_s, rounds, tokens


def _timed(context: Context, work: Callable[[], Said]) -> tuple[float, Said]:
    seconds = []
    for _ in range(REPEATS):
        context.synchronize()
        start = time.perf_counter()
        said = work()
        context.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds), said
