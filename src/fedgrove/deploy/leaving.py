"""``fedgrove deploy site --page``: what came to a site and what left it, in words, from its own log.

The log knows no value and no text of a message, so neither does the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgrove.deploy import audit
from fedgrove.deploy.audit import LOG, LogEntry
from fedgrove.ground import words
from fedgrove.report.facts import Tile
from fedgrove.report.render import render
from fedgrove.watch.look import Parts

LATEST = 30  # messages that are told one by one
PARTS = ("head", "runs", "latest")
#: what a site says with a message of a kind, and what it was asked for
_SENT = {
    "hello": "who it is, what it can train and how many examples it has",
    "open": "that it knows the job",
    "keys": "its keys for the masks of a round, signed",
    "shares": "shares of its masks' seeds, locked for others",
    "train": "an update: what its training changed of the shared adapter",
    "unmask": "shares that open a sum, never one update",
    "evaluate": "measures of its model on its own rows",
    "probe": "what places a newcomer",
    "finish": "its last measures",
    "here": "that it is there",
    "error": "that it could not, or would not",
}


class Leaving:
    """Looks at a site's folder again and again; a ``watch.server.Looks``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def stamp(self) -> tuple[int, int] | None:
        """Another one where the log is another."""
        try:
            state = (self.folder / LOG).stat()
        except OSError:
            return None
        return state.st_mtime_ns, state.st_size

    def page(self) -> str:
        """The whole page, with its parts as they are now."""
        return render("leaving.html", "fedgrove.deploy", folder=self.folder.name, places=PARTS)

    def parts(self, now: float) -> Parts:
        path = self.folder / LOG
        entries: list[LogEntry] = []
        if path.exists():
            entries = list(audit.read(path))
        return {
            "head": _part(
                "head", site=self.folder.name, lead=lead(entries), tiles=tiles(path, entries)
            ),
            "runs": _part("runs", table=by_kind(entries)),
            "latest": _part("latest", table=latest(entries)),
        }


def _part(part: str, **content: object) -> str:
    return render("parts-of-leaving.html", "fedgrove.deploy", part=part, **content)


def lead(entries: Sequence[LogEntry]) -> str:
    """One sentence on the whole."""
    sent = [entry for entry in entries if entry.direction == "sent"]
    if not sent:
        return "Nothing has left this site."
    runs = len({entry.run for entry in sent})
    told = words.count(len(sent), "message")
    return (
        f"{told} of {words.count(runs, 'run')} left this site, {words.size(_bytes(sent))} in all, the "
        f"last at {sent[-1].when} (UTC). No row and no text of the data was in them."
    )


def tiles(path: Path, entries: Sequence[LogEntry]) -> list[Tile]:
    """The large numbers of a log's entries. One that was changed is told as such."""
    if not path.exists():
        return []
    sent = [entry for entry in entries if entry.direction == "sent"]
    received = [entry for entry in entries if entry.direction == "received"]
    wrong = audit.broken(path)
    state, note = "whole", "each line follows from the one before"
    if wrong:
        state, note = "changed", f"at line {', '.join(map(str, wrong[:5]))}"
    return [
        Tile(words.size(_bytes(sent)), "left", words.count(len(sent), "message")),
        Tile(_numbers(sent), "numbers left", "in tensors of updates"),
        Tile(words.size(_bytes(received)), "came", words.count(len(received), "message")),
        Tile(state, "the log", note),
    ]


def by_kind(entries: Sequence[LogEntry]) -> list[list[str]]:
    """A row for each kind of message that left in each run, the header first."""
    rows = [["run", "what left", "times", "numbers", "size"]]
    found: dict[tuple[str, str], list[LogEntry]] = {}
    for entry in entries:
        if entry.direction == "sent":
            found.setdefault((entry.run, entry.kind), []).append(entry)
    for (run, kind), each in found.items():
        rows.append(
            [
                run[:8],
                _SENT.get(kind, kind),
                str(len(each)),
                _numbers(each),
                words.size(_bytes(each)),
            ]
        )
    return rows


def latest(entries: Sequence[LogEntry]) -> list[list[str]]:
    """A row for each of the newest messages, newest first, the header first."""
    rows = [["time (UTC)", "message", "round", "size", "SHA-256"]]
    for entry in reversed(entries[-LATEST:]):
        way = "left"
        if entry.direction == "received":
            way = "came"
        remark = entry.note
        if remark:
            remark = f": {remark}"
        rows.append(
            [
                entry.when,
                f"{way}: {entry.kind}{remark}",
                str(entry.round or ""),
                words.size(entry.bytes),
                entry.sha256[:12],
            ]
        )
    return rows


def _numbers(entries: Sequence[LogEntry]) -> str:
    return f"{sum(entry.numbers for entry in entries):,}"


def _bytes(entries: Sequence[LogEntry]) -> int:
    return sum(entry.bytes for entry in entries)
