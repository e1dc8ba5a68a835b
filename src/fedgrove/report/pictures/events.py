"""``events.jsonl``: what happened to clients beside training, counted."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from fedgrove.ground import words
from fedgrove.report.sections import Left, Section

FILE = "events.jsonl"
KINDS = 12  # rows of the table
NAMED = 3  # clients in a row


def events(left: Left) -> list[Section]:
    """Each kind of event with how often it was, to whom and why, the most frequent first."""
    found = left.lines(FILE)
    if not found:
        return []
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in found:
        kinds.setdefault((event["event"], _kind(event["reason"])), []).append(event)
    ordered = sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0]))
    rows = [["what", "times", "clients", "rounds", "reason", "most often"]]
    rows += [_row(what, each) for (what, _), each in ordered[:KINDS]]
    clients = words.count(len({event["client"] for event in found}), "client")
    text = f"{words.count(len(found), 'event')} of {clients}, of {FILE}."
    rest = sum(len(each) for _, each in ordered[KINDS:])
    if rest:
        text += f" {words.count(rest, 'event')} of rarer kinds are in the file alone."
    return [Section("What happened to clients", text, table=rows, prose=True)]


def _row(what: str, events: list[dict[str, Any]]) -> list[str]:
    rounds = sorted({event["round"] for event in events})
    times = Counter(event["client"] for event in events)
    ordered = [name for name, _ in sorted(times.items(), key=lambda each: (-each[1], each[0]))]
    if len(rounds) == 1:
        span = str(rounds[0])
    else:
        span = f"{rounds[0]} to {rounds[-1]}"
    count, clients = f"{len(events):,}", f"{len(times):,}"
    reason = str(events[0]["reason"])
    return [what, count, clients, span, words.shorten(reason, 160), words.some(ordered, NAMED)]


def _kind(reason: str) -> str:
    """The reason without its numbers, by which events are alike."""
    return re.sub(r"\d+([.,]\d+)*", "#", reason)
