"""Every registered method keeps what the contract and the protocols that it claims promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from tests.methods.kit import satisfies

from fedgrove.ground.errors import AdapterError
from fedgrove.methods.contract import ClientInfo, Mine, Trained, Update
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.registry import method_class, names


@pytest.mark.parametrize("name", names())
def test_a_method_keeps_what_it_promises(name: str) -> None:
    satisfies(method_class(name))


@pytest.mark.parametrize("name", ["fed-plora"])
@pytest.mark.parametrize("selection", ["magnitude", "gradient", "least_trained"])
def test_with_other_options_too(name: str, selection: str) -> None:
    satisfies(method_class(name), selection=selection)


def test_a_state_that_changes_under_hand_is_found() -> None:
    class Careless(FedIT):
        def aggregate(
            self, state: Whole, round: int, updates: Sequence[Update[OneAdapter]]
        ) -> Whole:
            state.whole.clear()
            return super().aggregate(state, round, updates)

    with pytest.raises(AssertionError, match="changed the state"):
        satisfies(Careless)


def test_a_kind_that_is_not_said_is_found() -> None:
    @dataclass(frozen=True, eq=False)
    class More(OneAdapter):
        note: str = ""

    class Talkative(FedIT):  # and its Sent is still OneAdapter
        def report(
            self,
            client: ClientInfo,
            trained: Sequence[Trained],
            offer: Whole,
            mine: Mine,
            round: int,
        ) -> tuple[OneAdapter, Mine]:
            return More(trained[-1].adapter("global"), "a word"), mine

    with pytest.raises(AdapterError, match="'note' is no field of OneAdapter"):
        satisfies(Talkative)
