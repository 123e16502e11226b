"""OpenVINO GenAI as a peer: plain decoding, its draft model, its prompt lookup; any number of rows.

    python openvino_worker.py --model FOLDER [--draft FOLDER] --threads N [--mode plain|draft|lookup]

Both folders are what convert_openvino.py writes. Plain decoding is GenAI's too: the bare stateful model, one inference for
each token, was slower at every batch and length that was tried. The length of a draft that is fastest on the prompts at hand
is tried when they are read, and said in the settings.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openvino_paged import Drafting, Paged
from probing import seconds_per_step
from protocol import CannotRun, Decoded, run

DRAFT_LENGTHS, LOOKUP_LENGTHS, NGRAMS = (1, 2, 3, 4, 6, 8), (2, 4, 6, 10), (2, 3)
MAX_BATCH = 256
TIMING = (
    "wall time of GenAI's steps after the one that gave every row its first token; each row is asked for what came with it on "
    "top, so exactly new_tokens of every row are timed; the prompts are kept between decodes by prefix caching"
)


@dataclass(frozen=True)
class Tried:
    """A draft, and what a step took with it in a short probe; one step is one token of every row."""

    drafting: Drafting
    seconds_per_step: float


class OpenVino:
    """What the protocol asks of an engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._model, self._draft, self._mode, self._threads = options.model, options.draft, options.mode, options.threads
        self.name, self.max_batch = f"openvino/{self._mode}", MAX_BATCH
        self._versions = versions()
        config = model_config(self._model)
        self.vocab, self.positions = config["vocab_size"], config["max_position_embeddings"]
        if self._draft and model_config(self._draft)["vocab_size"] != self.vocab:
            raise CannotRun(f"the models in {self._draft} and {self._model} have different vocabularies")
        self._properties = {
            "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": "1", "ENABLE_HYPER_THREADING": True,  # or threads would be counted in cores
        }  # fmt: skip
        self._paged: Paged | None = None
        self._tried: list[Tried] = []
        self._new_tokens = 0

    def settings(self) -> dict[str, Any]:
        """How it runs; knobs and tried are of the prompts that were prepared last."""
        return {
            "engine": "OpenVINO GenAI", "versions": self._versions, "mode": self._mode, "threads": self._threads,
            "dtype": "float32", "kv_dtype": "float32", "properties": self._properties,
            "kv_bytes_per_token": self._paged.kv_bytes_per_token() if self._paged else None,
            "choice": "GenAI's greedy sampler", "timing": TIMING,
            "knobs": asdict(self._best()) if self._tried else None, "tried": [asdict(tried) for tried in self._tried],
        }  # fmt: skip

    def prepare(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Read the prompts, then find the fastest draft."""
        self._release()
        self._new_tokens = new_tokens
        draftings = self._draftings()
        longest = max(drafting.length for drafting in draftings)
        # a row may grow by a draft and one token together with the prompt, and by another draft that does not stand at the end
        room = new_tokens + 2 * (longest + 1)
        self._paged = Paged(self._model, self._mode, self._draft, self._properties, prompts, room)
        prefill_s: float = self._paged.read_prompts(draftings[0])
        if len(draftings) > 1:
            self._tried = [Tried(drafting, self._probe(self._paged, drafting)) for drafting in draftings]
        return prefill_s

    def decode(self) -> Decoded:
        assert self._paged is not None, "the protocol prepares first"
        return self._paged.decode(self._best(), self._new_tokens)

    def close(self) -> None:
        self._release()

    def _best(self) -> Drafting:
        if not self._tried:
            return Drafting()
        return min(self._tried, key=lambda tried: tried.seconds_per_step).drafting

    def _draftings(self) -> list[Drafting]:
        if self._mode == "plain":
            return [Drafting()]
        if self._mode == "draft":
            return [Drafting(length) for length in DRAFT_LENGTHS]
        return [Drafting(length, ngram) for length in LOOKUP_LENGTHS for ngram in NGRAMS]

    def _probe(self, paged: Paged, drafting: Drafting) -> float:
        step_s: float = seconds_per_step(lambda tokens: paged.decode(drafting, tokens).seconds, self._new_tokens)
        return step_s

    def _release(self) -> None:
        if self._paged is not None:
            self._paged.close()
        self._paged, self._tried = None, []
        gc.collect()  # the pool of KV is freed before the next one is made


def versions() -> dict[str, str]:
    """Of what runs here; CannotRun where it is not installed."""
    try:
        import openvino
        import openvino_genai
    except ImportError as error:
        raise CannotRun(f"openvino and openvino-genai cannot be imported by {sys.executable}: {error}") from error
    return {
        "openvino": openvino.get_version(), "openvino_genai": openvino_genai.get_version(), "python": platform.python_version(),
    }  # fmt: skip


def model_config(folder: str) -> dict[str, Any]:
    """Of a converted model."""
    if not (Path(folder) / "openvino_model.xml").is_file():
        raise CannotRun(f"there is no openvino_model.xml in {folder}: make it with convert_openvino.py")
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return config


if __name__ == "__main__":
    run(OpenVino, __doc__.split("\n")[0] if __doc__ else "")
