"""The browser side of the live view as a widget: our own script and style, one trait, one message per tick.

Imports anywidget, so it is imported only when a widget is shown. The saved notebook never needs this widget's state.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

import anywidget
import traitlets

from .feed import Packet
from .forms import ipykernel_version

# One script for the browser, in pieces for the reader: no piece imports another, the last one exports.
SCRIPTS = ("format.js", "store.js", "strips.js", "bars.js", "words.js", "live.js")
COMMANDS = ("stop", "pause", "resume")


def asset(name: str) -> str:
    """A text file that is shipped beside this module."""
    return resources.files(__package__).joinpath("web", name).read_text(encoding="utf-8")


def script() -> str:
    """The whole front end, without imports and without addresses."""
    return "\n".join(asset(name) for name in SCRIPTS)


class LiveWidget(anywidget.AnyWidget):
    """Shows packets. `snapshot` is the last keyframe: a page that is reloaded, or a second view, starts from it."""

    _esm = script()
    _css = asset("live.css")
    snapshot = traitlets.Bytes(b"").tag(sync=True)

    def on_command(self, obey: Callable[[str], None]) -> None:
        """Call `obey` with the word of a pressed button."""

        def heard(_: Any, content: Any, __: Any) -> None:
            if isinstance(content, dict) and content.get("do") in COMMANDS:
                obey(content["do"])

        self.on_msg(heard)

    def publish(self, packet: Packet) -> None:
        """Send a delta as a message, a keyframe as the new snapshot: one comm, one order."""
        if packet.head["k"] == "k":
            self.snapshot = packet.to_bytes()
        else:
            self.send(packet.head, buffers=[packet.rows])
        self._let_replies_reach_a_busy_kernel()

    def _let_replies_reach_a_busy_kernel(self) -> None:
        # ipykernel 7.4 sends a button's message to the shell of the last publisher. After a send from a thread that is
        # the main shell, which may be busy for minutes; without this attribute it honours the front end's own subshell.
        if self.comm is not None and ipykernel_version() == (7, 4):
            self.comm.__dict__.pop("_reply_subshell_id", None)
