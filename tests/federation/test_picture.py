from __future__ import annotations

import copy
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from fedgrove.federation.picture import COLOURS, who_holds_what


def table(clients: int, labels: int = 3, groups: bool = True) -> dict[str, Any]:
    names = [f"label $x_{i}" for i in range(labels)]
    return {
        "labels": names,
        "clients": [
            {
                "name": f"client-{i:03}",
                "group": "abcd"[i % 4] if groups else None,
                "held_out": i % 5 == 1,
                "labels": {name: (i * 7 + j * 3) % 11 for j, name in enumerate(names)},
            }
            for i in range(clients)
        ],
    }


def draw(table: dict[str, Any]) -> bytes:
    out = BytesIO()
    who_holds_what(table, out)
    return out.getvalue()


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_more_clients_need_more_height_until_they_become_a_strip() -> None:
    few, more, strip = (size(draw(table(count))) for count in (4, 24, 110))
    assert few[0] == more[0]
    assert few[1] < more[1]
    assert strip[0] != more[0]


def test_kinds_stand_where_there_are_no_labels() -> None:
    labelled = table(6, 3)
    kinds = {
        "labels": [],
        "kind": "label",
        "kinds": labelled["labels"],
        "clients": [
            {**client, "labels": {}, "kinds": client["labels"]} for client in labelled["clients"]
        ],
    }
    assert draw(kinds) == draw(labelled)
    untold = [
        {key: value for key, value in client.items() if key != "kinds"}
        for client in kinds["clients"]
    ]
    assert draw({**kinds, "clients": [{**client, "train": 3} for client in untold]}) != draw(
        labelled
    )


def test_many_labels_become_a_strip() -> None:
    assert size(draw(table(6, len(COLOURS))))[0] != size(draw(table(6, len(COLOURS) + 1)))[0]


@pytest.mark.parametrize(("clients", "labels"), [(6, 3), (6, 12)])
def test_the_picture_shows_counts_groups_and_who_is_held_out(clients: int, labels: int) -> None:
    plain = table(clients, labels)
    drawn = [draw(plain), draw(plain)]
    assert drawn[0] == drawn[1]
    for change in (
        {"held_out": True},
        {"group": "z"},
        {"labels": dict.fromkeys(plain["labels"], 5)},
    ):
        other = copy.deepcopy(plain)
        other["clients"][0] |= change
        drawn.append(draw(other))
    assert len(set(drawn)) == 4


def test_one_client_without_groups_and_letters_that_no_font_has(tmp_path: Path) -> None:
    odd = table(1, 2, groups=False)
    odd["clients"][0] |= {"name": "x" * 64, "labels": {"\u0e01\U0001f600": 1, "$\\oops$": 0}}
    odd["labels"] = list(odd["clients"][0]["labels"])
    who_holds_what(odd, tmp_path / "picture.png")
    assert size((tmp_path / "picture.png").read_bytes())[0] > 500


def test_clients_whose_labels_are_not_known_show_their_sizes() -> None:
    clients = [{**client, "train": 5 + number} for number, client in enumerate(table(3)["clients"])]
    without = [{**client, "labels": {}} for client in clients]
    one = [{**client, "labels": {"any label": client["train"]}} for client in clients]
    assert draw({"labels": ["x", "y"], "clients": without}) == draw(
        {"labels": ["any label"], "clients": one}
    )
