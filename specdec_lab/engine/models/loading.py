"""Load a target and its draft: the shipped pair, a folder, a hub name or a transformers model already in memory.

Only safetensors, or pickles read with `weights_only=True`. Not known here: the engine that will run the pair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fast_llama, random_weights, rotation
from .fast_llama import FastLlama, WeightsMismatch, check_tensors
from .hf import HFRunner
from .parallel import ParallelError, Placement, ShardedWeights, shard_config
from .runner import Runner, shape_of, weights_fingerprint

DEMO = Path(__file__).parents[2] / "demo"
DEMO_NAMES = {DEMO / "target": "demo-2M", DEMO / "draft": "demo-0.4M", DEMO / "needle": "needle"}


class ModelNotFound(ValueError):
    """No model at that path or name; the message says what was looked for."""


class TokenizerMismatch(ValueError):
    """Target and draft do not share one vocabulary, so drafted ids would mean other text."""


@dataclass(frozen=True, slots=True)
class ModelPair:
    """A target, maybe a draft, and the tokenizer they share (None for a model given without one)."""

    name: str
    target: Runner
    draft: Runner | None
    tokenizer: Any | None
    eos_ids: tuple[int, ...]

    def __repr__(self) -> str:
        draft = self.draft.name if self.draft else "none"
        target = f"{self.target.name!r} [{self.target.kind}]"
        return f"ModelPair({self.name!r}, target={target}, draft={draft!r}, {self.target.dtype})"


def load(
    model: Any = "demo", draft: Any = None, *, device: str = "auto", dtype: str | torch.dtype = "auto", runner: str = "auto",
    kv_dtype: str | torch.dtype = "auto", draft_positions: str = "absolute", seed: int = 0, tensor_parallel: int = 1,
    shard: str | None = None,
) -> ModelPair:
    """The pair to speculate with.

    model, draft  "demo" (the shipped pair), "needle" (the retrieval model, shipped without a draft), a folder, a hub name, or a
                  transformers causal LM; "random:NAME" has the sizes of a published model and random weights, for timing:
                  llama-3.1-8b, llama-2-7b-32k, qwen3-1.7b, draft-1b, or (to try commands) tiny, tiny-draft and tiny-square
    dtype         auto: float32 on a CPU, the model's own elsewhere
    kv_dtype      of the KV cache; auto: as dtype
    runner        auto: FastLlama where it can (`fast`), else HFRunner (`hf`)
    draft_positions  absolute, or cache for a draft trained on shorter texts than these: through a window it then sees what it
                  would see in a text of sink + recent tokens
    seed          of random weights
    tensor_parallel  ranks among which the target's heads, MLP and vocabulary are cut, one process each (torchrun); each
                  holds the whole draft
    shard         "1/8": the first of eight shards alone, its sums over ranks left out; for timing
    raises        ModelNotFound, WeightsMismatch, TokenizerMismatch, ValueError for a runner or a draft that cannot
    """
    if runner not in ("auto", "fast", "hf"):
        raise ValueError(f"runner must be auto, fast or hf, got {runner!r}")
    if draft_positions not in rotation.MODES:
        raise ValueError(f"draft_positions must be {' or '.join(rotation.MODES)}, got {draft_positions!r}")
    place, cached = _device(device), None if kv_dtype == "auto" else _named_dtype(kv_dtype)
    if cached is not None and not cached.is_floating_point:
        raise ValueError(f"kv_dtype must be a floating type such as float32 or bfloat16, got {kv_dtype!r}")
    if isinstance(model, str) and model == "demo":
        if not (DEMO / "target" / "model.safetensors").exists():
            raise ModelNotFound("the shipped pair is missing from this installation; reinstall specdec_lab, or train it with "
                                "`python -m specdec_lab.demo.train_demo target` and then `draft`")
        name, model, draft = "demo", DEMO / "target", DEMO / "draft" if draft is None else draft
    elif isinstance(model, str) and model == "needle":
        if not (DEMO / "needle" / "model.safetensors").exists():
            raise ModelNotFound("the needle model is missing from this installation; reinstall specdec_lab, or train it with "
                                "`python -m specdec_lab.demo.train_needle`")
        name, model = "needle", DEMO / "needle"
    else:
        name = model if isinstance(model, str) else Path(model).name if isinstance(model, Path) else type(model).__name__
    placement = Placement.of(tensor_parallel, shard, place)
    target, tokenizer, eos_ids = _load_one(model, place, dtype, runner, cached, seed, placement)
    moves_sinks = draft_positions == "cache"
    if draft is None:
        if moves_sinks:
            raise ValueError("draft_positions='cache' is about a draft model, and none is loaded. Load one with draft=...")
        return ModelPair(name, target, None, tokenizer, eos_ids)
    helper, draft_tokenizer, _ = _load_one(draft, place, dtype, runner, cached, seed + 1, moves_sinks=moves_sinks)
    _check_vocabularies(target, tokenizer, helper, draft_tokenizer)
    return ModelPair(name, target, helper, tokenizer, eos_ids)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not one that torch knows ({error}). Use auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but torch sees no CUDA device here. Use device='cpu' or 'auto'.")
    return device


def _load_one(
    model: Any, device: torch.device, dtype: str | torch.dtype, runner: str, kv_dtype: torch.dtype | None,
    seed: int, placement: Placement | None = None, moves_sinks: bool = False,
) -> tuple[Runner, Any | None, tuple[int, ...]]:
    """A runner, its tokenizer if it has one, and its end-of-text ids."""
    if isinstance(model, str) and model.startswith(random_weights.PREFIX):
        if runner == "hf":
            raise ValueError(f"{model} runs on our own runner only. Use runner='auto' or 'fast'.")
        config = random_weights.config_of(model.removeprefix(random_weights.PREFIX))
        chosen = _dtype(dtype, config, device)
        made = random_weights.make(model, config, seed=seed, device=device, dtype=chosen, kv_dtype=kv_dtype,
                                   placement=placement, moves_sinks=moves_sinks)
        return made, None, _eos(config)
    if not isinstance(model, str | Path):
        return _from_memory(model, device, dtype, runner, kv_dtype, placement, moves_sinks)
    where = str(model)
    config = _config_at(where)
    chosen = _dtype(dtype, config, device)
    reason = fast_llama.why_not(config)
    if runner == "fast" and reason:
        raise ValueError(f"{reason}. Use runner='hf'.")
    name = DEMO_NAMES.get(Path(where)) or (Path(where).name if Path(where).exists() else where)
    _check_can_cut(placement, runner, reason)
    loaded: Runner
    if runner == "hf" or reason:
        loaded = HFRunner(_hf_model(where, chosen, device), name=name, kv_dtype=kv_dtype, moves_sinks=moves_sinks)
    else:
        loaded = _fast(config, read_weights(where), name, device, chosen, kv_dtype, placement, moves_sinks)
    return loaded, _tokenizer_at(where), _eos(config)


def _config_at(where: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(where).exists() else "path or hub name"
        raise ModelNotFound(
            f"no model at the {kind} {where!r} ({str(error).strip().splitlines()[0]}). Give a folder with config.json and "
            "safetensors, a hub name, or 'demo'."
        ) from None


def _tokenizer_at(where: str) -> Any | None:
    """A model without one takes token lists as prompts."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError):
        return None
    tokenizer.model_max_length = 1 << 40  # the engine checks lengths itself, and says more
    return tokenizer


def _from_memory(
    model: Any, device: torch.device, dtype: str | torch.dtype, runner: str, kv_dtype: torch.dtype | None,
    placement: Placement | None, moves_sinks: bool,
) -> tuple[Runner, None, tuple[int, ...]]:
    if not hasattr(model, "config") or not hasattr(model, "state_dict"):
        raise ModelNotFound(
            f"a model must be 'demo', a folder, a hub name or a transformers causal LM, got {type(model).__name__}"
        )
    reason = fast_llama.why_not(model.config)
    if runner == "fast" and reason:
        raise ValueError(f"{reason}. Use runner='hf'.")
    name = getattr(model, "name_or_path", "") or type(model).__name__
    chosen = next(model.parameters()).dtype if dtype == "auto" else _dtype(dtype, model.config, device)
    _check_can_cut(placement, runner, reason)
    loaded: Runner
    if runner == "hf" or reason:
        loaded = HFRunner(model.to(device, chosen), name=name, kv_dtype=kv_dtype, moves_sinks=moves_sinks)
    else:
        loaded = _fast(model.config, model.state_dict(), name, device, chosen, kv_dtype, placement, moves_sinks)
    return loaded, None, _eos(model.config)


def _check_can_cut(placement: Placement | None, runner: str, reason: str | None) -> None:
    if placement is not None and (runner == "hf" or reason):
        raise ParallelError(f"only our own runner cuts a model among ranks: {reason or 'runner hf was asked for'}")


def _fast(
    config: Any, weights: Mapping[str, Tensor], name: str, device: torch.device, dtype: torch.dtype,
    kv_dtype: torch.dtype | None, placement: Placement | None, moves_sinks: bool,
) -> FastLlama:
    """The whole model, or the shard of this rank."""
    if placement is None:
        return FastLlama(config, weights, name=name, device=device, dtype=dtype, kv_dtype=kv_dtype, moves_sinks=moves_sinks)
    shard = placement.shard
    check_tensors(config, weights)
    cut = shard_config(config, shape_of(config), shard.ranks)
    made = f"{weights_fingerprint(config.to_diff_dict(), weights.items())}/{shard.ranks}"
    return FastLlama(
        cut, ShardedWeights(weights, shard), name=name, device=device, dtype=dtype, kv_dtype=kv_dtype, fingerprint=made,
        labels=placement.labels, shard=shard, group=placement.group,
    )


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not one that torch knows; use auto, float32 or bfloat16")
    return found


def _dtype(dtype: str | torch.dtype, config: Any, device: torch.device) -> torch.dtype:
    if dtype != "auto":
        return _named_dtype(dtype)
    stored = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" or not isinstance(stored, torch.dtype) else stored


def _hf_model(where: str, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, output_loading_info=True)
    model, info = loaded
    problems = [f"{what} {n}" for what in ("missing", "unexpected") for n in sorted(info[f"{what}_keys"])]
    if problems:  # transformers would fill the missing ones with random numbers
        raise WeightsMismatch(f"the weights at {where!r} do not fit their configuration: {'; '.join(problems[:6])}")
    return model.to(device)


def read_weights(where: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder or hub name: safetensors, else a pickle read with weights_only=True."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(where)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(where, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(f.name for f in folder.glob("*.safetensors"))
    if files:
        weights: dict[str, Tensor] = {}
        for file in files:
            try:
                weights |= load_file(folder / file)
            except (SafetensorError, OSError) as error:
                raise WeightsMismatch(
                    f"{file} of {where!r} cannot be read ({error}); it is damaged or incomplete, get it again"
                ) from None
        return weights
    pickled = folder / "pytorch_model.bin"
    if pickled.exists():
        return dict(torch.load(pickled, map_location="cpu", weights_only=True))
    raise ModelNotFound(f"{where!r} has a configuration but no safetensors (nor pytorch_model.bin); its weights are missing")


def _eos(config: Any) -> tuple[int, ...]:
    eos = getattr(config, "eos_token_id", None)
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def _check_vocabularies(target: Runner, tokenizer: Any, draft: Runner, draft_tokenizer: Any) -> None:
    if target.shape.vocab != draft.shape.vocab:
        raise TokenizerMismatch(
            f"target {target.name!r} has {target.shape.vocab} token ids, draft {draft.name!r} has {draft.shape.vocab}; a draft "
            "must share the target's vocabulary"
        )
    if tokenizer is None or draft_tokenizer is None:
        return
    mine, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    if mine != theirs:
        differing = sorted(t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t))
        raise TokenizerMismatch(
            f"the tokenizers of {target.name!r} and {draft.name!r} differ in {len(differing)} entries, for example "
            f"{differing[0]!r}: {mine.get(differing[0])} against {theirs.get(differing[0])}. "
            "Use a draft trained with the target's tokenizer."
        )
