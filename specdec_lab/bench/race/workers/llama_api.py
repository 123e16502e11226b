"""llama.cpp's C interface as this benchmark needs it: one context that holds several rows, evaluated together.

Through the low-level functions of llama-cpp-python, so that a step of a whole batch is one llama_decode and only the logits
that are needed are computed. Not known here: how tokens are chosen to be evaluated.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from protocol import CannotRun

BATCH_TOKENS, PHYSICAL_TOKENS = 2048, 512  # llama.cpp's own defaults of n_batch and n_ubatch
MOST_PER_ROUND = 16  # tokens of one row in one evaluation after the prompt
PADDING = 256  # llama.cpp rounds the KV of a row up to this
LOG_WARNING, LOG_ERROR = 3, 4

Piece = tuple[int, int, Sequence[int]]  # row, position of the first token, tokens


class Library:
    """The loaded library, quiet but for warnings."""

    def __init__(self) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise CannotRun(f"llama-cpp-python cannot be imported by {sys.executable}: {error}") from error
        self.api: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(_log)  # kept: C calls it as long as there is a model
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def facts(self) -> dict[str, str]:
        """Versions, and what the CPU code was compiled for."""
        base = ctypes.CDLL(next(str(path) for path in _folder(self.api).glob("*ggml-base*")))
        base.ggml_version.restype = base.ggml_commit.restype = ctypes.c_char_p
        return {
            "llama_cpp_python": self.api.__version__, "ggml": base.ggml_version().decode(),
            "ggml_commit": base.ggml_commit().decode(), "build": self.api.llama_print_system_info().decode().strip(" |"),
        }  # fmt: skip


def _folder(api: Any) -> Path:
    return Path(api.__file__).parent / "lib"


def _log(level: int, text: bytes, _: Any) -> None:
    if level in (LOG_WARNING, LOG_ERROR):
        sys.stderr.write(text.decode(errors="replace"))


class Model:
    """The weights of one GGUF file."""

    def __init__(self, library: Library, path: str) -> None:
        self._library, self.api = library, library.api
        if not Path(path).is_file():
            raise CannotRun(f"there is no file {path}: make it with convert_gguf.py")
        self.handle = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        if not self.handle:
            raise CannotRun(f"llama.cpp cannot load {path}: it is no GGUF file of an architecture it knows")
        self.vocab: int = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.handle))
        self.positions: int = self.api.llama_model_n_ctx_train(self.handle)

    def bytes_per_parameter(self) -> float:
        """4 where every weight is float32."""
        size: int = self.api.llama_model_size(self.handle)
        return round(size / int(self.api.llama_model_n_params(self.handle)), 3)

    def close(self) -> None:
        self.api.llama_model_free(self.handle)


class Context:
    """KV of `rows` sequences of one model, float32, and the buffers of a batch.

    Without flash attention: llama.cpp gives it float16 copies of a float32 KV, made anew for every step.
    unified  one KV for all rows, where each attends over the tokens of all with the others' masked; else one for each
    """

    def __init__(self, model: Model, rows: int, tokens_per_row: int, threads: int, unified: bool) -> None:
        self.api, self.model = model.api, model
        params = self.api.llama_context_default_params()
        params.n_ctx = rows * (-(-tokens_per_row // PADDING) * PADDING)
        params.n_seq_max = rows
        self.capacity = params.n_batch = max(BATCH_TOKENS, rows * MOST_PER_ROUND)
        params.n_ubatch = PHYSICAL_TOKENS
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.kv_unified = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED, unified
        params.type_k = params.type_v = self.api.GGML_TYPE_F32
        params.no_perf = True
        self.handle = self.api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise CannotRun(f"llama.cpp cannot make a context of {params.n_ctx} float32 positions")
        self.memory = self.api.llama_get_memory(self.handle)
        self.seconds = 0.0  # inside the library
        self._make_buffers(rows)

    def _make_buffers(self, rows: int) -> None:
        """Arrays that llama_batch points into, so that filling one is a numpy assignment."""
        self.token, self.pos = np.zeros(self.capacity, np.int32), np.zeros(self.capacity, np.int32)
        self.wanted = np.zeros(self.capacity, np.int8)
        self._row_ids = np.arange(rows, dtype=np.int32)
        self._row_addresses = np.uint64(self._row_ids.ctypes.data) + np.arange(rows, dtype=np.uint64) * np.uint64(4)
        self._rows = np.full(self.capacity, self._row_addresses[0], np.uint64)
        self._ones = np.ones(self.capacity, np.int32)
        batch = self.batch = self.api.llama_batch()
        int32_p, int8_p = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int8)
        batch.token, batch.pos = self.token.ctypes.data_as(int32_p), self.pos.ctypes.data_as(int32_p)
        batch.n_seq_id = self._ones.ctypes.data_as(int32_p)
        batch.seq_id = self._rows.ctypes.data_as(ctypes.POINTER(int32_p))
        batch.logits = self.wanted.ctypes.data_as(int8_p)
        self._views: dict[int, npt.NDArray[np.float32]] = {}

    def read(self, row: int, tokens: Sequence[int]) -> None:
        """Put a prompt into a row's KV; no logits."""
        for start in range(0, len(tokens), BATCH_TOKENS):
            self._fill([(row, start, tokens[start : start + BATCH_TOKENS])])
            self.wanted[: self.batch.n_tokens] = 0
            self._evaluate()
        self.api.llama_synchronize(self.handle)

    def next_tokens(self, pieces: Sequence[Piece]) -> list[int]:
        """The likeliest token after the end of each piece."""
        ends = self._fill(pieces)
        self.wanted[: self.batch.n_tokens] = 0
        self.wanted[np.array(ends) - 1] = 1
        self._evaluate()
        chosen: list[int] = self._likeliest(len(ends)).tolist()
        return chosen

    def all_next_tokens(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The likeliest token after every token of each piece."""
        ends = self._fill(pieces)
        self.wanted[: self.batch.n_tokens] = 1
        self._evaluate()
        flat = self._likeliest(self.batch.n_tokens).tolist()
        return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def continue_rows(self, last: Sequence[int], positions: Sequence[int], steps: int) -> npt.NDArray[np.int64]:
        """Plain greedy decoding of all rows, one llama_decode for each step; tokens as [steps, rows]."""
        self._fill([(row, at, [token]) for row, (token, at) in enumerate(zip(last, positions, strict=True))])
        rows = self.batch.n_tokens
        self.wanted[:rows] = 1
        chosen = np.empty((steps, rows), np.int64)
        for step in range(steps):
            self._evaluate()
            chosen[step] = self._likeliest(rows)
            self.token[:rows] = chosen[step]
            self.pos[:rows] += 1
        return chosen

    def keep(self, row: int, tokens: int) -> None:
        """Forget all of a row but its first `tokens`."""
        if not self.api.llama_memory_seq_rm(self.memory, row, tokens, -1):
            raise CannotRun(f"llama.cpp cannot cut row {row} back to {tokens} tokens")

    def set_threads(self, threads: int) -> None:
        self.api.llama_set_n_threads(self.handle, threads, threads)

    def _fill(self, pieces: Sequence[Piece]) -> list[int]:
        """Write pieces into the batch; where each of them ends."""
        ends, end = [], 0
        for row, start, tokens in pieces:
            begin, end = end, end + len(tokens)
            self.token[begin:end] = tokens
            self.pos[begin:end] = range(start, start + len(tokens))
            self._rows[begin:end] = self._row_addresses[row]
            ends.append(end)
        self.batch.n_tokens = end
        return ends

    def _evaluate(self) -> None:
        began = time.perf_counter()
        failed = self.api.llama_decode(self.handle, self.batch)
        self.seconds += time.perf_counter() - began
        if failed:
            raise CannotRun(f"llama_decode of {self.batch.n_tokens} tokens failed with {failed}")

    def _likeliest(self, count: int) -> npt.NDArray[np.int64]:
        """Argmax of the logits of the last evaluation, of which `count` were wanted."""
        began = time.perf_counter()
        pointer = self.api.llama_get_logits(self.handle)  # waits for the evaluation
        self.seconds += time.perf_counter() - began
        address = ctypes.addressof(pointer.contents)
        if address not in self._views:  # making a view takes as long as a small argmax; the address rarely changes
            self._views[address] = np.ctypeslib.as_array(pointer, (self.capacity, self.model.vocab))
        chosen: npt.NDArray[np.int64] = self._views[address][:count].argmax(axis=1)
        return chosen

    def close(self) -> None:
        self.api.llama_free(self.handle)
