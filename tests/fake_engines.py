"""Stand-ins for llama_cpp and openvino_genai: the next token is a rule, and a wrong use of the KV fails."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

VOCAB = 11


def rule(tokens):
    """What the target says after these tokens: repeats after a while, so that looking back pays."""
    return (tokens[-1] + tokens[-2]) % 4 + 1 if len(tokens) > 1 else (tokens[-1] + 4) % VOCAB


def draft_rule(tokens):
    """What the draft model says: wrong after some tokens."""
    return (rule(tokens) + (tokens[-1] % 4 == 0)) % VOCAB


def continuation(prompt, new_tokens):
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(rule(tokens))
    return tokens[len(prompt) :]


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]  # fmt: skip


class FakeLlama:
    """The part of llama_cpp that the worker uses; a file named draft.gguf is the draft model."""

    GGML_TYPE_F32 = LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
    llama_batch = Batch
    llama_context_default_params = llama_model_default_params = SimpleNamespace
    llama_log_callback = staticmethod(lambda function: function)

    def __init__(self):
        self.contexts, self.decodes, self.logit_rows = [], 0, 0
        for name in ("log_set", "backend_init", "synchronize", "model_free"):
            setattr(self, f"llama_{name}", lambda *_: None)

    def llama_model_load_from_file(self, path, params):
        return draft_rule if path.endswith(b"draft.gguf") else rule

    def llama_model_get_vocab(self, model):
        return model

    def llama_vocab_n_tokens(self, vocab):
        return VOCAB

    def llama_model_n_ctx_train(self, model):
        return 512

    def llama_model_size(self, model):
        return 400

    def llama_model_n_params(self, model):
        return 100

    def llama_max_parallel_sequences(self):
        return 8

    def llama_init_from_model(self, model, params):
        assert (params.type_k, params.type_v, params.flash_attn_type) == (0, 0, 0), "KV is float32 and is read as such"
        context = SimpleNamespace(model=model, params=params, kv=[[] for _ in range(params.n_seq_max)], logits=None, open=True)
        self.contexts.append(context)
        return context

    def llama_get_memory(self, context):
        return context

    def llama_set_n_threads(self, context, threads, batch_threads):
        context.params.n_threads = threads

    def llama_free(self, context):
        context.open = False

    def llama_decode(self, context, batch):
        assert 0 < batch.n_tokens <= context.params.n_batch
        self.decodes += 1
        chosen = []
        for i in range(batch.n_tokens):
            row = batch.seq_id[i][0]
            assert batch.n_seq_id[i] == 1
            assert batch.pos[i] == len(context.kv[row]), f"row {row} has {len(context.kv[row])} tokens, not {batch.pos[i]}"
            context.kv[row].append(batch.token[i])
            assert len(context.kv[row]) <= context.params.n_ctx // context.params.n_seq_max
            if batch.logits[i]:
                chosen.append(context.model(context.kv[row]))
        self.logit_rows += len(chosen)
        context.logits = np.ascontiguousarray(np.eye(VOCAB, dtype=np.float32)[chosen])
        return 0

    def llama_get_logits(self, context):
        return context.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, context, row, begin, end):
        assert 0 <= begin <= len(context.kv[row])
        assert end == -1
        del context.kv[row][begin:]
        return True


class FakeGenAi:
    """The part of openvino_genai that the worker uses.

    with_prompt  tokens that every row gives in the step that reads its prompt
    """

    def __init__(self, with_prompt=1):
        self.with_prompt, self.pipelines = with_prompt, []
        self.GenerationConfig = self.SchedulerConfig = SimpleNamespace

    def get_version(self):
        return "0-fake"

    def draft_model(self, path, device, **properties):
        return (path, device, properties)

    def ContinuousBatchingPipeline(self, path, scheduler, device, properties):
        self.pipelines.append(FakePipeline(self.with_prompt, scheduler, properties))
        return self.pipelines[-1]


class FakePipeline:
    """Every step gives two tokens to each row that has not all of its own, as a draft of which one token stands would."""

    def __init__(self, with_prompt, scheduler, properties):
        self.with_prompt, self.scheduler, self.properties = with_prompt, scheduler, properties
        self.rows, self.asked = [], []

    def add_request(self, number, ids, config):
        self.asked.append(config)
        self.rows.append(FakeRow(ids.tolist()[0], config.max_new_tokens))
        return self.rows[-1]

    def step(self):
        for row in self.rows:
            row.give(2 if row.given else self.with_prompt)

    def has_non_finished_requests(self):
        self.rows = [row for row in self.rows if len(row.given) < row.max_new_tokens]
        return bool(self.rows)

    def get_metrics(self):
        return SimpleNamespace(kv_cache_size_in_bytes=self.scheduler.num_kv_blocks * 32 * 100)


class FakeRow:
    def __init__(self, prompt, max_new_tokens):
        self.max_new_tokens = max_new_tokens
        self.given, self.unread, self._all = [], [], continuation(prompt, max_new_tokens)

    def give(self, count):
        new = self._all[len(self.given) : len(self.given) + count]
        self.given += new
        self.unread += new

    def can_read(self):
        return bool(self.unread)

    def read(self):
        new, self.unread = self.unread, []
        return {0: SimpleNamespace(generated_ids=new)}
