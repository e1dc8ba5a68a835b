"""One look for every figure: size, palette, axes, and the way a matplotlib figure becomes inline
SVG.

The palette is safe for colour-blind readers (after Okabe & Ito 2008 and Tol 2021), and no figure
tells things apart by colour alone. In the report the colours are CSS variables (``var(--ours)``),
so that one drawing serves light, dark and paper. Widths and heights are in inches at 72 units an
inch: ``WIDE`` fills the page, ``NARROW`` a phone; text is 11 units in both.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedgrove.ground.files import unwritable

#: ``{role: colour on white}``; the report's style sheet holds the colour of each role on dark.
COLOURS = {
    "ink": "#1c2126",
    "muted": "#5b6571",
    "line": "#d9dee4",
    "paper": "#fefefe",
    "base": "#8a949e",  # the untouched base model
    "local": "#aa3377",  # each client alone
    "ours": "#0072b2",  # this run
    "tail": "#c24f00",  # the clients that fare worst, and losses
    "tuned": "#009e73",  # after final local training
}
#: For groups and classes, in this order; the last ones repeat after eight.
CYCLE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933", "#882255")

WIDE, NARROW = 10.4, 5.0

Choice = TypeVar("Choice")

#: Draws a figure of the given width in inches.
Drawing = Callable[[float], Figure]

_RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.facecolor": "none",
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 72,
    "figure.facecolor": COLOURS["paper"],
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a client may be called "a$b$c"
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "svg.hashsalt": "fedgrove",  # the same run gives the same report
}


@contextmanager
def applied() -> Iterator[None]:
    """Everything drawn inside has the house style. Glyphs that the bundled font lacks are no reason
    to complain.
    """
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def fitting(width: float, page: Choice, phone: Choice) -> Choice:
    """What suits a figure of ``width``: the choice for a page or that for a phone."""
    if width > NARROW:
        return page
    return phone


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """One pair of axes that fill a figure of ``width`` × ``height`` inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def new_grid(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """``rows`` × ``columns`` axes that share their y axis, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(
        figure.subplots(
            rows,
            columns,
            sharey=True,
            squeeze=False,
        ).flat
    )


def svg(figure: Figure, name: str, label: str) -> str:
    """``figure`` as an ``<svg>`` element: ids unique by ``name``, colours by role, no reference to
    any other file.
    """
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={
            "Date": None,
            "Creator": None,
            "Format": None,
            "Type": None,
        },
    )
    return inline(buffer.getvalue(), name, label)


def inline(text: str, name: str, label: str) -> str:
    """An SVG document as an element for an HTML page, see ``svg``."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<style.*?</style>",
        "",
        text,
        flags=re.DOTALL,
    )  # it would hold for the whole page; see style.css
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r"'?DejaVu Sans'?(, [^;\"]*)?", "var(--sans)", text)
    for role, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{role})")
    box = re.search(r'viewBox="[^"]+"', text)
    start = f'<svg role="img" aria-label="{_attribute(label)}" {box.group(0) if box else ""}>'
    return start + text[text.index(">") + 1 :].strip()


def png(figure: Figure, path: Path) -> Path:
    """``figure`` on white, 150 dots an inch."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def spread(places: list[float], gap: float) -> list[float]:
    """``places`` moved apart, as little as it takes, until neighbours are ``gap`` apart; order and
    length are kept.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Blocks of labels that touch sit around the mean of where their members want to be.
    blocks: list[tuple[float, list[int]]] = []
    for index in order:
        centre = places[index]
        members = [index]
        while blocks:
            middle, before = blocks[-1]
            first = centre - gap * (len(members) - 1) / 2
            free = middle + gap * (len(before) + 1) / 2
            if first >= free:
                break
            blocks.pop()
            members = before + members
            centre = sum(places[member] for member in members) / len(members)
        blocks.append((centre, members))
    moved = list(places)
    for centre, members in blocks:
        half = (len(members) - 1) / 2
        for position, member in enumerate(members):
            moved[member] = centre + gap * (position - half)
    return moved


def _attribute(text: str) -> str:
    return (
        text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
    )
