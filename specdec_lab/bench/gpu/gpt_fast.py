"""gpt-fast as it lies in a checkout that the user has: its model in our shapes, our weights under its names, its decoding.

It is no package: two modules, `model` and `generate`, that import each other by these names. They are loaded under them for
as long as the checkout is open. Nothing of gpt-fast is shipped here. Not known here: what is timed, and against whom.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...engine.models.runner import shape_of

SOURCE = "https://github.com/meta-pytorch/gpt-fast"
BOTH_RUN = "bc04265"  # the newest commit whose speculation runs: 61c193d, which added batches, broke it
WHAT_TO_DO = (
    f"gpt-fast is not a package: git clone {SOURCE}, git checkout {BOTH_RUN} in it (the newest commit whose speculation runs), "
    "then --gpt-fast PATH"
)
FILES = ("model", "generate")
UNUSED = "tokenizer"  # which `generate` imports for its command line, with packages that need not be here
GREEDY: Mapping[str, Any] = {"temperature": 1.0, "top_k": 1}
# What importing `generate` sets for the whole process, and what must be as before when the checkout is closed.
SETTINGS = (
    ("torch._inductor.config", "coordinate_descent_tuning"), ("torch._inductor.config", "fx_graph_cache"),
    ("torch._inductor.config", "triton.unique_kernel_names"), ("torch._functorch.config", "enable_autograd_cache"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Said:
    """What a decode gave: the new tokens, and how many rounds of its speculation they took (None: it did not speculate)."""

    tokens: list[int]
    rounds: int | None


@dataclass(frozen=True, slots=True)
class Checkout:
    """Its two modules, and what they are: commit and licence, for the row."""

    commit: str
    licence: str
    model: ModuleType
    generate: ModuleType

    @property
    def told(self) -> dict[str, str]:
        """For the row."""
        return {"commit": self.commit, "licence": self.licence}

    def transformer(self, config: Any, block: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, str]:
        """Its network in the shape of a transformers configuration, weights not set; and what of the shape it cannot say."""
        wanted = _arguments(config, block)
        known = {field.name for field in dataclasses.fields(self.model.ModelArgs)}
        with torch.device("meta"):
            made = self.model.Transformer(self.model.ModelArgs(**{k: v for k, v in wanted.items() if k in known}))
        lost = sorted(name for name, value in wanted.items() if name not in known and value is not None)
        return made.to(dtype).to_empty(device=device).eval(), f"without {', '.join(lost)}" if lost else ""

    def decode(self, target: Any, prompt: Tensor, count: int, draft: Any = None, k: int = 1) -> Said:
        """Continue one prompt [S] greedily by `count` tokens; with a draft, k of them are guessed per round."""
        extra = {"batch_size": 1} if "batch_size" in inspect.signature(self.generate.generate).parameters else {}
        made, told = self.generate.generate(
            target, prompt, count, interactive=False, draft_model=draft, speculate_k=k, **extra, **GREEDY
        )
        tokens = made.reshape(-1)[prompt.shape[0] :].tolist()
        return Said(tokens, sum(told["accept_counts"]) if draft is not None else None)

    @contextmanager
    def compiled(self, options: Mapping[str, Any]) -> Iterator[None]:
        """Its decoding step, and the forward by which it verifies, compiled as its own command line does."""
        usual = {name: getattr(self.generate, name) for name in ("decode_one_token", "model_forward")}
        try:
            for name, function in usual.items():
                setattr(self.generate, name, torch.compile(function, fullgraph=True, **options))
            yield
        finally:
            for name, function in usual.items():
                setattr(self.generate, name, function)


@contextmanager
def opened(path: Path) -> Iterator[Checkout]:
    """The checkout, until the block ends; FileNotFoundError where it is none, with what to do."""
    missing = [f"{name}.py" for name in FILES if not (path / f"{name}.py").is_file()]
    if missing:
        raise FileNotFoundError(f"{path} has no {' and no '.join(missing)}. {WHAT_TO_DO}")
    before = {name: sys.modules.get(name) for name in (*FILES, UNUSED)}
    settings = [(module, name, _setting(module, name)) for module, name in SETTINGS]
    sys_path = list(sys.path)
    try:
        stand_in: Any = ModuleType(UNUSED)
        stand_in.get_tokenizer = None
        sys.modules[UNUSED] = stand_in
        model, generate = (_load(name, path / f"{name}.py") for name in FILES)
        yield Checkout(_commit(path), _licence(path), model, generate)
    finally:
        sys.path[:] = sys_path
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for where, name, value in settings:
            _set(where, name, value)


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `generate` imports `model` by its name, and the compiler looks both up
    spec.loader.exec_module(module)
    return module


def _setting(module: str, name: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _set(module: str, name: str, value: Any) -> None:
    *parts, last = name.split(".")
    target: Any = importlib.import_module(module)
    for part in parts:
        target = getattr(target, part)
    setattr(target, last, value)


def _commit(path: Path) -> str:
    """Its commit, and whether files were changed since."""
    try:
        head = _git(path, "rev-parse", "--short=7", "HEAD")
        changed = _git(path, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return f"{head}, changed" if changed else head


def _git(path: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(path), *words], capture_output=True, text=True, check=True).stdout.strip()


def _licence(path: Path) -> str:
    """By the words of its own file."""
    file = path / "LICENSE"
    words = " ".join(file.read_text(errors="replace").split()) if file.is_file() else ""
    if "Redistribution and use in source and binary forms" in words:
        return "BSD-3-Clause" if "Neither the name" in words else "BSD-2-Clause"
    return "as its LICENSE says" if words else "no LICENSE beside it"


def why_not(config: Any) -> str | None:
    """None if gpt-fast has this shape, else what it lacks."""
    shape = shape_of(config)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in ("llama", "mistral") or getattr(config, "attention_bias", False):
        return f"gpt-fast has Llama's block without biases, not {config.model_type}'s"
    if shape.heads * shape.head_dim != shape.hidden:
        return f"gpt-fast takes heads that fill the hidden size, not {shape.heads} of {shape.head_dim} in {shape.hidden}"
    return None if rope in ("default", "llama3") else f"gpt-fast knows plain and Llama 3's rotary positions, not {rope}"


def _arguments(config: Any, block: int) -> dict[str, Any]:
    """Its names for what a transformers configuration says; `block`: positions that its tables hold."""
    if (reason := why_not(config)) is not None:
        raise ValueError(reason)
    shape, rope = shape_of(config), dict(config.rope_parameters)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "block_size": block, "vocab_size": shape.vocab, "n_layer": shape.layers, "n_head": shape.heads, "dim": shape.hidden,
        "intermediate_size": shape.intermediate, "n_local_heads": shape.kv_heads, "rope_base": rope["rope_theta"],
        "norm_eps": config.rms_norm_eps,
        "rope_scaling": {name: rope[name] for name in names} if rope.get("rope_type") == "llama3" else None,
    }  # fmt: skip


def weights_of(config: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their Hugging Face names -> by gpt-fast's, whose rotary pairs lie side by side, not half a head apart."""
    shape = shape_of(config)
    found = {
        "tok_embeddings.weight": weights["model.embed_tokens.weight"], "norm.weight": weights["model.norm.weight"],
        "output.weight": weights["model.embed_tokens.weight" if shape.tied else "lm_head.weight"],
    }  # fmt: skip
    for layer in range(shape.layers):
        ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
        q, k, v = (weights[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv")
        found |= {
            f"{theirs}attention.wqkv.weight": torch.cat([_side_by_side(q, shape.heads), _side_by_side(k, shape.kv_heads), v]),
            f"{theirs}attention.wo.weight": weights[f"{ours}self_attn.o_proj.weight"],
            f"{theirs}attention_norm.weight": weights[f"{ours}input_layernorm.weight"],
            f"{theirs}ffn_norm.weight": weights[f"{ours}post_attention_layernorm.weight"],
            f"{theirs}feed_forward.w1.weight": weights[f"{ours}mlp.gate_proj.weight"],
            f"{theirs}feed_forward.w3.weight": weights[f"{ours}mlp.up_proj.weight"],
            f"{theirs}feed_forward.w2.weight": weights[f"{ours}mlp.down_proj.weight"],
        }
    return found


def _side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows (j, j + D/2) of every head -> rows (2j, 2j + 1)."""
    rows, hidden = weight.shape
    return weight.view(heads, 2, rows // heads // 2, hidden).transpose(1, 2).reshape(rows, hidden)


def fill_with_noise(model: Any, seed: int) -> None:
    """Weights of no meaning, small enough that nothing overflows: for times."""
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(seed)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.02, generator=draw) if weight.dim() > 1 else weight.data.fill_(1.0)
