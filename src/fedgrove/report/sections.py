"""Plug-in sections: a system that leaves an artefact in the run directory adds its own pictures to
the report.

Put a module into ``fedgrove/report/pictures`` with a function for the artefact's file name; nothing
else changes::

    @section("tree.json")
    def tree(run_dir: Path) -> list[Section]:
        ...
        return [Section("Who shares with whom", "Read the trunk from the left ...", draw)]

A picture that sets runs side by side takes what they left with ``@section("tree.json",
beside=True)``: its function gets the directories of the other runs as a second argument, those that
have the artefact alone.

A section that fails leaves one line in the report, never a missing report.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedgrove.report.style import Drawing


@dataclass(frozen=True)
class Section:
    """One heading of the report.

    ``text``: plain text, a blank line between paragraphs; it says what to see in the figure.
    ``figure``: a function of the width in inches (``style.WIDE`` on a page, ``style.NARROW`` on a
    phone), or a finished figure, which a phone scrolls sideways. ``table``: rows of text, the first
    of them the header; ``prose``: its cells are sentences, not numbers.
    """

    title: str
    text: str = ""
    figure: Drawing | Figure | None = None
    table: Sequence[Sequence[str]] = ()
    prose: bool = False


Maker = Callable[..., list[Section]]  # (run_dir), or (run_dir, other runs' directories)

_MAKERS: dict[str, list[tuple[Maker, bool]]] = {}


def section(artefact: str, *, beside: bool = False) -> Callable[[Maker], Maker]:
    """Register a function for the runs whose directory has a file called ``artefact``."""

    def register(maker: Maker) -> Maker:
        _MAKERS.setdefault(artefact, []).append((maker, beside))
        return maker

    return register


def collect(run_dir: Path, beside: Sequence[Path] = ()) -> tuple[list[Section], list[str]]:
    """The sections of every artefact in ``run_dir``, by file name, and one line for each that
    failed.
    """
    found: list[Section] = []
    failed = list(_discover())
    for artefact in sorted(_MAKERS):
        if not (run_dir / artefact).is_file():
            continue
        others = [path for path in beside if (path / artefact).is_file()]
        for maker, wants_others in _MAKERS[artefact]:
            try:
                found += maker(run_dir, others) if wants_others else maker(run_dir)
            except (
                Exception
            ) as error:  # whatever a plug-in does wrong, the rest of the report stands
                failed.append(failure(artefact, error))
    return found, failed


def failure(what: str, error: Exception) -> str:
    """One line on a part of the report that could not be made."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} could not be shown ({reason[:200]})."


@cache
def _discover() -> tuple[str, ...]:
    """Import every module of ``fedgrove.report.pictures``, once; one line for each that cannot be
    imported.
    """
    import fedgrove.report.pictures as package

    failed = []
    for module in pkgutil.iter_modules(package.__path__):
        try:
            importlib.import_module(f"{package.__name__}.{module.name}")
        except Exception as error:
            failed.append(failure(f"The pictures of {module.name}", error))
    return tuple(failed)
