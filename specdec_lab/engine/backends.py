"""The list of attention back ends, and the choice among them.

`pick` never falls back in silence: it returns the winner together with why the others were passed over.
"""

from __future__ import annotations

from .attention import AttentionBackend, Need, ReferenceBackend, SdpaBackend
from .cpu_backend import CpuBackend
from .flash_backend import FlashBackend
from .triton_backend import TritonBackend


class BackendUnavailable(RuntimeError):
    """A back end asked for by name cannot do what is needed; the message says why and what to use instead."""


BACKENDS: dict[str, AttentionBackend] = {
    "reference": ReferenceBackend(), "sdpa": SdpaBackend(), "cpu": CpuBackend(), "triton": TritonBackend(),
    "flash_attn": FlashBackend(),
}  # fmt: skip
AUTOMATIC = {"cpu": ("cpu", "sdpa"), "cuda": ("triton", "sdpa")}  # in order of preference; the others only by name


def pick(name: str, need: Need) -> tuple[AttentionBackend, dict[str, str]]:
    """The back end for `need`, and why each preferred one before it was passed over.

    A back end asked for by name that cannot raises BackendUnavailable.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise BackendUnavailable(f"there is no back end {name!r}; known: auto, {', '.join(BACKENDS)}")
        reason = BACKENDS[name].why_not(need)
        if reason is not None:
            raise BackendUnavailable(f"{reason}. Use backend='auto'.")
        return BACKENDS[name], {}
    refused: dict[str, str] = {}
    for candidate in AUTOMATIC.get(need.device, ("sdpa",)):
        reason = BACKENDS[candidate].why_not(need)
        if reason is None:
            return BACKENDS[candidate], refused
        refused[candidate] = reason
    raise BackendUnavailable("no attention back end can run this: " + "; ".join(refused.values()))
