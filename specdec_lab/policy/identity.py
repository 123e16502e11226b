"""Whether a policy belongs to the machine, the target and the drafters that are loaded, and if not, what differs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..records import Identity


def mismatch(header: Mapping[str, Any], used: Iterable[str], identity: Identity) -> str | None:
    """Why a policy with this header and these drafters must not be used; None when it may."""
    reasons = []
    if header["base"] != identity.base_fingerprint:
        reasons.append(_base_words(header, identity))
    for kind in used:
        ours = header["drafters"][kind]
        if kind not in identity.drafters:
            reasons.append(f"it uses drafter {kind!r}, which is not loaded")
        elif ours != identity.drafter_fingerprint(kind):
            exact = header.get("exact", {}).get("drafters", {}).get(kind, {})
            changed = differences(exact, identity.drafters[kind])
            reasons.append(f"its drafter {kind!r} is another one: {changed or f'fingerprint {ours}'}")
    return "; ".join(reasons) or None


def _base_words(header: Mapping[str, Any], identity: Identity) -> str:
    exact = header.get("exact", {}).get("base")
    if exact and (changed := differences(exact, identity.base)):
        return f"it was made for another machine, target or build: {changed}"
    if header["device"] != identity.device:
        return f"it was made for device {header['device']}, this is {identity.device}"
    return f"its target or build is another one: fingerprint {header['base']}, here {identity.base_fingerprint}"


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """`field: theirs, here ours` for every field that differs."""
    names = [name for name in {**theirs, **ours} if _plain(theirs.get(name)) != _plain(ours.get(name))]
    return ", ".join(f"{name}: {theirs.get(name)!r}, here {ours.get(name)!r}" for name in names)


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples are lists, keys are texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
