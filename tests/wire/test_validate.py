"""What comes over the wire: every honest message of every method passes, every tampered one is
named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_job

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.private import seal
from fedgrove.methods.contract import ClientInfo, Setting, Update
from fedgrove.methods.registry import method_class, names
from fedgrove.runs.prepare import Prepared, prepare
from fedgrove.wire.validate import (
    fault,
    figures_fault,
    measures_fault,
    offer_fault,
    refuse_loss,
    row_fault,
    sift,
    size_fault,
)

SITES = {f"layer.{n}.query": Site(f"layer.{n}.query", n, 6, 5) for n in range(2)}
HEAD = {"weight": torch.zeros(2, 6), "bias": torch.zeros(2)}
CLIENT = ClientInfo("a", 3, 10)


def method(name: str = "fedit") -> Any:
    kind = method_class(name)
    return kind(kind.Options(), Setting(sites=SITES, rank=3, alpha=6.0, rounds=4, seed=0))


def honest() -> dict[str, Any]:
    adapter = {name: Factors(torch.ones(3, 6), torch.ones(5, 3), 2.0) for name in SITES}
    return {
        "method": {"adapter": adapter, "indices": [0, 1]},
        "head": {k: v.clone() for k, v in HEAD.items()},
    }


def wrong(content: Any) -> str | None:
    return fault(content, method=method(), client=CLIENT, offer={}, round=1, head=HEAD)


def test_an_honest_update_passes() -> None:
    assert wrong(honest()) is None


Q = "layer.0.query"


def _poke(value: float) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["method"]["adapter"][Q].A[1, 2] = value

    return change


def _put(factors: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["method"]["adapter"][Q] = factors

    return change


TAMPERED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (_poke(float("nan")), "not finite"),
    (_poke(float("inf")), "not finite"),
    (_poke(2e6), "2e+06, above 1e+06"),
    (lambda c: c["method"].update({"ballast": torch.zeros(200_000)}), "numbers, where at most"),
    (_put(Factors(torch.ones(4, 6), torch.ones(5, 4), 2.0)), "rank 4, above 3"),
    (_put(Factors(torch.ones(3, 7), torch.ones(5, 3), 2.0)), "has 6 features"),
    (_put(Factors(torch.ones(3, 6), torch.ones(6, 3), 2.0)), "has 5 features"),
    (_put(Factors(torch.ones(3, 6), torch.ones(5, 2), 2.0)), "do not fit"),
    (_put(Factors(torch.ones(3, 6), torch.ones(5, 3), float("nan"))), "scale"),
    (_put(Factors(torch.ones(3, 6).half(), torch.ones(5, 3), 2.0)), "float16, not float32"),
    (_put(torch.ones(3, 8)), "5 by 6"),
    (_put(torch.ones(500, 6)), "on the short side"),
    (_put(torch.ones(10_000)), "10000 numbers"),
    (_put(torch.ones(2, 3, 4)), "3 dimensions"),
    (
        lambda c: c["method"]["adapter"].update({"layer.9.query": torch.ones(3, 6)}),
        "no adapted layer",
    ),
    (
        lambda c: c["method"].update(
            {"weights": {"x": Factors(torch.ones(1, 1), torch.ones(1, 1), 1.0)}}
        ),
        "no adapted",
    ),
    (lambda c: c["method"].update({"score": float("inf")}), "score is inf"),
    (lambda c: c["method"].update({"text": "x" * 201}), "201 characters"),
    (lambda c: c["method"].update({"mask": torch.ones(2, dtype=torch.int8)}), "int8"),
    (lambda c: c.update({"more": {}}), "'more'"),
    (lambda c: c["head"].update({"weight": torch.zeros(3, 6)}), "head/weight"),
    (lambda c: c["head"].pop("bias"), "head does not have the parts"),
]


@pytest.mark.parametrize(("change", "words"), TAMPERED)
def test_a_tampered_update_is_named(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    content = honest()
    change(content)
    assert words in (wrong(content) or "")


def test_an_offer_may_have_the_rank_of_a_stack_and_no_more() -> None:
    def stack(rank: int) -> Any:
        return {"offer": {"delta": {Q: Factors(torch.ones(rank, 6), torch.ones(5, rank), 1.0)}}}

    assert offer_fault(stack(5), sites=SITES) is None
    assert "above 5" in (offer_fault(stack(6), sites=SITES) or "")
    assert (
        offer_fault(stack(6), sites=None) is None
    )  # nothing to compare with before the model is loaded
    assert "not finite" in (offer_fault({"offer": torch.tensor([float("nan")])}, sites=None) or "")


ROW = {
    "name": "a",
    "group": None,
    "held_out": False,
    "train": 7,
    "test": 3,
    "validation": 0,
    "labels": {"x": 4, "y": 3},
}


def test_an_honest_description_passes() -> None:
    for row in (ROW, {**ROW, "median_words": 7.5}, {"name": "a", "train": 1}):
        assert row_fault(row, 4, ("x", "y")) is None
        assert row_fault(row, None, ("x", "y", "z")) is None


@pytest.mark.parametrize(
    ("changes", "rank", "words"),
    [
        ({"train": 0}, 4, "0 examples"),
        ({"train": -5}, 4, "-5 examples"),
        ({"train": True}, 4, "True examples"),
        ({"train": 10**30}, 4, "examples"),
        ({"train": 7.0}, 4, "7.0 examples"),
        ({"name": "../../a"}, 4, "its name"),
        ({"name": "<b>a</b>"}, 4, "its name"),
        ({"name": 7}, 4, "who it is"),
        ({"labels": {"x": 1, "<script>": 1}}, 4, "its labels"),
        ({"labels": {"x": "many"}}, 4, "its labels"),
        ({"test": "x" * 1000}, 4, "'test'"),
        ({"group": ["a"]}, 4, "'group'"),
        ({"more": {"a": 1}}, 4, "'more'"),
        ({}, 0, "the rank 0"),
        ({}, "4", "the rank 4"),
        ({}, True, "the rank True"),
        ({}, 10**30, "the rank 1"),
    ],
)
def test_a_description_that_is_none_is_named(changes: Any, rank: Any, words: str) -> None:
    assert words in (row_fault({**ROW, **changes}, rank, ("x", "y")) or "")


def test_measures_are_numbers_under_known_names() -> None:
    needed = {"loss", "accuracy"}
    fine: dict[str, Any] = {"loss": float("nan"), "accuracy": 0.5, "examples": 3}
    assert measures_fault(fine, needed=needed) is None
    more: dict[str, Any]
    for more in (
        {"round": 9},
        {"client": 1},
        {"split": 2},
        {"a b": 1},
        {"accuracy": "all"},
        {"accuracy": None},
    ):
        assert measures_fault({**fine, **more}, needed=needed), more
    for more in ({"accuracy": 10**400}, {"accuracy": True}, {f"m{n}": n for n in range(20)}):
        assert measures_fault({**fine, **more}, needed=needed), more
    assert "no accuracy" in (measures_fault({"loss": 1.0}, needed=needed) or "")
    assert "no accuracy, loss" in (measures_fault(None, needed=needed) or "")
    assert measures_fault({**fine, "rank": 3}, needed=needed, known=needed)
    assert measures_fault({"loss": None, "accuracy": None}, needed=needed, known=needed) is None


def test_figures_are_numbers_that_can_be_written_down() -> None:
    assert figures_fault(steps=3, seconds=0.1) is None
    for wrong_one in (-1, float("nan"), float("inf"), 10**400, True, None, "3"):
        assert figures_fault(steps=1, seconds=wrong_one) == "seconds is no usable number"


def test_what_is_marked_private_is_named() -> None:
    content = honest()
    content["method"]["own"] = seal(torch.ones(2))
    assert wrong(content) == "method/own is marked as private to a client"


def test_size() -> None:
    assert size_fault(bytes(10), 10) is None
    assert "11 bytes" in (size_fault(bytes(11), 10) or "")


# ------------------------------------------------------------ every method
@pytest.fixture(scope="module")
def prepared(tiny_bert: Path, silos: Path) -> Callable[[str], Prepared]:
    def make(name: str) -> Prepared:
        return prepare(
            tiny_job(
                tiny_bert, silos, method={"name": name}, train={"local_steps": 1}, run={"rounds": 5}
            )
        )

    return make


@pytest.mark.parametrize("name", names())
def test_no_honest_message_of_any_method_is_refused(
    name: str, prepared: Callable[[str], Prepared]
) -> None:
    """Five rounds: warm-ups, clusterings and tiers included; with each update alone, as ``sift``
    may try it.
    """
    here = prepared(name)
    state = here.method.begin(list(here.clients.values()))
    for round in range(1, 6):

        def offer(client: str, round: int = round, state: Any = state) -> Any:
            opened = here.method.open(state, round)
            content = here.method.offer(opened, round, here.clients[client])
            content = here.head.beside(content, None, newcomer=False)
            assert offer_fault({"offer": content}, sites=here.base.sites) is None
            return content

        updates = []
        for arrival in here.engine.train(round, list(here.clients), offer):
            update = arrival.update
            client = here.clients[update.client]
            found = fault(
                update.content,
                method=here.method,
                client=client,
                offer={},
                round=round,
                head=here.head.initial,
            )
            assert found is None
            updates.append(replace(update, content=update.content["method"]))
        for update in updates:
            alone, out = sift(partial(here.method.aggregate, state, round), [update])
            assert not out
            assert alone is not None
        state = here.method.aggregate(state, round, updates)


# ------------------------------------------------------------ trying the server's half
def updates(**broken: Any) -> list[Update]:
    found = []
    for name in ("a", "b", "c", "d"):
        adapter = {site: Factors(torch.randn(3, 6), torch.randn(5, 3), 2.0) for site in SITES}
        found.append(Update(name, 10, {"adapter": broken.get(name, adapter)}))
    return found


def aggregated(given: Any) -> Any:
    whole = method()
    return whole.aggregate(whole.begin([]), 1, given)


def test_sift_gives_what_aggregation_gives() -> None:
    given = updates()
    state: Any
    state, out = sift(aggregated, given)
    assert out == []
    for site, factors in aggregated(given)["global"].items():
        assert torch.equal(state["global"][site].A, factors.A)


@pytest.mark.parametrize(
    "broken",
    [
        {},  # nothing in it: fails beside the others
        {Q: Factors(torch.ones(3, 6), torch.ones(5, 3), 2.0)},  # a layer is missing
        {
            site: Factors(torch.ones(2, 6), torch.ones(5, 2), 2.0) for site in SITES
        },  # another rank than the others
    ],
)
def test_the_one_that_spoils_the_aggregate_is_left_out_and_the_others_count(broken: Any) -> None:
    given = updates(c=broken)
    state: Any
    state, out = sift(aggregated, given)
    assert [name for name, _ in out] == ["c"]
    expected = aggregated([update for update in given if update.client != "c"])
    for site, factors in expected["global"].items():
        assert torch.equal(state["global"][site].A, factors.A)


def test_an_update_that_makes_the_state_infinite_is_left_out() -> None:
    def explode(given: Any) -> Any:
        return {"x": torch.stack([u.content["x"] for u in given]).prod(0)}

    given = [
        Update(name, 1, {"x": torch.tensor([1e30 if name == "b" else 1e10])}) for name in "abc"
    ]
    state: Any
    state, out = sift(explode, given)
    assert [name for name, _ in out] == ["b"]
    assert torch.equal(state["x"], torch.tensor([1e20]))


def test_nobody_is_blamed_where_no_single_one_explains_it() -> None:
    def never(given: Any) -> Any:
        if len(given) > 1:
            raise ValueError("two are too many")
        return {}

    state: Any
    state, out = sift(never, updates()[:3])
    assert state is None
    assert [name for name, _ in out] == ["a", "b", "c"]


@pytest.mark.parametrize("honest_first", [True, False])
def test_an_update_without_a_layer_takes_it_from_nobody(honest_first: bool) -> None:
    fedit = method()
    state = fedit.begin([CLIENT])
    whole = dict(state["global"])
    layer = next(iter(whole))
    given = [
        Update("honest", 10, {"adapter": whole}),
        Update(
            "hostile",
            10,
            {"adapter": {name: factors for name, factors in whole.items() if name != layer}},
        ),
    ]

    def combine(updates: Sequence[Update]) -> Any:
        after = fedit.aggregate(state, 1, updates)
        refuse_loss(state, after, fedit.setting.sites)
        return after

    after, out = sift(combine, given if honest_first else given[::-1])
    assert [name for name, _ in out] == ["hostile"]
    assert f"would lack the layer {layer}" in out[0][1]
    assert after is not None
    assert set(after["global"]) == set(whole)
