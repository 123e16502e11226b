"""transformers' continuous batching as a peer: paged KV, one packed forward per step over all requests.

Its prompts stay in the paged cache through prefix sharing, which reuses whole pages: what is left of a prompt is read
again with the first token. So timing starts at the first token of the last row, and one token more is generated: the
timed tokens cost one forward each, as everywhere. Not known here: our engine.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import torch

from ...records import Cell
from .hf import GROUP, load_model
from .peer import Decoded, PeerFailed, Rows

PAGE_TOKENS = 64  # a multiple of it is reused; larger pages were not faster, smaller ones were slower
PREFILL_TOKENS = 512  # of one forward
ANSWER_S, PATIENCE_S = 1.0, 600.0


class ContinuousPeer:
    """A manager of continuous batching per set of prompts; its thread sleeps between decodes."""

    goes_last = False
    name = f"{GROUP}/continuous"

    def __init__(self, where: str, dtype: torch.dtype, device: torch.device) -> None:
        self._where, self._dtype, self._device = where, dtype, device
        self._model: Any = None
        self._manager: Any = None
        self._prompts: Rows = []
        self._new_tokens = 0

    @classmethod
    def around(cls, model: Any) -> ContinuousPeer:
        """For a model in memory, whose attention it changes to a paged one."""
        made = cls(model.name_or_path, model.dtype, model.device)
        made._model = model
        return made

    def why_not(self, cell: Cell) -> str | None:
        if self._device.type == "cpu" and find_spec("psutil") is None:
            return "continuous batching of transformers sizes its cache with psutil on a CPU, and psutil is not installed"
        return None

    def settings(self) -> dict[str, Any]:
        import transformers

        dtype = str(self._dtype).removeprefix("torch.")
        return {
            "transformers": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "dtype": dtype, "kv_dtype": dtype, "attention": "sdpa", "cache": "paged", "knobs": {"page_tokens": PAGE_TOKENS},
            "timed": "from the first token of the last row to the last token, one token more than counted is generated",
            "prompts": "whole pages are kept by prefix sharing, the rest is read again with the first token",
        }  # fmt: skip

    def prepare(self, prompts: Rows, new_tokens: int) -> float:
        from transformers import GenerationConfig

        self.close()
        if self._model is None:
            self._model = load_model(self._where, self._dtype, self._device)
        self._prompts, self._new_tokens = prompts, new_tokens
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=None, max_new_tokens=new_tokens + 1)
        config = _config(len(prompts), max(map(len, prompts)) + new_tokens + 1)
        try:
            self._manager = self._model.init_continuous_batching(generation, continuous_batching_config=config)
        except (MemoryError, ValueError) as error:
            raise PeerFailed(f"{self.name} could not make its cache: {error}") from error
        self._manager.start()
        started = time.perf_counter()
        for prompt in prompts:  # one after the other: packed together every row would attend over all of them
            self._ask([prompt], 2)  # pages of a request that ends with its prompt are not kept
        return time.perf_counter() - started

    def _ask(self, prompts: Rows, new_tokens: int) -> list[Any]:
        """The finished requests in the order of the prompts."""
        wanted = self._manager.add_requests(prompts, max_new_tokens=new_tokens, record_timestamps=True)
        found: dict[str, Any] = {}
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < len(prompts):
            result = self._manager.get_result(timeout=ANSWER_S)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not self._manager.is_running():
                raise PeerFailed(f"{self.name}: its thread ended before all rows were done")
            elif time.monotonic() > deadline:
                raise PeerFailed(f"{self.name} gave no result in {PATIENCE_S:g} s")
        failed = [result.error for result in found.values() if result.error is not None]
        if failed:
            raise PeerFailed(f"{self.name}: {failed[0]}")
        return [found[request] for request in wanted]

    def decode(self) -> Decoded:
        if self._manager is None:
            raise PeerFailed(f"{self.name} was asked to decode before its prompts were read")
        rows = self._ask(self._prompts, self._new_tokens + 1)
        began = max(row.timestamps[0] for row in rows)
        timed = sum(moment > began for row in rows for moment in row.timestamps)
        if timed != len(rows) * self._new_tokens:
            raise PeerFailed(f"{self.name}: rows did not decode together, {timed} tokens came after the last first one")
        seconds = max(row.timestamps[-1] for row in rows) - began
        return Decoded([row.generated_tokens[: self._new_tokens] for row in rows], seconds)

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager = None


def _config(batch: int, longest: int) -> Any:
    """A cache for twice the rows, so that kept pages are not given up, and forwards that hold the first step of all rows.

    Options that a version does not have are left out: older ones call a page a block and never switch attention.
    """
    from transformers import generation

    make: Any = generation.ContinuousBatchingConfig  # type: ignore[attr-defined]  # exported lazily
    known = make.__dataclass_fields__
    wanted: dict[str, Any] = {
        "page_size": PAGE_TOKENS, "num_blocks": 2 * batch * (-(-longest // PAGE_TOKENS) + 1),
        "max_batch_tokens": max(PREFILL_TOKENS, batch * PAGE_TOKENS), "max_requests_per_batch": batch, "safety_margin": 0.0,
        "allow_block_sharing": True, "use_async_batching": False, "auto_switch_to_flash": False,
    }  # fmt: skip
    if "page_size" not in known:
        wanted["block_size"] = wanted["page_size"]
    return make(**{name: value for name, value in wanted.items() if name in known})
