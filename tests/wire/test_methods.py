"""What the methods send passes the wire's checks: every method, with every option of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from annotated_types import Ge
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from tests.tiny import tiny_job
from tests.wire.test_validate import SITES

from fedgrove.adapters.adapter import Factors
from fedgrove.adapters.tree import pack, unpack, walk
from fedgrove.engines.local import LocalEngine, prepare
from fedgrove.methods.contract import Setting
from fedgrove.methods.registry import method_class, names
from fedgrove.runs.stage import Stage
from fedgrove.wire.sift import sift
from fedgrove.wire.validate import fault, offer_fault

Options = dict[str, Any]


@pytest.mark.parametrize("name", names())
def test_no_honest_message_of_any_method_is_refused(
    name: str, tiny_bert: Path, silos: Path
) -> None:
    """Five rounds: warm-ups, clusterings and tiers included; with each update alone, as ``sift``
    may try it.
    """
    go_through(prepared(name, {}, tiny_bert, silos, rounds=5), alone=True)


# ------------------------------------------------------------ every option
def alternatives(field: FieldInfo) -> list[Any]:
    """Other values than the default; [] for plain numbers, which ``numbers_of`` changes."""
    if field.examples:
        return list(field.examples)
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind != NoneType]
    if field.annotation is not None and get_origin(field.annotation) is Literal:
        return [value for value in get_args(field.annotation) if value != field.default]
    if get_origin(kinds[0]) is Literal:
        return list(get_args(kinds[0]))
    if kinds == [bool]:
        return [not field.default]
    if kinds == [int]:
        least = next((each.ge for each in field.metadata if isinstance(each, Ge)), 0)
        return sorted({int(str(least)), 2 * field.default} - {field.default})
    if kinds == [float]:
        return []
    raise AssertionError("an option of this kind needs examples")


def numbers_of(kind: Any) -> Options:
    """A method's options that are plain numbers, each at another value."""
    fields = {key: field for key, field in kind.model_fields.items() if field.annotation is float}
    return {key: 0.5 if field.default > 0.5 else 0.75 for key, field in fields.items()}


def cases() -> Iterator[Any]:
    for name in names():
        kind = method_class(name).Options
        if numbers := numbers_of(kind):
            yield pytest.param(name, numbers, id=f"{name}-numbers")
        for key, field in kind.model_fields.items():
            for value in alternatives(field):
                with suppress(ValidationError):  # some go with others alone
                    kind.model_validate({key: value})
                    yield pytest.param(name, {key: value}, id=f"{name}-{key}-{value}")


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_no_option_makes_a_message_that_is_refused(
    name: str, options: Options, tiny_bert: Path, silos: Path
) -> None:
    go_through(prepared(name, options, tiny_bert, silos, rounds=4), alone=False)


def test_ranks_above_the_federations_travel_where_the_method_has_them(
    tiny_bert: Path, silos: Path
) -> None:
    here = prepared("hilora", {"tier_ranks": [8, 4, 2]}, tiny_bert, silos, rounds=4)
    assert go_through(here, alone=False) == 8
    assert here.method.setting.rank == 4


def test_a_router_of_many_experts_travels() -> None:
    """As many rows as the job's experts ask for, and no more."""
    kind: Any = method_class("fedlease")
    setting = Setting(sites=SITES, rank=3, alpha=6.0, rounds=4, seed=0)
    method = kind(kind.Options(experts=40), setting)
    router = {site: torch.ones(79, 6) for site in SITES}
    assert fault({"method": {"router": router}}, method=method) is None
    assert offer_fault({"router": router}, method=method) is None
    router = {site: torch.ones(80, 6) for site in SITES}
    assert "more than 79 on the short side" in (
        fault({"method": {"router": router}}, method=method) or ""
    )


# ------------------------------------------------------------ a run, message by message
def prepared(
    name: str, options: Options, bert: Path, silos: Path, rounds: int
) -> Stage[LocalEngine]:
    """Clients of different ranks where the method allows it."""
    changes: dict[str, Any] = {"method": {"name": name, **options}}
    if method_class(name).ranks == "mixed":
        changes["federation"] = {"ranks": [2, 4, 3]}
    return prepare(
        tiny_job(bert, silos, **changes, train={"local_steps": 1}, run={"rounds": rounds})
    )


def go_through(here: Stage[LocalEngine], *, alone: bool) -> int:
    """Every message as its bytes and back, checked as each side does. The highest rank of all."""
    highest = round = 0
    state = here.method.begin(list(here.clients.values()))

    def offer(client: str) -> Any:
        opened = here.method.open(state, round)
        content = here.method.offer(opened, round, here.clients[client])
        content = here.head.beside(content, None, newcomer=False)
        came = unpack(pack({"offer": content}))
        assert offer_fault(came, method=here.method) is None
        return content

    for round in range(1, here.job.run.rounds + 1):
        updates = []
        for arrival in here.engine.train(round, list(here.clients), offer):
            came = unpack(pack(dict(arrival.update.content)))
            assert fault(came, method=here.method, head=here.head.initial) is None
            ranks = [leaf.rank for _, leaf in walk(came) if isinstance(leaf, Factors)]
            highest = max([highest, *ranks])
            content = arrival.update.content["method"]
            updates.append(replace(arrival.update, content=content))
        for update in updates if alone else ():
            found, out = sift(partial(here.method.aggregate, state, round), [update])
            assert not out
            assert found is not None
        state = here.method.aggregate(state, round, updates)
    return highest
