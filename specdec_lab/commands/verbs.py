"""From parsed arguments to the handler of their verb, whose module is loaded only then."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from typing import TYPE_CHECKING

from .lab import Lab
from .outcome import Outcome, StreamJob

if TYPE_CHECKING:
    from .tuning import TuneJob


def handle(lab: Lab, args: Namespace) -> Outcome | StreamJob | TuneJob:
    """What the verb gives at once, or the job that it asks for."""
    module, _, function = args.handler.partition(":")
    given: Outcome | StreamJob | TuneJob = getattr(import_module(f".{module}", __package__), function)(lab, args)
    return given
