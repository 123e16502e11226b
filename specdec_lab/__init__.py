r"""specdec_lab: see where speculative decoding pays, by batch size and sequence length, and deploy the answer.

    import specdec_lab as sd
    engine = sd.Engine(sd.load("demo"))
    out = engine.generate(["import os\n"], config="self:4+60/chain3", max_new_tokens=64)

Names are resolved when first used, so that importing the package loads neither torch nor plotly nor optuna.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Cell": "records", "KvView": "records", "TreeShape": "records", "SpecConfig": "records", "StepRecord": "records",
    "RunHeader": "records", "Run": "records", "Summary": "records", "ParseError": "records", "UnsupportedConfig": "records",
    "Stream": "stream", "record": "stream", "Workload": "workload", "Policy": "policy", "Engine": "engine.loop",
    "load": "engine.models.loading", "ModelPair": "engine.models.loading", "summarize": "summary", "compare": "summary",
    "replay": "trace", "tune": "tune",
}  # fmt: skip

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from .engine.loop import Engine as Engine
    from .engine.models.loading import ModelPair as ModelPair
    from .engine.models.loading import load as load
    from .policy import Policy as Policy
    from .records import Cell as Cell
    from .records import KvView as KvView
    from .records import ParseError as ParseError
    from .records import Run as Run
    from .records import RunHeader as RunHeader
    from .records import SpecConfig as SpecConfig
    from .records import StepRecord as StepRecord
    from .records import Summary as Summary
    from .records import TreeShape as TreeShape
    from .records import UnsupportedConfig as UnsupportedConfig
    from .stream import Stream as Stream
    from .stream import record as record
    from .summary import compare as compare
    from .summary import summarize as summarize
    from .trace import replay as replay
    from .workload import Workload as Workload


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specdec_lab' has no attribute {name!r}; public names: {', '.join(sorted(_HOMES))}")
    if name == "tune":
        return import_module(".tune", __name__)
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


def load_ipython_extension(shell: Any) -> None:
    """Called by `%load_ext specdec_lab`: registers %specdec and %%specdec."""
    from .magics import load

    load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """Called by `%unload_ext` and `%reload_ext`: stops runs and removes what load added."""
    from .magics import unload

    unload(shell)
