"""``RUN/report.html``: one file that needs nothing else, and ``RUN/figures/*.png`` for slides."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedgrove.ground import files, words
from fedgrove.ground.errors import RunError
from fedgrove.report import compare, facts, figures, sections, style
from fedgrove.report.data import Run, load
from fedgrove.report.style import Drawing


@dataclass(frozen=True)
class Picture:
    """Markup that is safe to print as it is. ``narrow`` is for phones; without it ``wide`` scrolls
    sideways there.
    """

    wide: str
    narrow: str = ""


def write_report(run_dir: Path, baselines: Sequence[Path] = ()) -> Path:
    """Write ``run_dir/report.html`` from the files of the run directory alone and return its path.

    ``baselines``: directories of other finished runs on the same clients; the first of method
    ``local`` becomes the reference for gains and losses. Raises ``RunError`` where summary.json is
    missing or nothing can be written; any other part that cannot be read or drawn is left out, with
    one line in its place.
    """
    run = load(run_dir)
    comparison = compare.compare(run, [load(path) for path in baselines])
    painter = _Painter(run_dir / "figures")
    with style.applied():
        extra, failed = sections.collect(run_dir, baselines)
    core = _core_pictures(run, comparison, painter)
    plugged = [
        {
            "section": each,
            "picture": painter.paint(f"extra-{number}", each.title, each.figure)
            if each.figure
            else None,
        }
        for number, each in enumerate(extra, start=1)
    ]
    page = _render(
        run=run,
        comparison=comparison,
        headline=facts.headline(run),
        verdict=compare.verdict(run, comparison),
        grain=compare.grain(run),
        tiles=facts.tiles(run, comparison),
        settings=facts.settings(run),
        rows=facts.comparison_rows(run, comparison),
        client_rows=facts.client_rows(run, comparison),
        cost_rows=facts.cost_rows(run),
        time_rows=facts.time_rows(run),
        usage=facts.usage(run),
        pictures=core,
        plugged=plugged,
        notes=[*run.notes, *comparison.warnings, *failed, *painter.failed],
        broken=_broken(run),
    )
    target = run_dir / "report.html"
    files.write_text(target, page)
    return target


class _Painter:
    """Draws figures into the page and into ``folder``; one that fails becomes a line in
    ``failed``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: list[str] = []

    def paint(self, name: str, label: str, figure: Drawing | Figure) -> Picture | None:
        try:
            with style.applied():
                wide = figure if isinstance(figure, Figure) else figure(style.WIDE)
                style.png(wide, self.folder / f"{name}.png")
                wide.set_layout_engine(
                    "none"
                )  # laid out once is enough: that is most of the time of a figure
                page = style.svg(wide, name, label)
                narrow = (
                    ""
                    if isinstance(figure, Figure)
                    else style.svg(figure(style.NARROW), f"{name}-narrow", label)
                )
            return Picture(page, narrow)
        except RunError:  # no space, no permission: the page cannot be written either
            raise
        except Exception as error:  # a figure that fails must not take the report with it
            self.failed.append(sections.failure(f"The figure “{label}”", error))
            return None

    def who_holds_what(self, table: dict[str, Any]) -> Picture | None:
        """The federation's own picture of its data."""
        try:
            from fedgrove.federation.picture import who_holds_what

            self.folder.mkdir(parents=True, exist_ok=True)
            target = self.folder / "who-holds-what.png"
            who_holds_what(table, target)
            data = base64.b64encode(target.read_bytes()).decode()
            return Picture(
                f'<img class="chart" alt="Who holds what data" src="data:image/png;base64,{data}">'
            )
        except Exception as error:
            self.failed.append(sections.failure("The picture of who holds what", error))
            return None


def _core_pictures(
    run: Run, comparison: compare.Comparison, painter: _Painter
) -> dict[str, Picture | None]:
    found: dict[str, Picture | None] = dict.fromkeys(
        ("accuracy", "losses", "clients", "gains", "data")
    )
    if len(run.history) > 1:  # one evaluation is no curve
        found["accuracy"] = painter.paint(
            "accuracy", f"{run.metric} over rounds", partial(figures.accuracy, run, comparison)
        )
    if len(run.losses) > 1:
        found["losses"] = painter.paint(
            "losses", "Training loss over rounds", partial(figures.losses, run)
        )
    if comparison.ours.values:
        found["clients"] = painter.paint(
            "clients", f"{run.metric} of every client", partial(figures.clients, run, comparison)
        )
    if len(comparison.gains()) > 1:
        found["gains"] = painter.paint(
            "gains", "Who gains and who loses", partial(figures.gains, run, comparison)
        )
    if run.table:
        found["data"] = painter.who_holds_what(run.table)
    return found


def _broken(run: Run) -> str:
    """A sentence on training losses that were no numbers, "" where all were."""
    if not run.broken:
        return ""
    names = sorted(run.broken)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    times = words.count(sum(run.broken.values()), "time")
    remedy = "A smaller learning rate or gradient clipping usually helps."
    return f"The training loss was not a finite number {times}: {shown}. {remedy}"


def _render(**content: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedgrove.report", "page"),
        autoescape=True,  # client names, labels and the job come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = resources.files("fedgrove.report").joinpath("page/style.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(css=css, **content)
