"""`policy trees`: how large a tree pays at which batch and length, and why, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.tables import aligned
from .files import writable_file
from .outcome import Outcome

if TYPE_CHECKING:
    from ..policy import Policy
    from ..view.tree_sizes import TreeSize

ENDINGS = (".svg", ".html")


class TreeSizes:
    """The sizes of a policy's trees; a notebook draws them, `str()` is the table."""

    def __init__(self, found: Policy) -> None:
        from ..view.tree_sizes import sizes_picture, tree_sizes

        header = found.header
        self.where = f"{header['target']}, {header['workload']}, {header['device']}"
        self.sizes: tuple[TreeSize, ...] = tree_sizes([row.to_dict() for row in found.table])
        self.picture = sizes_picture(self.sizes, self.where)

    def __str__(self) -> str:
        from ..view.tree_sizes import sizes_table

        if not self.sizes:
            return "no cell of this policy was decided, and none was probed: nothing to draw. `tune` with more budget"
        return "\n".join([self.where, "", *aligned(sizes_table(self.sizes))])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        from ..view.figures import figure_bundle
        from ..view.panels import picture_figure

        return figure_bundle(picture_figure(self.picture), str(self)) if self.sizes else {"text/plain": str(self)}

    def write(self, path: Path) -> Path:
        """As SVG, or as an HTML page that fetches nothing, by the name's ending."""
        from ..view.panels import picture_figure
        from ..view.panels_svg import picture_svg

        if path.suffix == ".svg":
            path.write_text(picture_svg(self.picture), encoding="utf-8")
        else:
            path.write_text(picture_figure(self.picture).to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
        return path

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain JSON data."""
        return [
            {"cell": str(s.cell), "kind": s.kind, "nodes": s.nodes, "levels": s.levels, "config": s.config, "how": s.how,
             "speedup": s.speedup, "rule": s.rule}
            for s in self.sizes
        ]  # fmt: skip


def outcome(found: Policy, out: str | None) -> Outcome:
    """The table, and where it was asked for the picture in a file."""
    path = writable_file(out, *ENDINGS) if out else None
    report = TreeSizes(found)
    written = [f"written: {report.write(path)}"] if path is not None and report.sizes else []
    return Outcome(report, "\n".join([str(report), *written]), {"trees": report.to_dict(), "written": out if written else None})
