"""A client that comes after the run, for methods of each kind: from Python and from the command
line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_silos, sentences, tiny_job, without_reports

from fedgrove.cli import main
from fedgrove.federation.split import split
from fedgrove.ground.errors import DataError, FedgroveError, RunError
from fedgrove.interop.peft import read_adapter
from fedgrove.start import run
from fedgrove.use.adapt import adapt
from fedgrove.use.personal import load

METHODS = ["hilora", "fedit", "fedsa-lora", "local"]


@pytest.fixture(autouse=True)
def no_report() -> Iterator[None]:
    with without_reports():
        yield


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("adapt") / "silos", clients=4)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapt") / "clinic-9.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in sentences(60, seed=99)) + "\n")
    return path


def finished(bert: Path, silos: Path, out: Path, method: str, **changes: Any) -> Path:
    changes = {"federation": {"held_out": ["site-1"]}, **changes}
    run(tiny_job(bert, silos, method={"name": method}, **changes), out)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_a_newcomer_is_measured_trained_and_leaves_with_its_adapter(
    method: str, tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    out = finished(tiny_bert, four, tmp_path / "run", method)
    found = adapt(out, table)
    assert found.path == out / "adapted" / "clinic-9"
    assert (found.train, found.test) == (45, 15)
    assert list(found.measures) == ["zero-shot", "after 5 epochs"]
    assert found.measures["after 5 epochs"]["loss"] < found.measures["zero-shot"]["loss"]
    assert bool(found.placed) == (method == "hilora")
    assert found.head == "the mean of the clients' own heads"
    test = split("clinic-9", sentences(60, seed=99), seed=7, test_fraction=0.25).test
    assert load(found.path).evaluate(test) == pytest.approx(found.measures["after 5 epochs"])
    zero = adapt(out, table, epochs=0, out=tmp_path / "zero")
    assert zero.measures == {"zero-shot": found.measures["zero-shot"]}
    assert load(zero.path).evaluate(test) == pytest.approx(zero.measures["zero-shot"])
    trained, untrained = read_adapter(found.path)[0], read_adapter(zero.path)[0]
    assert any(not torch.equal(trained[site].B, untrained[site].B) for site in trained)


def test_fedit_starts_a_newcomer_from_the_global_model(
    tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    out = finished(tiny_bert, four, tmp_path / "run", "fedit")
    zero = adapt(out, table, epochs=0)
    mine, shared = read_adapter(zero.path), read_adapter(out / "adapters" / "_global")
    for site, factors in shared[0].items():
        assert torch.equal(mine[0][site].A, factors.A)
        assert torch.equal(mine[0][site].B, factors.B)
    assert all(torch.equal(mine[1][name], value) for name, value in shared[1].items())


def test_seeds_and_names_decide_the_split_and_the_training(
    tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    out = finished(tiny_bert, four, tmp_path / "run", "fedit")
    first = adapt(out, table, epochs=1)
    again = adapt(out, table, epochs=1, out=tmp_path / "again")
    other = adapt(out, table, epochs=1, seed=8, out=tmp_path / "other")
    assert first.measures == again.measures
    assert (first.path / "adapter_model.safetensors").read_bytes() == (
        again.path / "adapter_model.safetensors"
    ).read_bytes()
    assert first.measures != other.measures


@pytest.mark.parametrize(
    ("federation", "words"),
    [
        ({"head": "shared"}, "the clients' shared head"),
        ({"head": "frozen"}, "the frozen head that all clients share"),
        ({"head": "local", "newcomer_head": False}, "an untrained one"),
        ({"head": "local", "newcomer_head": True}, "the mean of the clients' own heads"),
    ],
)
def test_it_says_what_the_head_started_from(
    federation: dict[str, Any], words: str, tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    out = finished(
        tiny_bert, four, tmp_path / "run", "fedit", federation=federation, run={"rounds": 1}
    )
    assert adapt(out, table, epochs=0).head.startswith(words)


def test_the_command_prints_a_small_table(
    tiny_bert: Path, four: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished(tiny_bert, four, tmp_path / "run", "hilora")
    capsys.readouterr()
    assert (
        main(
            [
                "adapt",
                str(out),
                "--data",
                str(table),
                "--name",
                "new",
                "--epochs",
                "2",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    for expected in (
        "new: 45 training and 15 test examples, HiLoRA",
        "It joins cluster ",
        "zero-shot",
        "after 2 epochs",
    ):
        assert expected in text
    assert f"Wrote {out / 'adapted' / 'new'}." in text.replace("\n", "")
    assert load(out / "adapted" / "new").predict(["a good day"])[0] in ("negative", "positive")
    assert main(["adapt", str(out), "--data", str(table), "--name", "new"]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error
    assert error.count("\n") == 1


def test_refusals_are_one_sentence(
    tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    out = finished(tiny_bert, four, tmp_path / "run", "fedit", run={"rounds": 1})
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "a good day", "label": "maybe"}\n')
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a good day", "label": "positive"}\n')
    cases: list[tuple[dict[str, Any], type[FedgroveError], str]] = [
        ({"data": four / "site-0.jsonl"}, RunError, "'site-0' trained in"),
        ({"data": table, "name": "../x"}, DataError, "cannot name a client"),
        ({"data": table, "name": "_global"}, DataError, "cannot name a client"),
        ({"data": tmp_path / "nowhere.csv"}, DataError, "does not exist"),
        ({"data": wrong}, DataError, "'maybe' is not in data.labels"),
        ({"data": short}, DataError, "has 1 row"),
        ({"data": table, "out": out}, RunError, "exists already"),
    ]
    for arguments, kind, words in cases:
        with pytest.raises(kind) as caught:
            adapt(out, **arguments)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="does not exist"):
        adapt(tmp_path / "nothing", table)
    (out / "summary.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        adapt(out, table)
    assert not (out / "adapted").exists()


def test_a_damaged_checkpoint_is_one_sentence(
    tiny_bert: Path, four: Path, table: Path, tmp_path: Path
) -> None:
    out = finished(tiny_bert, four, tmp_path / "run", "fedit", run={"rounds": 1})
    (file,) = (out / "checkpoints").glob("server-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match=r"checkpoint in .* cannot be read"):
        adapt(out, table)
