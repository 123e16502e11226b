"""A scaling measurement to look at: in words, as figures, as SVG files, saved and read back.

Not known here: who asked for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...view.panels import Picture, picture_figure
from ...view.panels_svg import picture_svg
from ...view.svg import data_uri
from . import words
from .analysis import Analysis, analyse
from .pictures import pictures
from .samples import Scaling

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """What a notebook gets. `str()` is the tables; a notebook shows the pictures above them."""

    scaling: Scaling
    analysis: Analysis = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "analysis", analyse(self.scaling))

    def __str__(self) -> str:
        return words.text(self.analysis)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        images = "".join(f'<p><img src="{data_uri(picture_svg(p))}" alt="{escape(p.title)}"></p>' for p in self.pictures)
        return f"{images}<pre>{escape(str(self))}</pre>"

    @property
    def markdown(self) -> str:
        """The tables for a README."""
        return words.markdown(self.analysis)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures as plain data."""
        return pictures(self.analysis)

    def figures(self, *, dark: bool = False) -> tuple[go.Figure, ...]:
        """The pictures as plotly figures."""
        return tuple(picture_figure(picture, dark=dark) for picture in self.pictures)

    def write_svgs(self, folder: Path) -> tuple[Path, ...]:
        """One file per picture."""
        paths = []
        for picture in self.pictures:
            path = folder / f"scaling_{picture.name}.svg"
            path.write_text(picture_svg(picture), encoding="utf-8")
            paths.append(path)
        return tuple(paths)

    def to_dict(self) -> dict[str, Any]:
        """The saved row: measurements only, all else follows from them."""
        return self.scaling.to_dict()


def read_last(path: Path) -> Scaling:
    """The newest scaling row of a file; ValueError when a line is damaged or there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; give the scaling.jsonl that --save appends to") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
    if not rows:
        raise ValueError(f"{path} holds no row; measure one with: specdec-lab bench scaling --save")
    last = rows[-1]
    if not isinstance(last, dict):
        raise ValueError(f"{path}: its last line is no scaling row but a {type(last).__name__}")
    return Scaling.from_dict(last)
