"""What is asked for on the command line, and what is refused in one sentence."""

from __future__ import annotations

import pytest

from fedgrove.compare.entries import (
    Entry,
    Knob,
    parse_methods,
    parse_seeds,
    parse_tune,
    trial_name,
    trials,
)
from fedgrove.ground.errors import JobError


def test_methods_have_their_own_options_and_labels() -> None:
    found = parse_methods(
        'fedit, fedtreelora[fixed_k=2, distance="a,b"],fixed: fed-plora[ selection = magnitude ]'
    )
    assert found == [
        Entry("fedit", "fedit"),
        Entry(
            'fedtreelora[fixed_k=2, distance="a,b"]', "fedtreelora", ("fixed_k=2", 'distance="a,b"')
        ),
        Entry("fixed", "fed-plora", ("selection=magnitude",)),
    ]
    assert found[2].settings == ["method.name=fed-plora", "method.selection=magnitude"]
    assert parse_methods(["fed-hello[layers=[1, 2], x=1]"])[0].options == ("layers=[1, 2]", "x=1")


def test_a_label_becomes_a_directory() -> None:
    assert Entry("fedtreelora[fixed_k=2, tau=0.1]", "").slug == "fedtreelora-fixed_k=2-tau=0.1"
    assert Entry("../évil / name", "").slug == "vil-name"
    assert Entry("…", "").slug == "entry"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no method"),
        ("fedit,fedit", "'fedit' twice"),
        ("a b: fedit, a-b: local", "'a b' and 'a-b'"),
        ("fedit fedsa", "'fedit fedsa', which is no method"),
        ("fedit[weights=uniform", "no method"),
        ("fedit[weights]", "'weights' in fedit[weights]"),
        ("fedit[train.lr=1]", "--set"),
        ("fedit[name=local]", "before the bracket"),
    ],
)
def test_wrong_methods(text: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_methods(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seeds() -> None:
    assert parse_seeds("0, 2,1") == [0, 2, 1]
    assert parse_seeds([3, 4]) == [3, 4]
    for text, words in {
        "0,one": "'one'",
        "-1": "'-1'",
        "": "''",
        "1.5": "'1.5'",
        "1,1": "1 twice",
    }.items():
        with pytest.raises(JobError, match="--seeds has " + words):
            parse_seeds(text)


def test_values_to_tune() -> None:
    assert parse_tune(["lr=1e-4, 3e-4"]) == [Knob("lr", "train.lr", (1e-4, 3e-4))]
    assert parse_tune(["train.lr=1e-4,1"]) == [Knob("train.lr", "train.lr", (1e-4, 1))]
    both = parse_tune(["lr=1e-4,1e-3", "lora.alpha=8,16"])
    assert trials(both) == [
        (("train.lr", 1e-4), ("lora.alpha", 8)),
        (("train.lr", 1e-4), ("lora.alpha", 16)),
        (("train.lr", 1e-3), ("lora.alpha", 8)),
        (("train.lr", 1e-3), ("lora.alpha", 16)),
    ]
    assert [trial_name(trial) for trial in trials(both)][1] == "lr=0.0001,lora.alpha=16"
    assert trials([]) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr", "'lr', which is no key with values"),
        ("lr=1e-3", "--set train.lr=VALUE"),
        ("lr=1e-3,1e-3", "different values"),
        ("lr=fast,1e-3", '"fast", which is no number'),
        ("lr=true,1", "true, which is no number"),
        ("lr=nan,1", "no number"),
        ("rate=1,2", "rate is no key that can be tuned"),
        ("run.rounds=1,2", "budget"),
        ("local_steps=1,2", "budget"),
        ("federation.clients=2,3", "all methods share"),
        ("method.tau=1,2", "NAME[tau=...] in --methods"),
    ],
)
def test_wrong_tuning(text: str, words: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_tune([text])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_is_tuned_once() -> None:
    with pytest.raises(JobError, match=r"train\.lr twice"):
        parse_tune(["lr=1,2", "train.lr=3,4"])
