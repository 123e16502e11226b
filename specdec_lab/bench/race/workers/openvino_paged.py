"""OpenVINO GenAI's continuous batching, driven step by step: plain decoding, its speculative pipeline, its prompt lookup.

Not known here: the protocol's settings, and what else is tried.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from protocol import CannotRun, Decoded

BLOCK = 32  # tokens of a KV block on a CPU
ATTEMPTS = 3


@dataclass(frozen=True)
class Drafting:
    """Options of a request: num_assistant_tokens, and max_ngram_size where it is a lookup."""

    length: int = 0
    ngram: int = 0

    def options(self) -> dict[str, int]:
        """As GenAI calls them."""
        asked = {"num_assistant_tokens": self.length, "max_ngram_size": self.ngram}
        return {name: value for name, value in asked.items() if value}


@dataclass(frozen=True)
class Finished:
    """One run of all rows: tokens, how many of them came with the prompts, and the rounds and seconds of the rest."""

    tokens: list[list[int]]
    early: list[int]
    rounds: int
    prompt_s: float
    seconds: float


class Paged:
    """Prompts in the KV blocks of one pipeline, where prefix caching keeps them between runs.

    A run has to begin at the prompts, so its first steps, which re-evaluate what of each prompt does not fill a block, are not
    timed. They already give some tokens of each row: a row is asked for that many more, and exactly `new_tokens` are timed.
    """

    def __init__(
        self, model: str, mode: str, draft: str | None, properties: dict[str, Any], prompts: list[list[int]], room: int
    ) -> None:
        import openvino
        import openvino_genai

        self._genai = openvino_genai
        self._ids = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        self._early: dict[Drafting, list[int]] = {}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.max_num_seqs = len(prompts)
        scheduler.dynamic_split_fuse = False
        # all prompts in one step: GenAI's draft falls behind for good where the prompts of some rows wait for a later step
        scheduler.max_num_batched_tokens = sum(map(len, prompts)) + room * len(prompts)
        scheduler.num_kv_blocks = self._num_blocks = blocks(prompts, room)
        chosen: dict[str, Any] = dict(properties)
        if mode == "draft":
            chosen["draft_model"] = openvino_genai.draft_model(draft, "CPU", **properties)
        if mode == "lookup":
            chosen["prompt_lookup"] = True
        try:
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", chosen)
        except RuntimeError as error:
            raise CannotRun(f"OpenVINO GenAI cannot make its pipeline: {error}") from error

    def read_prompts(self, drafting: Drafting) -> float:
        """Seconds until every prompt has given its first token; later runs find the prompts in the cache."""
        return self._run(drafting, [1] * len(self._ids)).prompt_s

    def decode(self, drafting: Drafting, new_tokens: int) -> Decoded:
        """Exactly `new_tokens` tokens of every row after those that come with its prompt."""
        early = self._early.get(drafting, [1] * len(self._ids))
        for _ in range(ATTEMPTS):
            done = self._run(drafting, [new_tokens + n for n in early])
            if done.early == early:
                tokens = [row[:new_tokens] for row in done.tokens]
                return Decoded(tokens, done.seconds, {"rounds": done.rounds, "tokens_with_the_prompts": early})
            early = self._early[drafting] = done.early
        raise CannotRun("OpenVINO GenAI gives another number of tokens together with the prompts in every run")

    def kv_bytes_per_token(self) -> int:
        """Of the target, from the size of the pool that was really made."""
        return int(self._pipeline.get_metrics().kv_cache_size_in_bytes // (self._num_blocks * BLOCK))

    def close(self) -> None:
        del self._pipeline

    def _run(self, drafting: Drafting, max_new_tokens: Sequence[int]) -> Finished:
        pipeline, step = self._pipeline, self._pipeline.step
        asked = [
            self._genai.GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False, **drafting.options())
            for n in max_new_tokens
        ]
        began = time.perf_counter()
        rows = [pipeline.add_request(i, ids, how) for i, (ids, how) in enumerate(zip(self._ids, asked, strict=True))]
        while not all(row.can_read() for row in rows):
            step()
        tokens = [read(row) for row in rows]
        early, rounds = [len(row) for row in tokens], 0
        read_at = time.perf_counter()
        while pipeline.has_non_finished_requests():
            step()
            rounds += 1
        ended = time.perf_counter()
        tokens = [first + read(row) for first, row in zip(tokens, rows, strict=True)]
        return Finished(tokens, early, rounds, read_at - began, ended - read_at)


def blocks(prompts: Sequence[Sequence[int]], room: int) -> int:
    """KV blocks for the prompts and `room` tokens after each; room twice, as the run before left its own in the cache."""
    after = 2 * (room // BLOCK + 2)
    return sum(len(prompt) // BLOCK + 1 + after for prompt in prompts)


def read(row: Any) -> list[int]:
    """What a row has given since it was last read."""
    tokens: list[int] = []
    while row.can_read():
        (output,) = row.read().values()
        tokens += output.generated_ids
    return tokens
