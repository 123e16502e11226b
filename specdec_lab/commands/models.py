"""`load`: which pair is in use, in facts."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from .lab import Lab
from .outcome import Outcome

if TYPE_CHECKING:
    from ..engine.loop import Engine
    from ..engine.models.runner import Runner


def load(lab: Lab, args: Namespace) -> Outcome:
    """Load a pair and make its engine the one in use."""
    engine = lab.load(args)
    return Outcome(engine.pair, words(engine), facts(engine))


def facts(engine: Engine) -> dict[str, Any]:
    """The pair and how it runs, as plain data."""
    pair, identity = engine.pair, engine.identity()
    return {
        "name": pair.name,
        "target": _model(pair.target),
        "draft": _model(pair.draft) if pair.draft else None,
        "has_tokenizer": pair.tokenizer is not None,
        "backend": engine.backend.name,
        "rounds": engine.where,
        "refused": engine.refused,
        "device": identity.device,
        "drafters": ["off", *identity.drafters],
        "base_fingerprint": identity.base_fingerprint,
    }


def words(engine: Engine) -> str:
    """The same as a few lines."""
    data = facts(engine)
    lines = [f"{data['name']} on {data['device']}, attention by {data['backend']}, rounds: {data['rounds']}"]
    lines += [f"  {role}: {_line(data[role])}" for role in ("target", "draft") if data[role]]
    lines += [] if data["has_tokenizer"] else ["  tokenizer: none; prompts must be lists of token ids, given in Python"]
    lines += [] if data["draft"] else ["  draft: none; self and ngram draft without one"]
    lines += [f"  {name} passed over: {reason}" for name, reason in data["refused"].items()]
    return "\n".join([*lines, f"  drafters: {', '.join(data['drafters'])}"])


def _model(model: Runner) -> dict[str, Any]:
    from ..engine.models.runner import position_mode

    return {
        "name": model.name, "runner": model.kind, "dtype": str(model.dtype).removeprefix("torch."),
        "kv_dtype": str(model.kv_dtype).removeprefix("torch."),
        "parameters": model.shape.params, "weight_bytes": model.shape.weight_bytes(model.dtype.itemsize),
        "kv_bytes_per_token": model.shape.kv_bytes_per_token(model.kv_dtype.itemsize), "max_length": model.max_length,
        "fingerprint": model.fingerprint, "position_mode": position_mode(model),
    }  # fmt: skip


def _line(model: dict[str, Any]) -> str:
    return (
        f"{model['name']}, {model['parameters']:,} parameters, {model['dtype']}, {model['weight_bytes'] / 1e6:.1f} MB of "
        f"weights, {model['kv_bytes_per_token']:,} bytes of {model['kv_dtype']} KV per token, {model['max_length']:,} "
        f"positions{' of the cache' if model['position_mode'] == 'cache' else ''}, runner {model['runner']}"
    )
