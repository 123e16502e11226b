"""Engine: a loaded pair and an attention back end, turning workloads into streams of StepRecord.

`Engine.steps` is the loop: per turn read the prompt, then draft, verify and commit until every row is done. Reading it is
reading the architecture; what a round does is in session.py. Not known here: views, tuner, magics.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Unpack

import torch

from .. import __version__, machine
from ..records import Cell, Identity, Run, RunHeader, SpecConfig, StepRecord, Summary
from ..stream import Stream, record
from ..summary import summarize
from ..workload import Sampling, Workload, make, random_context, why_not
from .attention import AttentionBackend
from .backends import pick
from .cache import available_bytes, check_fits
from .cache_positions import draft_backend
from .calibrate import calibrate
from .clocks import Clock, CoarseClock, PhaseClock
from .device.choice import Rounds, choose_rounds
from .device.flights import ROUNDS_PER_READ
from .device.ops import ops_for
from .device.plan import check_memory
from .device.readings import SyncedNow
from .device.session import DeviceSession
from .forced import Forced
from .models.loading import ModelPair
from .models.runner import Runner, position_mode
from .session import DRAFT_MARGIN, Session
from .threads import Threads

Choose = Callable[[int, float], SpecConfig | str]
PROMPTS = {"cpu": "sdpa"}  # back ends that hand prompt chunks to another, which the header then names
DRAFT_BEYOND = "draft beyond trained length"
MAX_OVERRUN_TOKENS = 1024  # generation may leave the trained length by this much, labelled


class PromptTooLong(ValueError):
    """A prompt, or a prompt with its reply, exceeds what the model's positions allow."""


class Chooses(Protocol):
    """A policy, as the engine sees it."""

    def chooser(self, identity: Identity) -> Choose:
        """A function from (live rows, mean length) to a configuration."""


@dataclass(frozen=True, slots=True)
class Output:
    """What generate returns: new tokens (and text, with a tokenizer) per prompt, the run behind them, its summary."""

    tokens: list[list[int]]
    texts: list[str] | None
    run: Run
    summary: Summary


class Engine:
    """Speculative decoding of a ModelPair, instrumented.

    backend     "auto" or a name; the winner and the reasons against the others go into every run header
    instrument  False measures whole rounds only (to see what the instrumentation costs)
    clock       injected in tests
    rounds      "auto": captured as CUDA graphs where that can be, else on the host; "device" (elsewhere than on CUDA: eager),
                "eager" or "host" by name
    forced      how many drafts are accepted is left to chance ("0.8": each with chance 0.8), all else runs: for timing.
                Every header is labelled, and nothing measured so is pooled with what is not
    """

    def __init__(
        self, pair: ModelPair, backend: str = "auto", *, instrument: bool = True, clock: Clock | None = None,
        rounds: str = "auto", forced: Forced | str | float | None = None,
    ) -> None:  # fmt: skip
        self.forced = forced if forced is None or isinstance(forced, Forced) else Forced.parse(str(forced))
        self.pair, self.instrument = pair, instrument
        self.backend, self.refused = pick(backend, pair.target.need())
        self._draft_backend = draft_backend(pair.draft, backend) if pair.draft else None
        self._clock, self.rounds = clock, choose_rounds(rounds, pair)
        self._versions = machine.versions()
        # ranks must make the same forwards, so none of them may try out thread counts
        is_free = pair.target.device.type == "cpu" and pair.target.group is None
        self.threads = Threads(torch.get_num_threads() if is_free else 1)
        self.ceilings = calibrate(str(pair.target.device), torch.get_num_threads())

    def __repr__(self) -> str:
        return f"Engine({self.pair!r}, backend={self.backend.name!r})"

    def steps(self, workload: Workload, choose: Any) -> Stream:
        """The run of a workload as a stream: a "prefill" record per turn that reads text, then a record per round.

        choose  a spelling, a SpecConfig, a policy, or a function (live rows, mean length) -> configuration
        """
        return self.open(workload).steps(choose)

    def open(self, workload: Workload) -> OpenSession:
        """A session whose prompts stay in the cache, to run several configurations from the same point."""
        self._check(workload)
        synced = SyncedNow(torch.cuda.synchronize) if self.pair.target.device.type == "cuda" else None
        timed = {} if synced is None else {"now": synced}
        clock = self._clock or (PhaseClock(**timed) if self.instrument else CoarseClock(**timed))
        made = (self.pair, self.backend, self._draft_backend, workload, clock, self.ceilings, self.threads)
        if not self.rounds.on_device:
            return OpenSession(self, Session(*made, self.forced), workload, clock)
        device, most = self.pair.target.device, workload.max_tokens + DRAFT_MARGIN
        check_memory(self.pair, workload.batch, most, ROUNDS_PER_READ, available_bytes(device))
        session = DeviceSession(
            *made, forced=self.forced, ops=ops_for(self.rounds.ops), captured=self.rounds.mode == "captured",
            instrumented=self.instrument, synced=synced,
        )  # fmt: skip
        return OpenSession(self, session, workload, clock)

    def workload(self, kind: str, cell: Cell | str, *, max_new_tokens: int = 128, **sampling: Unpack[Sampling]) -> Workload:
        """Prompts of an exact length for this engine's model: `engine.workload("prose", "8x4096", temperature=0.8)`.

        kind  prose, code, revision, conversation (held-out text of the shipped pair), needle, or random (timing only);
              ValueError, with the reason, for one that this model cannot read. sampling: see Workload
        """
        cell = cell if isinstance(cell, Cell) else Cell.parse(cell)
        tokenizer, vocabulary = self.pair.tokenizer, self.pair.target.shape.vocab
        if kind == "random":
            return random_context(cell, vocabulary, max_new_tokens=max_new_tokens, **sampling)
        if reason := why_not(kind, tokenizer, vocabulary, self.pair.name):
            raise ValueError(reason)
        return make(kind, cell, tokenizer, max_new_tokens=max_new_tokens, **sampling)

    def check_memory(self, batch: int, tokens: int) -> None:
        """CacheTooLarge, with the bytes and what fits, if the target's KV cannot hold this; nothing is allocated."""
        check_fits(self.pair.target, batch, tokens)

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], config: Any = "off", *, max_new_tokens: int = 64,
        temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, verifier: str = "rejection",
        stop_at_eos: bool = True,
    ) -> Output:
        """Continue prompts (texts or token lists, of any lengths) and return tokens, run and summary.

        temperature  0 is greedy: every configuration gives the tokens of plain decoding
        verifier     "rejection" (the target's law, best acceptance) or "coupled" (plain sampling's own tokens)
        """
        workload = Workload(
            "user", tuple(self._encode(p) for p in prompts), max_new_tokens, temperature=temperature, top_p=top_p,
            top_k=top_k, seed=seed, verifier=verifier, stop_at_eos=stop_at_eos,
        )
        run = record(self.steps(workload, config))
        tokens = run.tokens()
        texts = [self.pair.tokenizer.decode(t) for t in tokens] if self.pair.tokenizer else None
        return Output(tokens, texts, run, summarize(run))

    def identity(self) -> Identity:
        """What a measurement on this engine depends on: the key of tuning records and policies."""
        target, threads = self.pair.target, torch.get_num_threads()
        cuda = torch.cuda.get_device_name() if target.device.type == "cuda" else None
        device = machine.device_name(cuda, threads)
        base = {
            "device": device, "count": 1 if target.group is None else target.group.ranks,
            "target": target.fingerprint, "dtype": str(target.dtype),
            "kv_dtype": str(target.kv_dtype), "runner": target.kind, "compiled": target.why_not_compiled(self.backend) is None,
            "backend": self.backend.name,
            "graphs": self.rounds.mode == "captured", "threads": threads, "engine": __version__.rsplit(".", 1)[0],
        }
        if self.forced is not None:
            base["acceptance"] = self.forced.label
        drafters: dict[str, dict[str, Any]] = {
            "self": {"kind": "self", "position_mode": "absolute"}, "ngram": {"kind": "ngram", "sizes": [4, 3, 2]}
        }
        if self.pair.draft:
            drafters["model"] = {"kind": "model", "draft": self.pair.draft.fingerprint, "dtype": str(self.pair.draft.dtype),
                                 "kv_dtype": str(self.pair.draft.kv_dtype)}
            if self.pair.draft.rotation is not None:  # absent where absolute: older measurements keep their fingerprint
                drafters["model"]["position_mode"] = position_mode(self.pair.draft)
        return Identity(device, base, drafters, {"torch": torch.__version__})

    def _encode(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(int(t) for t in prompt)
        if self.pair.tokenizer is None:
            raise ValueError("this model was loaded without a tokenizer: give prompts as lists of token ids")
        return tuple(self.pair.tokenizer.encode(prompt))

    def _check(self, workload: Workload) -> None:
        name, limit, vocab = self.pair.target.name, self.pair.target.max_length, self.pair.target.shape.vocab
        for row, prompt in enumerate(workload.prompts):
            if len(prompt) > limit:
                raise PromptTooLong(f"prompt {row} has {len(prompt)} tokens; {name} has {limit} positions. Shorten it.")
            if max(prompt) >= vocab or min(prompt) < 0:
                raise ValueError(f"prompt {row} holds token id {max(prompt)}; {name} knows ids 0 to {vocab - 1}")
        if workload.max_tokens > limit + MAX_OVERRUN_TOKENS:
            raise PromptTooLong(
                f"prompt and reply need {workload.max_tokens} tokens; {name} was made for {limit}, and at most "
                f"{MAX_OVERRUN_TOKENS} beyond them are allowed. Ask for fewer new tokens."
            )

    def _labels(self, workload: Workload, choose: Any) -> tuple[str, ...]:
        """What a reader of the numbers must know."""
        runners = (self.pair.target, self.pair.draft)
        made = [label for runner in runners if runner is not None for label in runner.labels]
        labels = list(dict.fromkeys([
            *([self.forced.label] if self.forced else []), *made, *workload.labels, *self.ceilings.labels
        ]))
        shape, cache = self.pair.target.shape, machine.facts().get("last_level_cache_bytes")
        kv = sum(map(len, workload.prompts)) * shape.kv_bytes_per_token(self.pair.target.kv_dtype.itemsize)
        if self.pair.target.device.type == "cpu" and cache and kv < cache:
            labels.append("KV fits in cache")
        if workload.max_tokens > self.pair.target.max_length:
            labels.append("beyond trained length")
        if self.pair.draft and (beyond := _draft_beyond(self.pair.draft, workload.max_tokens, choose)):
            labels.append(beyond)
        return tuple(labels)

    def header(self, workload: Workload, choose: Any, block: int | None = None) -> RunHeader:
        """Everything that a number of a run needs to be believed."""
        device = self.pair.target.device
        return RunHeader(
            run_id=secrets.token_hex(6), created=machine.now(),
            cell=Cell(workload.batch, max(1, round(sum(map(len, workload.prompts)) / workload.batch))),
            config=_spelling(choose), workload=workload.name, target=_facts(self.pair.target, self.backend, self.rounds),
            draft=_facts(self.pair.draft, self._draft_backend, self.rounds)
            if self.pair.draft and self._draft_backend else None,
            backend=self.backend.name, refused=self.refused,
            machine={
                **machine.facts(), "device": self.identity().device, "threads": self.threads.most,
                "torch_device": str(device),
            },
            versions={"specdec_lab": __version__, **self._versions}, commit=machine.commit(), seed=workload.seed,
            temperature=workload.temperature, verifier=workload.verifier, instrumented=self.instrument,
            ceilings=self.ceilings.to_dict(),
            labels=self._labels(workload, choose), block=block,
        )


class OpenSession:
    """A workload whose prompts are (once first used) in the cache; run any number of configurations from there."""

    def __init__(self, engine: Engine, session: Session, workload: Workload, clock: Clock) -> None:
        self._engine, self._session, self._workload, self._clock = engine, session, workload, clock
        self._used = False

    def steps(self, choose: Any, *, block: int | None = None) -> Stream:
        """A stream from the end of the prompts, which are read only once. Streams of one session run one after another."""
        header = self._engine.header(self._workload, choose, block)
        chooser, fixed = _chooser(choose, self._engine.identity())
        if fixed is not None:
            self._session.check(fixed)
        return Stream(header, self._run(chooser, fixed))

    @property
    def capture_s(self) -> float:
        """Seconds that capturing rounds as graphs took so far; in no record."""
        return self._session.capture_s

    def _run(self, chooser: Choose, fixed: SpecConfig | None) -> Iterator[StepRecord]:
        try:
            yield from self._rounds(chooser, fixed)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{self._engine.pair.target.name} ran out of device memory in a round: {error}") from None

    def _rounds(self, chooser: Choose, fixed: SpecConfig | None) -> Iterator[StepRecord]:
        session, clock = self._session, self._clock
        self._engine.threads.forget_old()
        observe, take_note = getattr(chooser, "observe", None), getattr(chooser, "take_note", None)
        if self._used:
            session.rewind()
        self._used = True
        clock.lap()
        clock.resume()
        for _ in session.turns():
            prefilled = session.prefill(fixed)
            if prefilled is not None:
                yield from _paused(clock, prefilled)
            while session.live:
                config = fixed or _parse(chooser(session.live, session.mean_length))
                note = take_note() if take_note is not None else None
                if fixed is None:
                    session.check(config)
                step = session.round(config)
                if note:
                    step = replace(step, flags=(*step.flags, note))
                if observe is not None:
                    observe(step)
                yield from _paused(clock, step)


def _paused(clock: Clock, step: StepRecord) -> Iterator[StepRecord]:
    """Hand a record out; the time until the consumer asks for the next belongs to nobody."""
    clock.pause()
    yield step
    clock.resume()


def _parse(config: SpecConfig | str) -> SpecConfig:
    return config if isinstance(config, SpecConfig) else SpecConfig.parse(config)


def _chooser(choose: Any, identity: Identity) -> tuple[Choose, SpecConfig | None]:
    """A function (live rows, mean length) -> configuration, and the configuration if it is one for the whole run."""
    if isinstance(choose, str | SpecConfig):
        fixed = _parse(choose)
        return (lambda _batch, _length: fixed), fixed
    if hasattr(choose, "chooser"):
        return choose.chooser(identity), None
    if callable(choose):
        return choose, None
    raise TypeError(
        f"config must be a spelling such as 'self:4+60/chain3', a SpecConfig, a Policy or a function, got {choose!r}"
    )


def _spelling(choose: Any) -> str:
    if isinstance(choose, str | SpecConfig):
        return str(_parse(choose))
    return "policy" if hasattr(choose, "chooser") else "function"


def _draft_beyond(draft: Runner, text: int, choose: Any) -> str | None:
    """The label of a run whose draft meets positions that it was not trained on: always, or perhaps where that is not known."""
    if isinstance(choose, str | SpecConfig):
        view = _parse(choose).view if _parse(choose).drafter == "model" else None
        within = None if draft.rotation is None or view is None else view.max_tokens  # of a window, whatever the text's length
        met = 0 if view is None else text if within is None else min(text, within)
        return DRAFT_BEYOND if met > draft.max_length else None
    perhaps = "if it drafts" if draft.rotation is None else "if its window is longer than that"
    return f"{DRAFT_BEYOND}, {perhaps}" if text > draft.max_length else None


def _facts(runner: Runner, backend: AttentionBackend, rounds: Rounds) -> dict[str, Any]:
    reason = runner.why_not_compiled(backend)
    on_host = "one compiled call" if reason is None else f"layer by layer: {reason}"
    return {
        "name": runner.name, "fingerprint": runner.fingerprint, "runner": runner.kind,
        "dtype": str(runner.dtype).removeprefix("torch."), "kv_dtype": str(runner.kv_dtype).removeprefix("torch."),
        "rounds": rounds.spelled or on_host,
        "prompts": PROMPTS.get(backend.name, backend.name), "position_mode": position_mode(runner),
        "parameters": runner.shape.params, "weight_bytes": runner.shape.weight_bytes(runner.dtype.itemsize),
        "kv_bytes_per_token": runner.shape.kv_bytes_per_token(runner.kv_dtype.itemsize), "max_length": runner.max_length,
    }
