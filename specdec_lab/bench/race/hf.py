"""transformers' generate as peers, with the same weights in the same type: plain, static cache, assisted, prompt lookup.

The KV of the prompts is read once and shared; before every decode a cache is restored from it, outside of the timed
window. generate has no way of its own to go on from a cache with candidates (assisted decoding would feed the whole prompt
again), so two small callables stand before public methods of the models: one cuts the inputs to what the cache lacks, one
hands the assistant its prompt. What runs in between is transformers' own code. Not known here: our engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

import torch
from torch import Tensor

from ...records import Cell
from .peer import Decoded, Rows, Stopwatch

GROUP = "transformers"
ASSISTANT_TOKENS, LOOKUP_TOKENS = 3, 5
REFERENCE_CHUNK = 512  # tokens per forward of the float64 reference: its attention keeps all scores
SHARED = "read once and shared by these peers; the cache is restored before every decode, outside of the timed window"


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and advice while it is raced; afterwards as it was."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()


def load_model(where: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal LM with sdpa attention that never ends a text by itself and decodes greedily."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(where, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"{type(model).__name__} did not take sdpa attention, it uses {model.config._attn_implementation}")
    # generate fills what its arguments leave open from here, so end of text must be unset in both places
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    return model


class _Resume:
    """Stands before prepare_inputs_for_generation: gives the model the tokens that its cache lacks, and counts forwards.

    Without it the first forward of assisted decoding takes the whole prompt although the cache holds it.
    """

    def __init__(self, model: Any) -> None:
        self._usual = model.prepare_inputs_for_generation
        self.forwards = 0
        model.prepare_inputs_for_generation = self

    def __call__(
        self, input_ids: Tensor, next_sequence_length: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        self.forwards += 1
        if next_sequence_length is None and past_key_values is not None:
            next_sequence_length = input_ids.shape[1] - int(past_key_values.get_seq_length())
        prepared: dict[str, Any] = self._usual(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )
        return prepared


class _PromptHandedOver:
    """Stands before an assistant's generate: its first call in a decode finds the prompt in its cache, as the target does."""

    def __init__(self, model: Any) -> None:
        self._usual = model.generate
        self.kept: Any = None
        model.generate = self

    def __call__(self, **arguments: Any) -> Any:
        if arguments.get("past_key_values") is None:
            arguments["past_key_values"], self.kept = self.kept, None
        return self._usual(**arguments)


class Prompted:
    """One transformers model and the KV of the prompts that it read last, all tokens but the last of each row."""

    def __init__(self, where: str, dtype: torch.dtype, device: torch.device) -> None:
        self._take(load_model(where, dtype, device))

    @classmethod
    def around(cls, model: Any) -> Prompted:
        """For a model in memory."""
        made = cls.__new__(cls)
        made._take(model)
        return made

    def _take(self, model: Any) -> None:
        self.model = model
        self.counter = _Resume(self.model)
        self._prompts: Rows = []
        self._kv: list[tuple[Tensor, Tensor]] = []  # per layer [B, H, S-1, D]
        self._seconds = 0.0

    @property
    def ids(self) -> Tensor:
        """The prompts that were read last. [B, S]"""
        return torch.tensor(self._prompts, device=self.model.device)

    def read(self, prompts: Rows) -> float:
        """The seconds that these prompts took to read; they are read only if they are others than the last ones."""
        from transformers import DynamicCache

        if prompts != self._prompts:
            self.forget()
            cache: Any = DynamicCache(config=self.model.config)
            read = torch.tensor(prompts, device=self.model.device)[:, :-1]
            with torch.inference_mode(), Stopwatch() as watch:
                self.model(input_ids=read, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._kv = [(layer.keys, layer.values) for layer in cache.layers]
            self._prompts, self._seconds = prompts, watch.seconds
        return self._seconds

    def fill(self, cache: Any) -> Any:
        """Put a copy of the prompts' KV into an empty cache."""
        for layer, (keys, values) in enumerate(self._kv):
            cache.update(keys, values, layer)
        return cache

    def dynamic_cache(self) -> Any:
        """A growing cache at the end of the prompts."""
        from transformers import DynamicCache

        return self.fill(DynamicCache(config=self.model.config))

    def forget(self) -> None:
        """Free the KV."""
        self._prompts, self._kv = [], []


class TransformersPeer:
    """generate in one setting.

    setting    what the row is called after "transformers/"
    cache      "dynamic" (grows by concatenation) or "static" (allocated once for prompt and new tokens)
    assistant  drafts for the target; its knobs sit on its own generation_config
    knobs      further arguments of generate
    """

    goes_last = False

    def __init__(
        self, setting: str, target: Prompted, *, cache: str = "dynamic", assistant: Prompted | None = None,
        knobs: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = f"{GROUP}/{setting}"
        self._target, self._assistant, self._kind, self._knobs = target, assistant, cache, dict(knobs or {})
        self._new_tokens = 0
        self._static: Any = None
        self._handed = _PromptHandedOver(assistant.model) if assistant else None

    @property
    def _is_speculative(self) -> bool:
        return self._assistant is not None or "prompt_lookup_num_tokens" in self._knobs

    def why_not(self, cell: Cell) -> str | None:
        if cell.length < 2:
            return "a prompt of one token leaves nothing to read before decoding"
        if self._is_speculative and cell.batch > 1:
            return "assisted generation of transformers is limited to batch 1"
        return None

    def settings(self) -> dict[str, Any]:
        import transformers

        model = self._target.model
        knobs: dict[str, Any] = dict(self._knobs)
        if self._assistant is not None:
            config = self._assistant.model.generation_config
            names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
            knobs = {"assistant_model": type(self._assistant.model).__name__, **{name: getattr(config, name) for name in names}}
        return {
            "transformers": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "dtype": str(model.dtype).removeprefix("torch."), "kv_dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation, "cache": self._kind, "knobs": knobs, "prompts": SHARED,
        }  # fmt: skip

    def prepare(self, prompts: Rows, new_tokens: int) -> float:
        from transformers import StaticCache

        seconds, self._new_tokens, self._static = self._target.read(prompts), new_tokens, None
        if self._assistant is not None:
            seconds += self._assistant.read(prompts)
        if self._kind == "static":
            self._static = StaticCache(config=self._target.model.config, max_cache_len=len(prompts[0]) + new_tokens)
        return seconds

    def _restored(self) -> Any:
        """The cache at the end of the prompts."""
        if self._assistant is not None and self._handed is not None:
            self._handed.kept = self._assistant.dynamic_cache()
        if self._static is None:
            return self._target.dynamic_cache()
        self._static.reset()
        return self._target.fill(self._static)

    def decode(self) -> Decoded:
        target, assistant, new_tokens = self._target, self._assistant, self._new_tokens
        options = {**self._knobs, "assistant_model": assistant.model} if assistant else self._knobs
        ids, cache = target.ids, self._restored()
        for model in (target, assistant):
            if model is not None:
                model.counter.forwards = 0
        if ids.is_cuda:
            torch.cuda.synchronize()  # the copies that restored the cache are not part of the decode
        with torch.inference_mode(), Stopwatch() as watch:
            rows: Rows = target.model.generate(
                ids, past_key_values=cache, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **options
            ).tolist()
        extra: dict[str, Any] = {"cpu_s": watch.cpu_s, "forwards": target.counter.forwards}
        if self._is_speculative:
            extra["tokens_per_round"] = new_tokens / target.counter.forwards
        if assistant is not None:
            extra["assistant_forwards"] = assistant.counter.forwards
        return Decoded([row[ids.shape[1] :] for row in rows], watch.seconds, extra)

    def close(self) -> None:
        self._static = None
        for model in (self._target, self._assistant):
            if model is not None:
                model.forget()


def peers(target: Prompted, assistant: Prompted | None) -> list[TransformersPeer]:
    """generate in every setting that these models allow."""
    found = [
        TransformersPeer("plain", target),
        TransformersPeer("static", target, cache="static"),
        TransformersPeer("lookup", target, knobs={"prompt_lookup_num_tokens": LOOKUP_TOKENS}),
    ]
    if assistant is not None:
        config = assistant.model.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = ASSISTANT_TOKENS, "constant"
        config.assistant_confidence_threshold = 0.0
        found.insert(2, TransformersPeer("assisted", target, assistant=assistant))
    return found


class Reference:
    """The same weights in float64, by transformers' own code: how good was each token of a greedy row? Loaded when asked."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._model: Any = None

    def __call__(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """For every token, by how much its logit stays below the best one, given the prompt and the tokens before it."""
        from transformers import DynamicCache

        if self._model is None:
            self._model = load_model(self._where, torch.float64, torch.device("cpu"))
        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        cache = DynamicCache(config=self._model.config)
        kept: list[Tensor] = []
        with torch.inference_mode():
            for chunk in ids.split(REFERENCE_CHUNK, dim=1):
                kept.append(self._model(input_ids=chunk, past_key_values=cache, use_cache=True).logits[0, -len(tokens) :])
        logits = torch.cat(kept)[-len(tokens) :]  # [N, V]
        gaps = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return [float(gap) for gap in gaps]
