"""What a row of the bench folder depends on wherever it was measured, and the words for it. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__, machine


def provenance() -> dict[str, Any]:
    """created, machine, versions and commit, as a row of the bench folder holds them."""
    return {
        "created": machine.now(), "machine": machine.facts(), "versions": {"specdec_lab": __version__, **machine.versions()},
        "commit": machine.commit(),
    }  # fmt: skip


def made_with(header: Mapping[str, Any]) -> str:
    """torch, commit and day in one line; a commit whose files were changed says so."""
    return f"torch {header['versions'].get('torch')}, commit {machine.short(header['commit'])}, {header['created'][:10]}"
