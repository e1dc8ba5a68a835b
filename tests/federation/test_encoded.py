"""Rows are encoded when a client is asked, and few clients' rows are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedgrove.federation.encoded import EncodedClients, origin_of

NAMES = [f"c{number}" for number in range(6)]


class Encoder:
    """Says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, name: str) -> Mapping[str, Sequence[dict[str, Any]]]:
        self.asked.append(name)
        return {"train": [{"of": name}], "test": [{"of": name}, {"of": name}]}


def test_few_clients_are_encoded_once_and_at_once() -> None:
    encode = Encoder()
    data = EncodedClients(NAMES, encode, kept=6)
    assert encode.asked == NAMES
    for name in [*NAMES, *NAMES]:
        assert data[name]["train"] == [{"of": name}]
    assert data["c1"]["test"] is data["c1"]["test"]
    assert encode.asked == NAMES


def test_of_many_those_asked_last_are_kept() -> None:
    encode = Encoder()
    data = EncodedClients(NAMES, encode, kept=2)
    assert encode.asked == ["c0", "c1"]
    before = origin_of(data["c0"]["test"])
    assert list(data.ready) == ["c1", "c0"]
    assert data["c5"] == {"train": [{"of": "c5"}], "test": [{"of": "c5"}] * 2}
    assert list(data.ready) == ["c0", "c5"]
    assert data["c1"]["train"] == [{"of": "c1"}]
    assert "c0" not in data.ready
    assert origin_of(data["c0"]["test"]) is before, "what was measured of these rows still holds"
    assert origin_of(data["c0"]["train"]) is not before
    assert encode.asked == ["c0", "c1", "c5", "c1", "c0"]
    assert list(data) == NAMES
    assert "c3" in data


def test_threads_ask_one_at_a_time() -> None:
    data = EncodedClients(NAMES, Encoder(), kept=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: data[name]["train"][0]["of"], NAMES * 50))
    assert found == NAMES * 50
    assert len(data.ready) == 1


def test_plain_rows_are_their_own_origin() -> None:
    rows = [{"of": "a"}]
    assert origin_of(rows) is rows
