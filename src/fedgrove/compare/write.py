"""``compare.json``, ``compare.html``, ``table.md`` and ``table.tex``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgrove.compare import tables
from fedgrove.compare.campaign import FinishedRun
from fedgrove.compare.collect import collect
from fedgrove.compare.spread import clients_are_many
from fedgrove.ground import files, words
from fedgrove.ground.plain import Given, Plain

if TYPE_CHECKING:
    from fedgrove.report.painter import Painter, Picture

Content = Given  # of compare.json


def write(done: FinishedRun) -> Plain:
    """Write the four files into the comparison's directory; returns the content of
    ``compare.json``.
    """
    out = done.plan.out
    content: Plain = finite(collect(done))
    files.write_json(out / "compare.json", content)
    write_tables(content, out)
    write_page(content, out)
    return content


def write_tables(content: Content, out: Path) -> None:
    grids = [tables.results(content), tables.costs(content)]
    files.write_text(out / "table.md", tables.markdown(grids))
    files.write_text(out / "table.tex", tables.latex(grids))


def write_page(content: Content, out: Path) -> Path:
    """One file that needs nothing else; the figures are also in ``figures/`` as PNG."""
    from fedgrove.report.painter import Painter
    from fedgrove.report.render import render

    painter = Painter(out / "figures")
    page = render(
        "compare.html",
        "fedgrove.compare",
        content=content,
        headline=headline(content),
        verdict=verdict(content),
        settings=settings(content),
        results=tables.results(content),
        costs=tables.costs(content),
        pictures=_pictures(content, painter),
        crowded=clients_are_many(content),
        tests=test_rows(content),
        trials=trial_rows(content),
        failed=painter.failed,
    )
    target = out / "compare.html"
    files.write_text(target, page)
    return target


def _pictures(content: Content, painter: Painter) -> dict[str, Picture | None]:
    """The figures; None for one of which there is nothing to show."""
    from fedgrove.compare import figures

    metric = content["metric"]
    # Measured once there is no course to show.
    measured = max(len(row["curve"]) for row in content["methods"])
    compared = bool(content["tests"]["metric"]["against_best"])
    drawn = {
        "rounds": (measured > 1, f"{metric} over rounds", figures.over_rounds),
        "bytes": (True, f"{metric} over bytes sent", figures.over_bytes),
        "clients": (True, f"{metric} of every client", figures.clients),
        "differences": (compared, "Differences from the best method", figures.differences),
    }
    pictures: dict[str, Picture | None] = {}
    for name, (there, label, draw) in drawn.items():
        pictures[name] = None
        if there:
            pictures[name] = painter.paint(name, label, partial(draw, content))
    return pictures


def settings(content: Content) -> list[tuple[str, str]]:
    """What all methods shared."""
    clients = str(content["clients"])
    if content["held_out"]:
        clients += f" + {content['held_out']} held out"
    return [
        ("model", str(content["model"])),
        ("data", str(content["data"])),
        ("clients", clients),
        ("rounds", str(content["rounds"])),
        ("seeds", ", ".join(map(str, content["seeds"]))),
        ("head, all methods", str(content["head"])),
    ]


def headline(content: Content) -> str:
    methods = words.count(len(content["methods"]), "method")
    clients = words.count(content["clients"], "client")
    rounds = words.count(content["rounds"], "round")
    seeds = words.count(len(content["seeds"]), "seed")
    return f"{methods} on the same {clients}, {rounds}, {seeds}"


def verdict(content: Content) -> list[str]:
    """What came out, in sentences that are true whatever the numbers are."""
    said = []
    for measure, when in (
        ("metric", "At the end of the run"),
        ("metric_tuned", "After the same local fine-tuning"),
    ):
        tests = content["tests"][measure]
        best = next(row for row in content["methods"] if row["label"] == tests["best"])
        against = tests["against_best"]
        mean = best[measure]["mean"]
        if mean is None:
            continue
        score = words.typographic(words.score(mean, percent=content["percent"]))
        sentence = f"{when}, {best['label']} has the highest mean {content['metric']}, {score}"
        if against:
            beaten = [test["p_holm"] < 0.05 for test in against.values()]
            sentence += f"; {behind(beaten)} (adjusted p below 0.05)"
        said.append(sentence + ".")
    return said


def behind(beaten: list[bool]) -> str:
    """How many of the others are clearly behind the best, in words."""
    count = sum(beaten)
    others = len(beaten)
    if others == 1:
        if count:
            return "the other is clearly behind"
        return "the other is not clearly behind"
    if count == 0:
        return f"none of the {others} others is clearly behind"
    if count == others:
        return f"all {others} others are clearly behind"
    if count == 1:
        return f"1 of the {others} others is clearly behind"
    return f"{count} of the {others} others are clearly behind"


def test_rows(content: Content) -> list[tuple[str, list[list[str]]]]:
    """(heading, rows) for each measure, the first row the header."""
    header = ["method", "mean difference", "95 % interval", "n", "p", "p, adjusted"]
    found = []
    for measure, when in (
        ("metric", "at the end of the run"),
        ("metric_tuned", "after local fine-tuning"),
    ):
        tests = content["tests"][measure]
        rows = [header]
        for label, test in tests["against_best"].items():
            row = _test_row(label, test, content["percent"])
            rows.append(row)
        if len(rows) > 1:
            found.append((f"Against {tests['best']}, {when}", rows))
    return found


def _test_row(label: str, test: Content, percent: bool) -> list[str]:
    def points(value: float) -> str:
        return words.typographic(words.change(value, percent=percent, digits=2))

    low = points(test["low"])
    high = points(test["high"])
    return [
        label,
        points(test["difference"]),
        f"{low} to {high}",
        f"{test['n']:,}",
        tables.p_value(test["p"]),
        tables.p_value(test["p_holm"]),
    ]


def trial_rows(content: Content) -> list[list[str]]:
    """[method, validation metric of each trial …], the chosen one marked; [] where nothing was
    tuned.
    """
    if not content["tuning"]:
        return []
    methods = content["tuning"]["methods"]
    anyone = next(iter(methods.values()))
    rows = [["method", *(trial["name"] for trial in anyone["trials"])]]
    for label, tuned in methods.items():
        cells = [label]
        for trial in tuned["trials"]:
            cell = tables.number(trial["score"], content["percent"])
            if trial["values"] == tuned["chosen"]:
                cell += " ✓"
            if trial["problem"]:
                cell += f" ({trial['problem']})"
            cells.append(cell)
        rows.append(cells)
    return rows


def finite(value: Any) -> Any:
    """NaN and infinities have no JSON: ``None``."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
