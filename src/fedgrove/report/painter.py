"""Figures as the parts of a page: inline SVG for a page and for a phone, and a PNG in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from fedgrove.ground.errors import RunError
from fedgrove.ground.plain import Plain
from fedgrove.report import sections, style
from fedgrove.report.style import Drawing


@dataclass(frozen=True)
class Picture:
    """Markup that is safe to print as it is. ``narrow`` is for phones; without it ``wide`` scrolls
    sideways there.
    """

    wide: str
    narrow: str = ""


class Painter:
    """Draws figures for a page and into ``folder``, where there is one; one that fails becomes a
    line in ``failed``.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.failed: list[str] = []

    def paint(
        self,
        name: str,
        label: str,
        figure: Drawing | Figure,
    ) -> Picture | None:
        """``label``: what a screen reader says of it."""
        try:
            with style.applied():
                return self._painted(name, label, figure)
        except RunError:  # no space, no permission: the page cannot be written either
            raise
        except Exception as error:  # a figure that fails must not take the report with it
            self.failed.append(sections.failure(f"The figure “{label}”", error))
            return None

    def shown(self, name: str, section: sections.Section) -> Plain:
        """The section as the pages take it, with its figure painted."""
        picture = None
        if section.figure is not None:
            picture = self.paint(name, section.title, section.figure)
        return {"section": section, "picture": picture}

    def _painted(
        self,
        name: str,
        label: str,
        figure: Drawing | Figure,
    ) -> Picture:
        if isinstance(figure, Figure):
            drawing = None
        else:
            drawing = figure
        if isinstance(figure, Figure):
            wide = figure
        else:
            wide = figure(style.WIDE)
        if self.folder is not None:
            style.png(wide, self.folder / f"{name}.png")
            # Laid out once is enough: that is most of the time of a figure.
            wide.set_layout_engine("none")
        page = style.svg(wide, name, label)
        if drawing is None:
            return Picture(page)
        return Picture(page, style.svg(drawing(style.NARROW), f"{name}-narrow", label))
