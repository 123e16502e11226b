"""Which form a run takes here: a live widget, an HTML table that is renewed, or a line in a terminal.

`SPECDEC_DISPLAY=auto|live|static|text` forces a form. It never changes results.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

FORMS = ("auto", "live", "static", "text")
VARIABLE = "SPECDEC_DISPLAY"


@dataclass(frozen=True, slots=True)
class DisplayForm:
    """`live`, `static` or `text`, and why not a richer one (empty for `live`)."""

    kind: str
    reason: str


def display_form(environ: Mapping[str, str] | None = None) -> DisplayForm:
    """The form for this process, with its reason."""
    wanted = (os.environ if environ is None else environ).get(VARIABLE, "auto")
    if wanted not in FORMS:
        raise ValueError(f"{VARIABLE}={wanted!r} is none of {', '.join(FORMS)}; unset it for auto")
    if wanted != "auto":
        return DisplayForm(wanted, "" if wanted == "live" else f"{VARIABLE}={wanted}")
    if not is_notebook():
        return DisplayForm("text", "no notebook kernel in this process")
    reason = _why_not_live()
    return DisplayForm("static", reason) if reason else DisplayForm("live", "")


def is_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = running_shell()
    return shell is not None and hasattr(shell, "kernel")


def running_shell() -> Any:
    """The interactive shell, None outside of one. Where IPython was never imported there is none, so it is not imported."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def _why_not_live() -> str:
    if find_spec("anywidget") is None:
        return "anywidget is not installed: pip install anywidget"
    if ipykernel_version() == (7, 0):
        return "ipykernel 7.0 cannot send from threads: pip install -U ipykernel"
    return ""


@cache
def ipykernel_version() -> tuple[int, int]:
    """Major and minor version of the kernel; (0, 0) without one."""
    if find_spec("ipykernel") is None:
        return 0, 0
    major, minor, *_ = version("ipykernel").split(".")
    return int(major), int(minor)
