"""Which trees may come over the wire: an honest update passes, every tampered one is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedgrove.adapters.adapter import Factors, Site
from fedgrove.adapters.private import seal
from fedgrove.methods.contract import Setting
from fedgrove.methods.registry import method_class
from fedgrove.wire.validate import DEEPEST, fault, offer_fault, size_fault

SITES = {f"layer.{n}.query": Site(f"layer.{n}.query", n, 6, 5) for n in range(2)}
HEAD = {"weight": torch.zeros(2, 6), "bias": torch.zeros(2)}


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
    return fault(content, method=method(), head=HEAD)


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

    assert offer_fault(stack(5), method=method()) is None
    assert "above 5" in (offer_fault(stack(6), method=method()) or "")
    assert (
        offer_fault(stack(6), method=None) is None
    )  # nothing to compare with before the model is loaded
    assert "not finite" in (offer_fault({"offer": torch.tensor([float("nan")])}, method=None) or "")


def test_what_is_marked_private_is_named() -> None:
    content = honest()
    content["method"]["own"] = seal(torch.ones(2))
    assert wrong(content) == "method/own is marked as private to a client"


def test_size() -> None:
    assert size_fault(bytes(10), 10) is None
    assert "11 bytes" in (size_fault(bytes(11), 10) or "")


def test_a_message_of_many_levels_is_refused_and_ends_nothing() -> None:
    deep: Any = 1
    for _ in range(DEEPEST):
        deep = {"x": deep}
    assert wrong({"method": {"x": deep}}) == f"its parts are more than {DEEPEST} tables deep"
    for _ in range(5000):  # deeper than Python's own stack
        deep = {"x": deep}
    assert "tables deep" in (wrong({"method": deep}) or "")
