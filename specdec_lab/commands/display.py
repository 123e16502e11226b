"""How a notebook shows the objects of other rooms that verbs return: as the same text that a shell prints, and as a table.

Registered with IPython by type name, so that none of these rooms is loaded for it.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..export import Exported
    from ..policy import Policy

PLAIN, HTML = "text/plain", "text/html"
CELL = "padding:4px;text-align:left;border-bottom:1px solid #8A8A8A"


def policy_text(policy: Policy) -> str:
    """Headline, origin and table."""
    from .policies import policy_words

    return policy_words(policy)


def policy_html(policy: Policy) -> str:
    """The same with inline styles only, which an untrusted notebook keeps."""
    from .policies import row_cells

    head = ("cell", "state", "config", "speed-up", "95% interval", "tokens/s", "plain tokens/s")
    rows = [_row("th", head), *(_row("td", row_cells(row)) for row in policy.table)]
    return f"<p><b>{html.escape(policy.headline())}</b></p><table>{''.join(rows)}</table>"


def _row(tag: str, texts: tuple[str, ...]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{CELL}">{html.escape(text)}</{tag}>' for text in texts) + "</tr>"


def exported_text(exported: Exported) -> str:
    """Files, command, and what was lost."""
    from .policies import exported_words

    return exported_words(exported)


SHOWN: Mapping[tuple[str, str, str], Callable[[Any], str]] = {
    (PLAIN, "specdec_lab.policy.table", "Policy"): policy_text,
    (HTML, "specdec_lab.policy.table", "Policy"): policy_html,
    (PLAIN, "specdec_lab.export.column", "Exported"): exported_text,
}


def register(shell: Any) -> None:
    """Teach this shell to show them."""
    for (mime, module, name), show in SHOWN.items():
        formatter = shell.display_formatter.formatters[mime]
        formatter.for_type_by_name(module, name, _printed(show) if mime == PLAIN else show)


def unregister(shell: Any) -> None:
    """Take it back."""
    for mime, module, name in SHOWN:
        formatter = shell.display_formatter.formatters[mime]
        formatter.pop(f"{module}.{name}", None)


def _printed(show: Callable[[Any], str]) -> Callable[[Any, Any, bool], None]:
    """As IPython's pretty printer calls it."""

    def write(value: Any, printer: Any, cycle: bool) -> None:
        printer.text(show(value))

    return write
