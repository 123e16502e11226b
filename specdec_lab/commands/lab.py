"""What the verbs of one shell command, or of one notebook, share: the engine in use, the policy in use, where words go."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from .mistakes import UserMistake, asked

if TYPE_CHECKING:
    from ..engine.loop import Engine
    from ..engine.models.loading import ModelPair
    from ..policy import Policy

PLACEMENT = ("device", "dtype", "kv_dtype", "runner", "draft_positions", "tensor_parallel", "shard")
MEASURING = ("run", "profile", "tune")  # in the background; what else is measured meanwhile would disturb and be disturbed


def is_first_rank() -> bool:
    """Whether this process speaks and writes files: of those that torchrun started, one does."""
    return os.environ.get("RANK", "0") == "0"


class Background(Protocol):
    """A run or a tuning that goes on while the notebook is idle."""

    name: str

    @property
    def is_alive(self) -> bool:
        """Whether it still works."""

    def headline(self) -> str:
        """One line on how it stands."""

    def stop(self) -> None:
        """End it at the next boundary."""

    def close(self) -> Any:
        """Stop, wait a little, and take its display away."""


class Lab:
    """load  gives a ModelPair; injected in tests

    variables  the notebook's names, where `load --as NAME` puts the engine; None in a shell
    source     the model and the draft that the engine in use was loaded from, as the user named them
    placement  how and where it was loaded, likewise; backend_name: the back end asked for
    background what was started in this notebook, by verb
    """

    def __init__(
        self, load: Callable[..., ModelPair] | None = None, *, variables: dict[str, Any] | None = None,
        out: TextIO | None = None, err: TextIO | None = None,
    ) -> None:
        self._load = load or _load
        self.variables = variables
        # a notebook paints the error stream red, which progress does not deserve
        self.out, self.err = out or sys.stdout, err or (sys.stderr if variables is None else sys.stdout)
        self.engine: Engine | None = None
        self.source: tuple[str, str | None] = ("demo", None)
        self.placement: dict[str, str] = {}
        self.backend_name = "auto"
        self.policy: Policy | None = None
        self.background: dict[str, Background] = {}

    @property
    def is_notebook(self) -> bool:
        """Whether objects are wanted rather than text."""
        return self.variables is not None

    def engine_for(self, args: Namespace) -> Engine:
        """The engine in use if the arguments name no other, else a new one, which is then in use."""
        names = ("model", "draft", "backend", "forced_acceptance", *PLACEMENT)
        wanted: dict[str, Any] = {name: value for name in names if (value := getattr(args, name, None))}
        if (shape := getattr(args, "random_weights", None)) is not None:
            if "model" in wanted:
                raise UserMistake(f"--random-weights {shape} is a model already; leave {wanted['model']} out")
            wanted["model"] = f"random:{shape}"
        if wanted.get("tensor_parallel", 1) > 1 and args.verb != "run":
            raise UserMistake(f"{args.verb} ends runs by the clock, which differs between ranks; --tensor-parallel is for run")
        if self.engine is None or wanted:
            self.engine = self._make(wanted)
        return self.engine

    def load(self, args: Namespace) -> Engine:
        """A new engine, in use from now on, and under the name that `--as` gives."""
        name = args.name
        if name is not None and not name.isidentifier():
            raise UserMistake(f"--as needs a variable name, got {name!r}")
        if name is not None and self.variables is None:
            raise UserMistake("--as keeps an engine in a notebook; a shell command ends with its engine")
        self.engine = None
        engine = self.engine_for(args)
        if name is not None and self.variables is not None:
            self.variables[name] = engine
        return engine

    def _make(self, wanted: dict[str, Any]) -> Engine:
        with asked():
            from ..engine.loop import Engine

            self.placement = {name: wanted[name] for name in PLACEMENT if name in wanted}
            self.backend_name = wanted.get("backend", "auto")
            self.source = wanted.get("model", "demo"), wanted.get("draft")
            pair = self._load(*self.source, **self.placement)
            return Engine(pair, self.backend_name, forced=wanted.get("forced_acceptance"))

    def check_idle(self, name: str) -> None:
        """Refuse to measure while another verb measures in the background; the same verb replaces its earlier run."""
        for other in MEASURING:
            running = self.background.get(other)
            if other != name and running is not None and running.is_alive:
                raise UserMistake(
                    f"{other} is still running and would disturb this measurement ({running.headline()}). Wait for it, or "
                    f"%specdec stop {other}"
                )


def _load(*arguments: Any, **options: Any) -> ModelPair:
    from ..engine.models.loading import load

    return load(*arguments, **options)
