"""`peers`: transformers in its settings beside our engine, in one process, in turns.

First the shipped pair in float32, whose tokens tell: a setting that does not emit our plain greedy tokens has no speed, here or
anywhere. Where it has, that pair gives times with real acceptance; then random weights at a real shape give times of plain
decoding, where tokens are only counted: in bfloat16 other kernels round otherwise and near-ties flip. What compiles comes last.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from ....engine.loop import Engine
from ....engine.models.loading import DEMO, load
from ....engine.models.random_weights import PREFIX, config_of
from ....records import RANDOM_WEIGHTS, Cell, SpecConfig
from ....workload import held_out
from ...race.continuous import ContinuousPeer
from ...race.gate import Gate, Verdict
from ...race.hf import Prompted, Reference, TransformersPeer, peers, quiet
from ...race.ours import OurPeer, SharedSession
from ...race.peer import Decoded, Peer, Rows
from ..attempts import Attempt, one_by_one, one_of_theirs
from ..context import Context, release
from ..gpt_fast import WHAT_TO_DO
from ..ledger import PASS, RED, Row
from ..models import random_text

REPEATS = 3
OFF = SpecConfig.off()
OURS = (OFF, SpecConfig.parse("model:4+124/chain3"), SpecConfig.parse("ngram/chain6"))
COMPILED = "transformers/compiled"
COMPILES_S = 25.0  # of one shape; assumed, not measured
EQUAL = "our plain greedy tokens"


@dataclass
class Settings:
    """What takes part over one pair of weights, and which of it may have a speed.

    labels  of their rows
    """

    name: str
    ours: list[OurPeer]
    plain: list[Peer]  # generate in settings of plain decoding
    guessing: list[Peer]
    compiled: Peer
    labels: tuple[str, ...] = ()
    right: set[str] = field(default_factory=set)

    def trusted(self, some: Sequence[Peer]) -> list[Peer]:
        """Those whose tokens were found to be right."""
        return [peer for peer in some if peer.name in self.right]


def stage(context: Context) -> Iterator[Row]:
    """Tokens, times on the shipped pair, times at a real shape; then the same of generate's compiled forward."""
    with quiet():
        shipped = _shipped(context)
        usual = [*shipped.ours, *shipped.plain, *shipped.guessing]
        for cell in context.sizes.gate_cells:
            yield from _gated(context, shipped, cell, usual)
        yield from _timed(context, shipped, context.sizes.gate_cells[0], shipped.trusted(usual[1:]))
        large = _random(context)
        large.right = set(shipped.right)
        for cell in context.sizes.peer_cells:
            *generate, continuous = large.plain
            for group in (generate, [continuous]):
                yield from _timed(context, large, cell, large.trusted(group))
        yield from _compiled(context, shipped, large)
    if context.gpt_fast is None:
        yield Row("refused", "gpt-fast", reason=WHAT_TO_DO)


def _shipped(context: Context) -> Settings:
    """The shipped pair in float32, with its draft, on both sides."""
    engine = Engine(load("demo", device=context.device.type, dtype="float32"))
    where, dtype = str(DEMO / "target"), torch.float32
    target, assistant = (Prompted(str(DEMO / name), dtype, context.device) for name in ("target", "draft"))
    guessing: list[Peer] = [peer for peer in peers(target, assistant) if peer.name.endswith(("assisted", "lookup"))]
    shared = SharedSession(engine)
    return Settings("demo-2M", [OurPeer(shared, config) for config in OURS],
                    [*_generate(target), ContinuousPeer(where, dtype, context.device)], guessing, _compiling(context, target))


def _random(context: Context) -> Settings:
    """Random weights at the shape of the first model, the very same on both sides; drafts would be accepted by chance."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    release(context.device)
    chosen, dtype = context.sizes.models[0], getattr(torch, context.sizes.dtype)
    loader: Any = AutoModelForCausalLM
    with torch.device(context.device):
        model = loader.from_config(config_of(chosen.loads.removeprefix(PREFIX)), attn_implementation="sdpa", dtype=dtype).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    model.name_or_path = f"{chosen.name} (random)"
    paged, target = ContinuousPeer.around(copy.deepcopy(model)), Prompted.around(model)
    ours = [OurPeer(SharedSession(Engine(load(model))), OFF)]
    return Settings(chosen.name, ours, [*_generate(target), paged], [], _compiling(context, target), (RANDOM_WEIGHTS,))


def _generate(target: Prompted) -> list[Peer]:
    return [
        TransformersPeer("plain", target),
        TransformersPeer("static", target, cache="static", knobs={"disable_compile": True}),
    ]  # fmt: skip


def _compiling(context: Context, target: Prompted) -> Peer:
    """generate's own way of compiling; a rehearsal goes the same way with a compiler that only traces."""
    from transformers import CompileConfig

    config: Any = CompileConfig()
    if not context.is_gpu:
        config.backend, config.mode, config._compile_all_devices = "eager", None, True  # usually it compiles on GPUs only
    return TransformersPeer("compiled", target, cache="static", knobs={"compile_config": config})


def _prompts(context: Context, settings: Settings, cell: Cell) -> Rows:
    """Text for the shipped pair; tokens by chance where weights are."""
    tokens = context.sizes.peer_tokens
    if settings.labels:
        text = random_text(cell, tokens, context.sizes.models[0].shape.vocab)
    else:
        from transformers import AutoTokenizer

        text = held_out("prose", cell, AutoTokenizer.from_pretrained(DEMO / "target"), max_new_tokens=tokens)
    return [list(prompt) for prompt in text.prompts]


def _gated(context: Context, settings: Settings, cell: Cell, some: Sequence[Peer]) -> Iterator[Row]:
    """A row per setting that can run the cell; the first of ours is what all are held to. A red one is right nowhere."""
    context.checkpoint(f"tokens of {settings.name} {cell}")
    prompts = _prompts(context, settings, cell)
    plain, gate = settings.ours[0], None
    wrong: set[str] = set()
    for peer in (plain, *(peer for peer in some if peer is not plain)):
        what = f"{peer.name} {settings.name} {cell}"
        context.checkpoint(what)
        if (reason := peer.why_not(cell)) is not None:
            yield Row("refused", what, reason=reason)
            continue
        found: list[Rows] = []
        guard = one_by_one if isinstance(peer, OurPeer) else one_of_theirs
        yield from guard(context, what, _decoded(context, peer, prompts, found))
        if peer is plain and found:
            gate = Gate(prompts, found[0], Reference(str(DEMO / "target")))
            settings.right.add(plain.name)
        elif gate is None or not found:
            wrong.add(peer.name)
        else:
            verdict = gate.judge(found[0], is_ours=isinstance(peer, OurPeer))
            (wrong if verdict.is_red else settings.right).add(peer.name)
            yield _verdict(context, what, verdict)
    if gate is not None and gate.plain_verdict.is_red:
        yield _verdict(context, f"{plain.name} {settings.name} {cell}", gate.plain_verdict)
    settings.right -= wrong


def _verdict(context: Context, what: str, found: Verdict) -> Row:
    values = {"tokens": context.sizes.peer_tokens}
    return Row("same tokens", what, values, RED if found.is_red else PASS, EQUAL, reason=found.words)


def _decoded(context: Context, peer: Peer, prompts: Rows, found: list[Rows]) -> Iterator[Row]:
    """What a peer emits, into `found`; no row unless it breaks."""
    peer.prepare(prompts, context.sizes.peer_tokens)
    found.append(peer.decode().tokens)
    peer.close()
    yield from ()


def _timed(context: Context, settings: Settings, cell: Cell, some: Sequence[Peer]) -> Iterator[Row]:
    """Times of these and of our plain decoding, in turns."""
    if not some:
        return
    where = f"{settings.name} {cell}"
    context.checkpoint(f"{', '.join(peer.name for peer in some)} {where}")
    yield from one_by_one(context, f"decode {where}", _in_turns(context, settings, cell, some, where))


def _in_turns(context: Context, settings: Settings, cell: Cell, some: Sequence[Peer], where: str) -> Iterator[Row]:
    prompts, tokens, plain = _prompts(context, settings, cell), context.sizes.peer_tokens, settings.ours[0]
    ready: dict[Peer, Decoded] = {}
    first_s: dict[Peer, float] = {}
    for peer in (plain, *(peer for peer in some if peer.why_not(cell) is None)):
        started, attempt = context.now(), Attempt()
        with attempt:
            peer.prepare(prompts, tokens)
            ready[peer] = peer.decode()
        first_s[peer] = context.now() - started
        if attempt.reason:
            release(context.device)
            context.synchronize()
            verdict = RED if peer is plain and not attempt.is_memory else None
            kind = "left out" if attempt.is_memory else "failed"
            yield Row(kind, f"{peer.name} {where}", verdict=verdict, reason=attempt.reason)
    seconds: dict[Peer, list[float]] = {peer: [] for peer in ready}
    for turn in range(REPEATS):
        for peer in ready if turn % 2 == 0 else reversed(ready):
            seconds[peer].append(peer.decode().seconds)
    for peer, decoded in ready.items():
        values = {"step_s": median(seconds[peer]) / tokens, "decode_tokens_per_s": cell.batch * tokens / median(seconds[peer])}
        if peer is not plain and plain in ready:
            values["ours_over_it"] = median(seconds[peer]) / median(seconds[plain])
            values["equal_first_tokens"] = _equal(ready[plain].tokens, decoded.tokens)
        values |= {name: float(decoded.extra[name]) for name in ("tokens_per_round",) if name in decoded.extra}
        values |= {"first_s": first_s[peer], "tokens": tokens}
        yield Row("decode", f"{peer.name} {where}", values, labels=settings.labels)
        peer.close()


def _equal(mine: Rows, theirs: Rows) -> float:
    """Tokens until the first other one, the mean over rows."""
    return float((torch.tensor(mine) == torch.tensor(theirs)).long().cumprod(1).sum(1).float().mean())


def _compiled(context: Context, shipped: Settings, large: Settings) -> Iterator[Row]:
    """The same for generate with a compiled forward, as far as time goes: nothing can cut a compiler short."""
    asked = [(shipped, context.sizes.gate_cells[0]), *((large, cell) for cell in context.sizes.peer_cells)]
    for settings, cell in asked:
        what = f"{COMPILED} {settings.name} {cell}"
        context.checkpoint(what)
        if not context.has_time_for(COMPILES_S):
            yield Row("left out", what, reason=f"it and what comes after it: compiling is taken to need {COMPILES_S:.0f} s "
                      f"(assumed), {context.left_s:.0f} s are left")
            return
        if settings is shipped:
            yield from _gated(context, shipped, cell, [shipped.compiled])
            large.right |= shipped.right
        elif COMPILED not in large.right:
            return
        yield from _timed(context, settings, cell, settings.trusted([settings.compiled]))
