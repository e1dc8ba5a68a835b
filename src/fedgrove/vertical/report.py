"""``RUN/report.html``: what joining the columns is worth, and which party matters, from the files of
the run alone.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedgrove.ground import files, lines, words
from fedgrove.ground.plain import Plain
from fedgrove.report import style
from fedgrove.report.painter import Painter
from fedgrove.report.render import render
from fedgrove.report.sections import Section
from fedgrove.report.style import COLOURS, CYCLE
from fedgrove.vertical.job import METHODS

PAGE = "report.html"
_DASHES = ("--", ":", "-.")


def write_page(folder: Path) -> Path:
    """Write the page anew."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    painter = Painter(folder / "figures")
    shown = [section for section in sections(summary, folder) if section is not None]
    painted = [
        painter.shown(f"vertical-{number}", section)
        for number, section in enumerate(shown, start=1)
    ]
    page = render(
        "sections.html",
        headline=headline(summary),
        facts=facts(summary),
        sections=painted,
        notes=[*notes(summary), *painter.failed],
        name=folder.name,
    )
    files.write_text(folder / PAGE, page)
    return folder / PAGE


def headline(summary: Plain) -> str:
    return f"{METHODS[summary['method']]}: {len(summary['parties'])} parties, each with columns of its own"


def facts(summary: Plain) -> list[tuple[str, str]]:
    told = [
        ("entities", f"{summary['train']:,} to learn from, {summary['test']:,} to test on"),
        ("classes", words.some(summary["classes"], 6)),
        ("accuracy together", _score(summary["accuracy"])),
        ("largest class", _score(summary["majority"])),
        ("sent", f"{_size(summary['bytes_up'])} up, {_size(summary['bytes_down'])} down"),
        ("messages of a party", f"{summary['privacy']['messages']:,}"),
        ("seed", str(summary["seed"])),
    ]
    if "epsilon" in summary["privacy"]:
        told.append(("privacy of a party", epsilon(summary["privacy"])))
    return told


def epsilon(privacy: Plain) -> str:
    return f"ε = {words.number(privacy['epsilon'], 2)} at δ = {privacy['delta']:g}"


def sections(summary: Plain, folder: Path) -> list[Section | None]:
    """What there is to show."""
    courses = _courses(summary, folder)
    return [
        Section("What joining is worth", _verdict(summary), partial(worth, summary)),
        _importance(summary),
        Section("The parties", "", table=grid(summary)),
        _course(courses),
    ]


def notes(summary: Plain) -> list[str]:
    told = [
        "Each batch goes back to the parties with the multipliers of its entities (of split learning, "
        "with gradients), from which labels can be read: every party learns the training labels.",
        "Rows were joined by a keyed hash of their ids. That is no private set intersection: everybody "
        "learns which of its own entities the others have too.",
    ]
    if "epsilon" not in summary["privacy"]:
        told.append("The messages carried no noise: nothing is promised about what they tell.")
    if summary["skipped"]:
        times = words.count(summary["skipped"], "time")
        told.append(
            f"A batch was skipped {times}, because a message was not finite (events.jsonl): a lower "
            f"train.lr usually helps."
        )
    for name, party in summary["parties"].items():
        if party["left_out"]:
            rows = words.count(party["left_out"], "row")
            told.append(f"{rows} of {name} were left out: not every party has these entities.")
    return [words.typographic(sentence) for sentence in told]


# ---------------------------------------------------------------------------- sentences
def _verdict(summary: Plain) -> str:
    together = summary["accuracy"]
    said = f"All together name the right class of {_score(together)} of the test entities"
    alone = _alone(summary)
    if not alone:
        return f"{said}. No party was trained alone, so this does not say what joining is worth."
    best = max(alone, key=lambda name: alone[name])
    gain = words.typographic(words.change(together - alone[best]))
    one = 100 / summary["test"]
    return (
        f"{said}; the best alone (in hindsight), {best}, of {_score(alone[best])}: {gain} points. A single test entity "
        f"is worth {one:.1f} points, so small differences may be chance."
    )


def _alone(summary: Plain) -> dict[str, float]:
    found = {name: party["alone"] for name, party in summary["parties"].items()}
    return {name: score for name, score in found.items() if score is not None}


def _importance(summary: Plain) -> Section | None:
    known = {name: party["importance"] for name, party in summary["parties"].items()}
    if any(value is None for value in known.values()):
        return None
    return Section(
        "How much the sum listens to each party",
        "The norm of a party's output weights, and what the accuracy loses where its shares are replaced "
        "by their mean. Norms compare parties whose embeddings are of one kind and scale; they need not "
        "rank them as the losses do.",
        partial(importance, summary),
    )


def grid(summary: Plain) -> list[list[str]]:
    rows = [["party", "reads", "alone", "all without it", "norm of its weights"]]
    for name, party in summary["parties"].items():
        reads = party["reads"]
        if not isinstance(reads, str):
            reads = words.some(reads, 4)
        rows.append(
            [
                name,
                reads,
                _score(party["alone"]),
                _score(party["without"]),
                words.typographic(words.number(party["importance"])),
            ]
        )
    rows.append(["all together", "", _score(summary["accuracy"]), "", ""])
    return rows


def _score(value: float | None) -> str:
    return words.typographic(words.score(value))


def _size(count: int) -> str:
    return words.typographic(words.size(count))


# ------------------------------------------------------------------------------ figures
def _courses(summary: Plain, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(epoch, accuracy) of all together and of each party alone."""
    places = {"together": folder / "together"}
    places |= {name: folder / "alone" / name for name in _alone(summary)}
    last = {"together": summary["accuracy"], **_alone(summary)}
    found = {}
    for name, place in places.items():
        logged = lines.read(place / "metrics.jsonl")
        points = [(line["round"], line["accuracy"]) for line in logged if "accuracy" in line]
        found[name] = [*points, (logged[-1]["round"], last[name])]
    return found


def _course(courses: dict[str, list[tuple[int, float]]]) -> Section | None:
    if len(courses["together"]) < 2:
        return None
    return Section(
        "Over epochs",
        "Accuracy on the test entities: all together as the strong line, each party alone broken.",
        partial(over_epochs, courses),
    )


def over_epochs(courses: dict[str, list[tuple[int, float]]], width: float) -> Figure:
    """A line for each course."""
    figure, axes = style.new_figure(width, 4.0)
    for number, (name, points) in enumerate(courses.items()):
        look: Plain = {"color": COLOURS["ours"], "linewidth": 2.6}
        label = "all together"
        if number:
            colour = CYCLE[number % len(CYCLE)]
            dash = _DASHES[number % len(_DASHES)]
            look = {"color": colour, "linestyle": dash, "linewidth": 1.6}
            label = words.shorten(f"{name} alone", style.fitting(width, 30, 16))
        axes.plot(*zip(*points, strict=True), label=label, **look)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy")
    ticks = MaxNLocator(integer=True, nbins=style.fitting(width, 10, 6))
    axes.xaxis.set_major_locator(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    axes.grid(axis="y")
    axes.legend(frameon=False)
    return figure


def worth(summary: Plain, width: float) -> Figure:
    """A bar for each party alone and one for all; the largest class as a line."""
    alone = _alone(summary)
    named = [*alone, "all together"]
    values = [*alone.values(), summary["accuracy"]]
    colours = [COLOURS["local"]] * len(alone) + [COLOURS["ours"]]
    figure, axes = style.new_figure(width, 0.9 + 0.4 * len(named))
    axes.barh(range(len(named)), values, color=colours, height=0.6)
    for place, value in enumerate(values):
        axes.text(value, place, f" {words.score(value)}", va="center")
    axes.axvline(summary["majority"], color=COLOURS["base"], linestyle="--", linewidth=1.4)
    axes.set_yticks(range(len(named)), _short(named, width, " alone"))
    axes.set_ylim(len(named) - 0.5, -0.5)
    axes.set_xlim(0, 1.12 * max(values))
    axes.set_xlabel("accuracy; the broken line is the largest class")
    axes.xaxis.set_major_formatter(FuncFormatter(_percent))
    return figure


def importance(summary: Plain, width: float) -> Figure:
    """Norms and losses, side by side; on a phone one above the other."""
    parties = summary["parties"]
    rows = style.fitting(width, 1, 2)
    height = 0.9 + 0.4 * len(parties)
    figure, (left, right) = style.new_grid(width, rows * height, rows, 3 - rows)
    norms = [party["importance"] for party in parties.values()]
    lost = [100 * (summary["accuracy"] - party["without"]) for party in parties.values()]
    left.barh(range(len(norms)), norms, color=COLOURS["ours"], height=0.6)
    left.set_xlabel("norm of the output weights")
    right.barh(range(len(lost)), lost, color=COLOURS["tail"], height=0.6)
    right.set_xlabel("accuracy lost without it, in points")
    for axes in (left, right):
        axes.set_yticks(range(len(norms)), _short(list(parties), width))
        axes.set_ylim(len(norms) - 0.5, -0.5)
        axes.grid(axis="x")
    return figure


def _percent(value: float, place: int) -> str:
    return f"{round(100 * value, 6):g} %"


def _short(names: list[str], width: float, after: str = "") -> list[str]:
    """Names as long as there is room for; ``after`` follows all but the last."""
    longest = style.fitting(width, 30, 14)
    found = [words.shorten(name, longest) for name in names]
    return [f"{name}{after}" for name in found[:-1]] + found[-1:]
