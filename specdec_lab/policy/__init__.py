"""The policy: a table measured once, asked at every round. Needs the standard library only, so a server can embed it.

Does not know torch, the engine, the tuner or the view.
"""

from __future__ import annotations

from .chooser import Chooser, PolicyMismatch
from .lookup import Choice, Guard, Hysteresis, Outside, Rules
from .reading import PolicyError
from .table import SCHEMA, Estimate, Policy, Row, canonical, policy_schema

__all__ = [
    "SCHEMA", "Choice", "Chooser", "Estimate", "Guard", "Hysteresis", "Outside", "Policy", "PolicyError", "PolicyMismatch",
    "Row", "Rules", "canonical", "policy_schema",
]  # fmt: skip
