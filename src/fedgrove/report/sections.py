"""What a report shows beside the parts that every run has: pictures of its method, and of what else
a run may leave.

A method brings its own pictures, wherever it comes from: its class names a function, which is
imported when a report is written, so that training loads no matplotlib::

    class MyMethod(Method):
        pictures = "my_package.pictures:draw"    # or f"{__name__}:draw", in the method's own file

    def draw(left: Left) -> list[Section]:
        who = left.read("who.json")              # as its ``artefacts`` wrote it
        return [Section("Who shares with whom", "Read it from the left ...", partial(figure, who))]

What fails leaves one line in the report, never a missing report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from fedgrove.ground.errors import JobError
from fedgrove.ground.plain import Given

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedgrove.methods.contract import Method
    from fedgrove.report.style import Drawing

#: What any run may leave, whatever its method. Each gives nothing where there is nothing.
ALWAYS = (
    "fedgrove.report.pictures.defence:defence",
    "fedgrove.report.pictures.events:events",
    "fedgrove.report.pictures.generations:generations",
    "fedgrove.report.pictures.noise:noise",
)


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


@dataclass(frozen=True)
class Left:
    """What a run left in its directory, and the directories of the runs shown beside it.

    ``forming``: files, by name, that a run which goes on would leave if it ended now.
    """

    folder: Path
    beside: tuple[Path, ...] = ()
    forming: Given = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.forming or (self.folder / name).is_file()

    def read(self, name: str) -> Any:
        """A JSON file of the directory."""
        if name in self.forming:
            return self.forming[name]
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def lines(self, name: str) -> list[Any]:
        """The complete lines of a JSONL file, [] where it is missing."""
        path = self.folder / name
        if not path.is_file():
            return []
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole if line]

    def others(self, name: str) -> list[Path]:
        """The directories beside it that have the file too."""
        return [folder for folder in self.beside if (folder / name).is_file()]


Maker = Callable[[Left], Sequence[Section]]


@runtime_checkable
class Pictured(Protocol):
    """A method, asked as a class, that has pictures of its own."""

    pictures: str  # "package.module:function", a ``Maker``


def method_of(name: str) -> type[Method] | None:
    """The class of a run's method; None where this installation has no such method."""
    from fedgrove.methods.registry import method_class

    try:
        return method_class(name)
    except JobError:
        return None


def collect(left: Left, method: str) -> tuple[list[Section], list[str]]:
    """The sections of a run, its method's first, and one line for each function that failed."""
    kind = method_of(method)
    failed: list[str] = []
    if kind is None:
        failed.append(f"{method} is not installed here: pictures of its own would be missing.")
    own = (kind.pictures,) if isinstance(kind, Pictured) else ()
    found: list[Section] = []
    for name in (*own, *ALWAYS):
        try:
            make: Maker = resolve_name(name)
            found += make(left)
        except Exception as error:  # whatever a method's picture does wrong, the report stands
            failed.append(failure(f"What {name} draws", error))
    return found, failed


def failure(what: str, error: Exception) -> str:
    """One line on a part of the report that could not be made."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} could not be shown ({reason[:200]})."
