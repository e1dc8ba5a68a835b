"""The server's half is tried on updates, and those that cannot be used are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.methods import kit
from tests.wire.test_validate import SITES, Q, method

from fedgrove.adapters.adapter import Factors
from fedgrove.methods.contract import ClientInfo, Update
from fedgrove.wire.sift import not_finite, refuse_loss, sift

CLIENT = ClientInfo("a", 3, 10)


def updates(**broken: Any) -> list[Update]:
    found = []
    for name in ("a", "b", "c", "d"):
        adapter = {site: Factors(torch.randn(3, 6), torch.randn(5, 3), 2.0) for site in SITES}
        found.append(Update(name, 10, {"adapter": broken.get(name, adapter)}))
    return found


def aggregated(given: Any) -> Any:
    whole = method()
    return kit.aggregated(whole, whole.begin([]), 1, given)


def test_sift_gives_what_aggregation_gives() -> None:
    given = updates()
    state: Any
    state, out = sift(aggregated, given)
    assert out == []
    for site, factors in aggregated(given).whole.items():
        assert torch.equal(state.whole[site].A, factors.A)


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
    for site, factors in expected.whole.items():
        assert torch.equal(state.whole[site].A, factors.A)


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
    whole = dict(state.whole)
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
        after = kit.aggregated(fedit, state, 1, updates)
        refuse_loss(state, after, fedit.setting.sites)
        return after

    after, out = sift(combine, given if honest_first else given[::-1])
    assert [name for name, _ in out] == ["hostile"]
    assert f"would lack the layer {layer}" in out[0][1]
    assert after is not None
    assert set(after.whole) == set(whole)


def test_finite_updates_stay() -> None:
    assert not_finite({"a": torch.ones(2), "n": 3}) is None
    assert not_finite({"a": {"b": torch.tensor([1.0, float("inf")])}}) == (
        "a/b of its update holds numbers that are not finite"
    )
