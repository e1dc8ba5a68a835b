"""Who holds what, as a table of texts for people: what ``fedgrove data`` prints before anything is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgrove.federation.picture import short
from fedgrove.ground.plain import Given, Plain

if TYPE_CHECKING:
    from fedgrove.federation.federation import Federation

MOST_LABELS = (
    8  # with a column each; more are told as the number of labels and the most frequent ones
)
MOST_FREQUENT, LONGEST = 3, 28
LEFT = ("client", "group", "most frequent")  # columns of words


@dataclass(frozen=True)
class Overview:
    """``rows`` have a cell for each of ``headings``; ``sentences`` say the sums and where the data
    come from.
    """

    headings: list[str]
    rows: list[list[str]]
    sentences: list[str]


def overview(
    federation: Federation,
    tokens: Mapping[str, Given],
    limit: int,
) -> Overview:
    """The table of a federation, its clients in name order.

    ``tokens`` is what ``federation.lengths.lengths`` found, or empty; ``limit`` is
    ``data.max_length``. Columns in which no client has anything (groups, validation rows) are left
    out.
    """
    table = federation.table()
    clients, labels = table["clients"], table["labels"]
    columns = [
        *_who(clients),
        *_what(clients, table),
        *_medians(clients),
    ]
    if tokens:
        columns += _lengths(clients, tokens, limit)
    headings = [heading for heading, _ in columns]
    cells = [each for _, each in columns]
    rows = [list(row) for row in zip(*cells, strict=True)]
    sentences = [
        _sums(clients, labels),
        _origin(federation.source),
        *federation.remarks,
    ]
    return Overview(headings, rows, sentences)


Column = tuple[str, list[str]]  # its heading and a cell for each client


def _who(clients: list[Plain]) -> list[Column]:
    """Names, groups and numbers of rows; without groups and validation rows where there are none."""
    names: list[str] = []
    groups: list[str] = []
    validation: list[str] = []
    for client in clients:
        if client["held_out"]:
            names.append(f"{client['name']} (held out)")
        else:
            names.append(client["name"])
        groups.append(client["group"] or "")
        validation.append(f"{client['validation'] or ''}")
    found: list[Column] = [("client", names)]
    if any(groups):
        found.append(("group", groups))
    found.append(("train", [f"{client['train']}" for client in clients]))
    found.append(("test", [f"{client['test']}" for client in clients]))
    if any(validation):
        found.append(("validation", validation))
    return found


def _what(clients: list[Plain], table: Plain) -> list[Column]:
    """How often each label occurs, or each kind of texts without labels; of many only how many
    and the most frequent ones.
    """
    if table["labels"]:
        what, heading = "labels", "labels"
    elif "kinds" in table:
        what, heading = "kinds", f"kinds of {table['kind']}"
    else:
        return []
    values = table[what]
    counts: list[Mapping[str, int]] = [client[what] for client in clients]
    if len(values) <= MOST_LABELS:
        return [(value, [f"{each.get(value, 0)}" for each in counts]) for value in values]
    different: list[str] = []
    for each in counts:
        held = [label for label, count in each.items() if count]
        different.append(f"{len(held)}")
    frequent = [_most(each) for each in counts]
    return [(heading, different), ("most frequent", frequent)]


def _medians(clients: list[Plain]) -> list[Column]:
    """Medians of a client's rows, of its texts' words for instance."""
    keys = [key for key in clients[0] if key.startswith("median_")]
    found: list[Column] = []
    for key in keys:
        heading = key.replace("_", " ")
        found.append((heading, [f"{client[key]:g}" for client in clients]))
    return found


def _lengths(
    clients: list[Plain],
    tokens: Mapping[str, Given],
    limit: int,
) -> list[Column]:
    """Tokens of a row, and the rows that are cut; empty cells for clients that were not measured."""
    headings = {"median": "median tokens", "p95": "p95", "cut": f"over {limit}"}
    measured = [tokens.get(client["name"]) for client in clients]
    found: list[Column] = []
    for key, heading in headings.items():
        cells: list[str] = []
        for own in measured:
            if own:
                cells.append(f"{own[key]:g}")
            else:
                cells.append("")
        found.append((heading, cells))
    return found


def _most(counts: Mapping[str, int]) -> str:
    """ "cat 12, dog 9, cow 7, …" """
    held = [(label, count) for label, count in counts.items() if count]
    held.sort(key=lambda pair: (-pair[1], pair[0]))
    listed = [f"{short(label, LONGEST)} {count}" for label, count in held[:MOST_FREQUENT]]
    if len(held) > MOST_FREQUENT:
        listed.append("…")
    return ", ".join(listed)


def _sums(clients: list[Plain], labels: list[str]) -> str:
    held_out = sum(client["held_out"] for client in clients)
    train = sum(client["train"] for client in clients)
    test = sum(client["test"] for client in clients)
    validation = sum(client["validation"] for client in clients)
    who = f"{len(clients)} clients"
    if len(clients) == 1:
        who = "1 client"
    if held_out:
        who += f" ({held_out} held out)"
    parts = [who, f"{train:,} training"]
    if validation:
        parts.append(f"{validation:,} validation")
    parts.append(f"{test:,} test rows")
    if labels:
        parts.append(f"{len(labels)} labels")
    return f"{', '.join(parts)}."


def _origin(source: Given) -> str:
    return f"Data: {source['name']}, {source['note']} (licence: {source['licence']})."
