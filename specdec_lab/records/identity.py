"""What a measurement depends on, as one key: measurements of equal keys may be pooled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import SpecConfig


def fingerprint(exact: Mapping[str, Any]) -> str:
    """12 hex digits of the sha256 of the canonical JSON of `exact`."""
    text = json.dumps(exact, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a measurement depends on exactly: machine and target (base), and each drafter that is loaded.

    device   normalised name, `NVIDIA_H200` or `AMD_EPYC_2t`
    base     device, count, target config and weights hash, dtypes, runner, back end, threads, engine version
    drafters kind -> exact fields; holds "self" and "ngram" always, "model" when a draft is loaded
    warn     driver, torch patch, corpus hash: a difference makes a record stale, not foreign
    """

    device: str
    base: Mapping[str, Any]
    drafters: Mapping[str, Mapping[str, Any]]
    warn: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_fingerprint(self) -> str:
        """12 hex digits over the base fields."""
        return fingerprint(self.base)

    def drafter_fingerprint(self, kind: str) -> str:
        """12 hex digits over a drafter's fields; zeros for off. KeyError when that drafter is not loaded."""
        return "0" * 12 if kind == "off" else fingerprint(self.drafters[kind])

    def of(self, config: SpecConfig) -> str:
        """`base.drafter`, the key under which measurements of `config` may be pooled."""
        return f"{self.base_fingerprint}.{self.drafter_fingerprint(config.drafter)}"
