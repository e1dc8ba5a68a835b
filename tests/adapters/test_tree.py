"""Trees with records: a dataclass has the bytes of the dict of its fields, and comes back from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedgrove.adapters.adapter import Adapter, Factors
from fedgrove.adapters.private import PrivacyError, is_private, seal, unseal
from fedgrove.adapters.tree import (
    leaves,
    map_tensors,
    nbytes,
    numbers,
    pack,
    plain,
    table,
    typed,
    unpack,
)
from fedgrove.ground.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Branch:
    layer: int
    B: dict[str, Tensor]
    score: float | None = None


@dataclass(frozen=True, eq=False)
class State:
    whole: Adapter
    branches: list[Branch]
    by_name: dict[str, Branch]
    chosen: list[int] | dict[str, list[int]]
    first: Branch | None = None
    tier: Literal["root", "leaf"] = "root"
    holds: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Nothing:
    pass


def tensors() -> st.SearchStrategy[Tensor]:
    sizes = st.integers(0, 3)
    return st.builds(lambda n, m, fill: torch.full((n, m), fill), sizes, sizes, st.floats(-3, 3))


def factors() -> st.SearchStrategy[Factors]:
    return st.builds(Factors, tensors(), tensors(), st.floats(0.5, 4))


names = st.text("abz.", min_size=1, max_size=4)
branches = st.builds(
    Branch,
    st.integers(0, 9),
    st.dictionaries(names, tensors(), max_size=2),
    st.none() | st.floats(allow_nan=False),
)
states = st.builds(
    State,
    st.dictionaries(names, factors(), max_size=2),
    st.lists(branches, max_size=2),
    st.dictionaries(names, branches, max_size=2),
    st.lists(st.integers(), max_size=2)
    | st.dictionaries(names, st.lists(st.integers(), max_size=2), max_size=2),
    st.none() | branches,
    st.sampled_from(["root", "leaf"]),
    st.dictionaries(names, st.lists(names, max_size=2), max_size=2),
)


@given(states)
def test_a_record_has_the_bytes_of_its_fields_and_comes_back(state: State) -> None:
    as_dict = plain(state)
    assert type(as_dict) is dict
    assert all(type(each) is dict for each in as_dict["branches"])
    assert pack(state) == pack(as_dict)
    back = typed(State, unpack(pack(state)))
    assert isinstance(back, State)
    assert all(isinstance(each, Branch) for each in (*back.branches, *back.by_name.values()))
    assert pack(back) == pack(state)
    assert typed(State, state) is state


@given(states)
def test_every_walk_sees_a_record_as_the_dict_of_its_fields(state: State) -> None:
    as_dict = plain(state)
    assert [path for path, _ in leaves(state)] == [path for path, _ in leaves(as_dict)]
    assert numbers(state) == numbers(as_dict)
    assert nbytes(state) == nbytes(as_dict)
    doubled = map_tensors(state, lambda value: 2 * value)
    assert isinstance(doubled, State)
    assert pack(doubled) == pack(map_tensors(as_dict, lambda value: 2 * value))


def test_an_instance_inside_a_dict_stays_and_a_dict_inside_is_made() -> None:
    branch = Branch(1, {})
    state = typed(State, {"whole": {}, "branches": [branch], "by_name": {}, "chosen": []})
    assert state.branches[0] is branch
    assert state.first is None
    nested = typed(State, {**plain(state), "first": {"layer": 2, "B": {}}})
    assert isinstance(nested.first, Branch)
    assert nested.first.layer == 2


def test_a_dict_passes_through_and_nothing_is_made_of_nothing() -> None:
    value = {"any": [1, {"thing": None}]}
    assert typed(dict, value) is value
    assert isinstance(typed(Nothing, {}), Nothing)
    assert pack(Nothing()) == pack({})
    assert table("leaf") is None
    assert table(Factors(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)) is None
    assert table(State) is None  # the class is no instance


def test_what_is_private_is_refused_by_the_name_of_its_field() -> None:
    state = State({}, [Branch(0, {"q": seal(torch.ones(2))})], {}, [])
    with pytest.raises(PrivacyError, match="'branches/0/B/q' is private"):
        pack(state)
    with pytest.raises(PrivacyError, match="'branches/0/B/q' is private"):
        nbytes(state)
    back = typed(State, unpack(pack(state, private=True)))
    assert is_private(back.branches[0].B["q"])
    assert not is_private(map_tensors(back, unseal).branches[0].B["q"])


def test_what_no_tree_holds_is_refused_by_the_name_of_its_field() -> None:
    with pytest.raises(TypeError, match="'by_name' is a set"):
        pack(State({}, [], {1, 2}, []))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'by_name' has the key 3"):
        pack(State({}, [], {3: Branch(0, {})}, []))  # type: ignore[dict-item]


GOOD: dict[str, Any] = plain(State({}, [Branch(0, {})], {}, []))
ONE = Factors(torch.ones(1, 1), torch.ones(1, 1), 1.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"more": 1}, "'more' is no field of State, which has whole, branches, by_name"),
        ({"whole": None}, r"'whole' is None, where dict\[str, Factors\] is expected"),
        ({"whole": {"q": torch.ones(1)}}, "'whole/q' is a Tensor, where Factors is expected"),
        ({"branches": {}}, "'branches' is a dict, where list"),
        ({"branches": [{}]}, "'branches/0/layer' is missing, which Branch needs"),
        ({"branches": [{"layer": 1, "B": {}, "x": 2}]}, "'branches/0/x' is no field of Branch"),
        ({"branches": [{"layer": True, "B": {}}]}, "'branches/0/layer' is a bool, where int"),
        ({"branches": [{"layer": 1.0, "B": {}}]}, "'branches/0/layer' is a float, where int"),
        ({"branches": [{"layer": 1, "B": {"q": ONE}}]}, "'branches/0/B/q' is a Factors"),
        ({"by_name": {"a": 3}}, "'by_name/a' is a int, where Branch is expected"),
        ({"chosen": [0, "1"]}, "'chosen' is a list, where list"),
        ({"first": []}, "'first' is a list, where Branch is expected"),
        ({"tier": "stem"}, "'tier' is a str, where"),
    ],
)
def test_each_misfit_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdapterError, match=sentence) as found:
        typed(State, {**GOOD, **change})
    assert "\n" not in str(found.value)


def test_a_missing_field_and_a_whole_of_another_kind_are_refused() -> None:
    missing = {key: value for key, value in GOOD.items() if key != "chosen"}
    with pytest.raises(AdapterError, match="'chosen' is missing, which State needs"):
        typed(State, missing)
    with pytest.raises(AdapterError, match="The data is a list, where State is expected"):
        typed(State, [1])
    with pytest.raises(AdapterError, match="The data is a Branch, where State is expected"):
        typed(State, Branch(0, {}))
    assert typed(Branch, {"layer": 1, "B": {}, "score": 2}).score == 2


def test_an_annotation_that_no_tree_holds_is_the_authors_error() -> None:
    @dataclass
    class Odd:
        names: set[str]

    with pytest.raises(TypeError, match="'names' is annotated as set"):
        typed(Odd, {"names": []})
    with pytest.raises(TypeError, match=r"Unknown has an annotation that cannot be read"):
        typed(Unknown, {"x": 1})


@dataclass
class Unknown:
    x: NoSuchThing  # type: ignore[name-defined]  # noqa: F821


def test_no_class_is_looked_up_by_a_name_in_the_data() -> None:
    """Only what the caller names is made; a name in the data is data."""
    back = unpack(pack({"__class__": "Branch", "layer": 1, "B": {}}))
    assert type(back) is dict
    with pytest.raises(AdapterError, match="'__class__' is no field of Branch"):
        typed(Branch, back)
    assert asdict(typed(Branch, {"layer": 1, "B": {}}))["layer"] == 1
