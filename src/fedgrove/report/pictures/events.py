"""``events.jsonl``: what happened to clients beside training, counted."""

from __future__ import annotations

import re
from collections import Counter

from fedgrove.ground import words
from fedgrove.ground.plain import Plain
from fedgrove.report.sections import Left, Section

FILE = "events.jsonl"
KINDS = 12  # rows of the table
NAMED = 3  # clients in a row


def events(left: Left) -> list[Section]:
    """Each kind of event with how often it was, to whom and why, the most frequent first."""
    found = left.lines(FILE)
    if not found:
        return []
    kinds: dict[tuple[str, str], list[Plain]] = {}
    for event in found:
        kind = (event["event"], _kind(event["reason"]))
        alike = kinds.setdefault(kind, [])
        alike.append(event)
    ordered = sorted(kinds, key=lambda kind: (-len(kinds[kind]), kind))
    rows = [["what", "times", "clients", "rounds", "reason", "most often"]]
    for kind in ordered[:KINDS]:
        what, _ = kind
        rows.append(_row(what, kinds[kind]))
    names = {event["client"] for event in found}
    count = words.count(len(found), "event")
    clients = words.count(len(names), "client")
    text = f"{count} of {clients}, of {FILE}."
    rest = sum(len(kinds[kind]) for kind in ordered[KINDS:])
    if rest:
        rarer = words.count(rest, "event")
        text += f" {rarer} of rarer kinds are in the file alone."
    return [
        Section(
            "What happened to clients",
            text,
            table=rows,
            prose=True,
        )
    ]


def _row(what: str, events: list[Plain]) -> list[str]:
    rounds = {event["round"] for event in events}
    first = min(rounds)
    last = max(rounds)
    span = str(first)
    if last > first:
        span = f"{first} to {last}"
    times = Counter(event["client"] for event in events)
    ordered = sorted(times, key=lambda name: (-times[name], name))
    reason = str(events[0]["reason"])
    return [
        what,
        f"{len(events):,}",
        f"{len(times):,}",
        span,
        words.shorten(reason, 160),
        words.some(ordered, NAMED),
    ]


def _kind(reason: str) -> str:
    """The reason without its numbers, by which events are alike."""
    return re.sub(r"\d+([.,]\d+)*", "#", reason)
