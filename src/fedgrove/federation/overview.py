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
    what, values = ("labels", labels) if labels else ("kinds", table.get("kinds", []))
    sizes = [key for key in clients[0] if key.startswith("median_")]
    columns: dict[str, list[str]] = {
        "client": [client["name"] + " (held out)" * client["held_out"] for client in clients],
        "group": [client["group"] or "" for client in clients],
        "train": [f"{client['train']}" for client in clients],
        "test": [f"{client['test']}" for client in clients],
        "validation": [f"{client['validation'] or ''}" for client in clients],
    }
    for empty in ("group", "validation"):
        if not any(columns[empty]):
            del columns[empty]
    headings, cells = (
        [*columns],
        [*columns.values()],
    )  # from here on a list: a label may be called "train"
    if len(values) <= MOST_LABELS:
        headings += values
        cells += [[f"{client[what].get(value, 0)}" for client in clients] for value in values]
    else:
        headings += ["labels" if labels else f"kinds of {table['kind']}", "most frequent"]
        cells += [[f"{sum(map(bool, client[what].values()))}" for client in clients]]
        cells += [[_most(client[what]) for client in clients]]
    headings += [key.replace("_", " ") for key in sizes]
    cells += [[f"{client[key]:g}" for client in clients] for key in sizes]
    if tokens:
        headings += ["median tokens", "p95", f"over {limit}"]
        found = [tokens.get(client["name"]) for client in clients]
        cells += [
            [f"{own[key]:g}" if own else "" for own in found] for key in ("median", "p95", "cut")
        ]
    rows = [list(row) for row in zip(*cells, strict=True)]
    return Overview(
        headings,
        rows,
        [_sums(clients, labels), _origin(federation.source), *federation.remarks],
    )


def _most(counts: Mapping[str, int]) -> str:
    """ "cat 12, dog 9, cow 7, …" """
    held = sorted(
        ((label, count) for label, count in counts.items() if count),
        key=lambda pair: (-pair[1], pair[0]),
    )
    listed = [f"{short(label, LONGEST)} {count}" for label, count in held[:MOST_FREQUENT]]
    return ", ".join([*listed, *["…"] * (len(held) > MOST_FREQUENT)])


def _sums(clients: list[Plain], labels: list[str]) -> str:
    held_out = sum(client["held_out"] for client in clients)
    train, test, validation = (
        sum(client[part] for client in clients) for part in ("train", "test", "validation")
    )
    parts = [
        f"{train:,} training",
        *([f"{validation:,} validation"] if validation else []),
        f"{test:,} test rows",
    ]
    who = f"{len(clients)} client{'s' * (len(clients) != 1)}" + f" ({held_out} held out)" * bool(
        held_out
    )
    return f"{who}, {', '.join(parts)}" + f", {len(labels)} labels" * bool(labels) + "."


def _origin(source: Given) -> str:
    return f"Data: {source['name']}, {source['note']} (licence: {source['licence']})."
