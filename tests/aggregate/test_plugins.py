"""Rules of other packages: known to the command as soon as the method is, and the same in a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tests.aggregate.made import SITES, close, many, read
from tests.methods.kit import aggregated
from tests.methods.rules import CLIENTS, client_draws, method, sent

from fedgrove.adapters.adapter import Factors
from fedgrove.aggregate import aggregate
from fedgrove.ground.errors import AdapterError
from fedgrove.methods import registry
from fedgrove.methods.contract import Update, WeightedOptions
from fedgrove.methods.fedit import FedIT
from fedgrove.methods.local import Local
from fedgrove.methods.records import OneAdapter, Whole
from fedgrove.methods.rule import Arrived, Needs, Outcome, Round


class MedianOptions(WeightedOptions):
    spread: float = 1.0


@dataclass
class Median:
    """The median of each number, and how far apart the clients were, from a first pass."""

    options: MedianOptions
    round: Round
    seen: int = 0
    needs: ClassVar[Needs] = Needs(equal_ranks=True, equal_scales=True, options=("spread",))

    @property
    def measure(self) -> str:
        return "nothing at all"

    def look(self, given: Arrived) -> None:
        self.seen += len(given.factors)

    def weights(self, given: Sequence[float]) -> list[float]:
        return [self.options.spread / len(given)] * len(given)

    def site(self, given: Arrived) -> Outcome:
        A = torch.stack([each.A for each in given.factors]).quantile(0.5, 0)
        B = torch.stack([each.B for each in given.factors]).quantile(0.5, 0)
        return Outcome(whole=Factors(A, B * self.options.spread, given.factors[0].scale))

    def notes(self) -> list[str]:
        return [f"Saw {self.seen} factors."]

    def artefacts(self, clients: Sequence[str]) -> dict[str, Any]:
        return {"median.json": {"clients": list(clients), "seen": self.seen}}


class FedMedian(FedIT):
    name = "fedmedian"
    title = "FedMedian"
    Options = MedianOptions
    Rule = Median


class Stubborn(FedIT):
    """Aggregates in a way of its own."""

    name = "stubborn"
    title = "Stubborn"

    def aggregate(self, state: Whole, round: int, updates: Sequence[Update[OneAdapter]]) -> Whole:
        return Whole(updates[0].content.adapter)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    registry.METHODS.forget()


@pytest.fixture(params=["registered", "installed"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedMedian, as a notebook and as a package make it known."""
    if request.param == "registered":
        registry.register(FedMedian)
        return
    entry = EntryPoint("fedmedian", f"{__name__}:FedMedian", registry.GROUP)
    monkeypatch.setattr("fedgrove.ground.registry.entry_points", lambda group: [entry])
    registry.METHODS.forget()


@pytest.mark.usefixtures("known")
def test_the_command_applies_a_foreign_rule(tmp_path: Path) -> None:
    folders, factors = many(tmp_path, [3, 3, 3], [6.0, 6.0, 6.0])
    done = aggregate("fedmedian", folders, tmp_path / "out", weights="1,2,3", options=["spread=2"])
    assert done.adapters == ("_global",)
    assert done.notes == (
        "fedmedian weighs clients by nothing at all; --weights was not used.",
        f"Saw {3 * len(SITES)} factors.",
    )
    assert (tmp_path / "out" / "median.json").exists()
    for site, (a, b, scale) in read(tmp_path / "out" / "_global").items():
        close(a, np.median([each[site][0] for each in factors], axis=0))
        close(b, 2 * np.median([each[site][1] for each in factors], axis=0))
        assert scale == 2.0


@pytest.mark.usefixtures("known")
def test_what_a_foreign_rule_needs_is_asked_for(tmp_path: Path) -> None:
    folders, _ = many(tmp_path, [3, 2, 3], [6.0, 4.0, 6.0])
    with pytest.raises(AdapterError, match=r"has rank 2, but 3 .*fedmedian needs equal ranks"):
        aggregate("fedmedian", folders, tmp_path / "out")
    with pytest.raises(AdapterError, match="did you mean spread"):
        aggregate("fedmedian", folders, tmp_path / "out", options=["spred=2"])


@pytest.mark.usefixtures("known")
def test_a_run_applies_the_same_rule() -> None:
    chosen = method("fedmedian", rank=3, spread=3.0)
    adapters = client_draws(chosen, 1.0, (3, 3, 3))
    state = aggregated(chosen, chosen.begin(CLIENTS), 1, sent(adapters))
    for site, factors in state.whole.items():
        middle = torch.stack([each[site].B for each in adapters]).median(0).values
        torch.testing.assert_close(factors.B, 3.0 * middle)


def test_a_rule_is_not_inherited_by_who_aggregates_otherwise(tmp_path: Path) -> None:
    registry.register(Stubborn)
    folders, _ = many(tmp_path, [3, 3], [6.0, 6.0])
    with pytest.raises(AdapterError, match="stubborn has no offline rule: it states none"):
        aggregate("stubborn", folders, tmp_path / "out")


def test_a_foreign_method_says_why_it_has_none(tmp_path: Path) -> None:
    @registry.register
    class Silent(Local):
        name = "silent"
        title = "Silent"
        no_rule = "it never speaks"

    folders, _ = many(tmp_path, [3, 3], [6.0, 6.0])
    with pytest.raises(AdapterError, match="silent has no offline rule: it never speaks"):
        aggregate("silent", folders, tmp_path / "out")


def test_a_rule_that_gives_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="gave nothing"):
        Outcome()
