"""The parts of the live page, as HTML by the id of their place: the report's own figures of a run
so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedgrove.ground.errors import FedgroveError
from fedgrove.report import compare, figures, sections, style
from fedgrove.report.compare import Comparison
from fedgrove.report.data import Run
from fedgrove.report.painter import Painter
from fedgrove.report.render import render
from fedgrove.report.sections import Left
from fedgrove.report.style import Drawing
from fedgrove.watch.standing import Standing

PARTS = ("head", "curves", "clients", "method", "notes")  # of the page, from top to bottom
Parts = dict[str, str]
Draw = Callable[[Run, Comparison, float], object]
_STAMPED = (
    "job.toml",
    "federation.json",
    "metrics.jsonl",
    "events.jsonl",
    "noise.jsonl",
    "summary.json",
    "report.html",
    "run.lock",
    "checkpoints/latest.json",
)


Stamp = tuple[tuple[int, int] | None, ...]


def stamp(folder: Path) -> Stamp:
    """Another one where a file of the run is another."""
    found: list[tuple[int, int] | None] = []
    for name in _STAMPED:
        try:
            state = (folder / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((state.st_mtime_ns, state.st_size))
    return tuple(found)


class Look:
    """Looks at one directory again and again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pace: tuple[float, int] | None = None  # when the first look was, and the rounds then

    def stamp(self) -> Stamp:
        """Another one where a file of the run is another."""
        return stamp(self.folder)

    def page(self) -> str:
        """The whole page, with its parts as they are now."""
        return render("watch.html", "fedgrove.watch", folder=self.folder.name, places=PARTS)

    def parts(self, now: float) -> Parts:
        """``now``: seconds of a clock that only goes on. What cannot be read is said in a part."""
        if not (self.folder / "job.toml").is_file():
            return _filled(head=_render("waiting", sentence="The run is being prepared."))
        try:
            standing = Standing.of(self.folder)
            standing = replace(standing, seconds_left=self._left(standing, now))
            return self._drawn(standing)
        except FedgroveError as error:
            return _filled(head=_render("waiting", sentence=str(error)))
        except Exception as error:  # a file of another hand: the next look may find another
            sentence = sections.failure("The run", error)
            return _filled(head=_render("waiting", sentence=sentence))

    def _left(self, standing: Standing, now: float) -> float | None:
        """Seconds, by the pace since the first look; None before a round has passed."""
        if self._pace is None or standing.done < self._pace[1]:
            self._pace = (now, standing.done)
        began, before = self._pace
        passed = standing.done - before
        if passed <= 0:
            return None
        return (now - began) / passed * (standing.rounds - standing.done)

    def _drawn(self, standing: Standing) -> Parts:
        run = standing.run
        comparison = compare.compare(run, [])
        painter = Painter(None)
        left, notes = self._left_so_far(standing)
        with style.applied():
            extra, failed = sections.collect(left, run.method)

        def paint(name: str, label: str, there: bool, draw: Drawing) -> object:
            if not there:
                return None
            return painter.paint(name, label, draw)

        metric = run.metric
        accuracy = paint(
            "accuracy",
            f"{metric} over rounds",
            len(run.history) > 1,
            partial(figures.accuracy, run, comparison),
        )
        losses = paint(
            "losses",
            "Training loss over rounds",
            len(run.losses) > 1,
            partial(figures.losses, run, comparison),
        )
        everyone = paint(
            "clients",
            f"{metric} of every client",
            bool(comparison.ours.values),
            partial(figures.clients, run, comparison),
        )
        plugged = [
            painter.shown(f"extra-{number}", section)
            for number, section in enumerate(extra, start=1)
        ]
        said = [*run.notes, *notes, *failed, *painter.failed]
        return {
            "head": _render(
                "head", standing=standing, report=(self.folder / "report.html").is_file()
            ),
            "curves": _render("curves", run=run, accuracy=accuracy, losses=losses),
            "clients": _render("clients", standing=standing, run=run, everyone=everyone),
            "method": _render("method", plugged=plugged),
            "notes": _render("notes", notes=said),
        }

    def _left_so_far(self, standing: Standing) -> tuple[Left, list[str]]:
        """What the method has to show, and a sentence where it could not be read."""
        if standing.finished:
            return Left(self.folder), []
        from fedgrove.watch.forming import forming  # with torch, which takes seconds

        try:
            found = forming(self.folder, standing.job)
        except Exception as error:  # whatever a method makes of half a run, the page stands
            failed = sections.failure("What the method and the defence have so far", error)
            return Left(self.folder), [failed]
        return Left(self.folder, forming=found), []


def _filled(**known: str) -> Parts:
    return {name: known.get(name, "") for name in PARTS}


def _render(part: str, **content: object) -> str:
    return render("parts-of-watch.html", "fedgrove.watch", part=part, **content)
