"""``RUN/report.html``: one file that needs nothing else, and ``RUN/figures/*.png`` for slides."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedgrove.ground import files, words
from fedgrove.ground.plain import Plain
from fedgrove.report import clients, compare, facts, figures, sections, style
from fedgrove.report.compare import Comparison
from fedgrove.report.data import Run, load
from fedgrove.report.painter import Painter, Picture
from fedgrove.report.render import render
from fedgrove.report.sections import Left
from fedgrove.report.usage import usage

Pictures = dict[str, Picture | None]


def write_report(run_dir: Path, baselines: Sequence[Path] = ()) -> Path:
    """Write ``run_dir/report.html`` from the files of the run directory alone and return its path.

    ``baselines``: directories of other finished runs on the same clients; the first in which
    nothing was exchanged becomes the reference for gains and losses. Raises ``RunError`` where
    summary.json is missing or nothing can be written; any other part that cannot be read or drawn
    is left out, with one line in its place.
    """
    run = load(run_dir)
    comparison = compare.compare(run, [load(path) for path in baselines])
    painter = Painter(run_dir / "figures")
    with style.applied():
        extra, failed = sections.collect(Left(run_dir, tuple(baselines)), run.method)
    core = _core_pictures(run, comparison, painter)
    plugged = [painter.shown(f"extra-{number}", each) for number, each in enumerate(extra, start=1)]
    page = render(
        "report.html",
        run=run,
        comparison=comparison,
        headline=facts.headline(run),
        verdict=compare.verdict(run, comparison),
        grain=compare.grain(run),
        tiles=facts.tiles(run, comparison),
        settings=facts.settings(run),
        rows=facts.comparison_rows(run, comparison),
        quantiles=clients.quantiles(run, comparison),
        groups=clients.groups(run, comparison),
        client_table=clients.table(run, comparison),
        cost_rows=facts.cost_rows(run),
        time_rows=facts.time_rows(run),
        usage=usage(run),
        pictures=core,
        plugged=plugged,
        notes=[
            *run.notes,
            *comparison.warnings,
            *failed,
            *painter.failed,
        ],
        broken=_broken(run),
    )
    target = run_dir / "report.html"
    files.write_text(target, page)
    return target


def _core_pictures(run: Run, comparison: Comparison, painter: Painter) -> Pictures:
    """The figures that every run has; None for one of which there is nothing to show."""
    metric = run.metric
    drawn = {
        # one evaluation is no curve
        "accuracy": (len(run.history) > 1, f"{metric} over rounds", figures.accuracy),
        "losses": (len(run.losses) > 1, "Training loss over rounds", figures.losses),
        "preferences": (
            len(run.over_rounds("margin")) > 1,
            "Margin between two answers over rounds",
            figures.preferences,
        ),
        "chosen": (
            len(run.over_rounds("chosen_log_ratio")) > 1,
            "Preferred answers against the base over rounds",
            figures.chosen,
        ),
        "clients": (bool(comparison.ours.values), f"{metric} of every client", figures.clients),
        "gains": (len(comparison.gains()) > 1, "Who gains and who loses", figures.gains),
    }
    found: Pictures = {}
    for name, (there, label, draw) in drawn.items():
        found[name] = None
        if there:
            found[name] = painter.paint(name, label, partial(draw, run, comparison))
    found["data"] = None
    if run.table and painter.folder is not None:
        found["data"] = _who_holds_what(run.table, painter.folder, painter)
    return found


def _who_holds_what(table: Plain, folder: Path, painter: Painter) -> Picture | None:
    """The federation's own picture of its data."""
    try:
        from fedgrove.federation.picture import who_holds_what

        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "who-holds-what.png"
        who_holds_what(table, target)
        data = base64.b64encode(target.read_bytes()).decode()
    except Exception as error:
        painter.failed.append(sections.failure("The picture of who holds what", error))
        return None
    return Picture(
        f'<img class="chart" alt="Who holds what data" src="data:image/png;base64,{data}">'
    )


def _broken(run: Run) -> str:
    """A sentence on training losses that were no numbers, "" where all were."""
    if not run.broken:
        return ""
    times = words.count(sum(run.broken.values()), "time")
    shown = words.some(sorted(run.broken), 5)
    remedy = "A smaller learning rate or gradient clipping usually helps."
    return f"The training loss was not a finite number {times}: {shown}. {remedy}"
