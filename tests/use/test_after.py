"""After a run: the common model as a client, tables of questions, and everybody's model on
everybody's data.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tests.tiny import save_bert, save_silos, tiny_job
from typer.testing import CliRunner

import fedgrove as fg
from fedgrove.cli.models import commands
from fedgrove.ground.errors import AdapterError, DataError, RunError
from fedgrove.use.result import Result


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    home = tmp_path_factory.mktemp("after")
    bert, silos = save_bert(home / "bert"), save_silos(home / "silos", clients=2)
    run = {"rounds": 1, "out": str(home / "run")}
    return fg.run(tiny_job(bert, silos, federation={"head": "shared"}, run=run))


def said(*words: str) -> str:
    found = CliRunner().invoke(commands, list(words))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


def test_the_common_model_counts_as_a_client(result: Result, tmp_path: Path) -> None:
    assert result.models() == ["site-0", "site-1", "_global"]
    common = result.client("_global")
    assert common.predict(["good day"])[0] in ("negative", "positive")
    rows = sum(len(each) for each in result.tests.values())
    assert common.evaluate()["examples"] == rows
    assert (common.export(tmp_path / "out") / "adapter_config.json").exists()
    with pytest.raises(RunError, match="has no client 'site-9'; it has site-0, site-1, _global"):
        result.client("site-9")
    assert said("evaluate", str(result.path)).count("accuracy") == 2 * 3  # and balanced_accuracy


def test_a_common_model_without_a_trained_head_says_so(result: Result, tmp_path: Path) -> None:
    job = result.job.replace(federation={"head": "local", "newcomer_head": False})
    local = fg.run(job.replace(run={"out": str(tmp_path / "run")}))
    assert local.models()[-1] == "_global"
    assert local.answering() == local.names()
    with pytest.raises(AdapterError, match="has no head that was trained"):
        local.client("_global").predict(["good day"])
    for folder in (local.path / "adapters" / "_global", tmp_path / "moved", tmp_path / "merged"):
        if folder.name == "moved":
            local.client("_global").export(folder)
        if folder.name == "merged":
            local.client("_global").export(folder, merge=True)
        alone = fg.load(folder)
        assert alone.labels == ("negative", "positive")
        with pytest.raises(AdapterError, match="has no head that was trained"):
            alone.predict(["good day"])
        with pytest.raises(AdapterError, match="has no head that was trained"):
            said("predict", str(folder), "good day")
    assert fg.load(local.client("site-0").path).predict(["good day"])
    assert "head_trained" not in fg.load(result.path / "adapters" / "_global").card
    assert "_global" not in said("evaluate", str(local.path))


def test_a_table_is_answered_with_scores(result: Result, tmp_path: Path) -> None:
    table, out = tmp_path / "new.csv", tmp_path / "answers.csv"
    table.write_text("text\na good day\nvery sad\n", encoding="utf-8")
    asked = ("predict", str(result.path), "--client", "site-0", "--data", str(table))
    assert said(*asked).count("\t") == 2 * 2
    said(*asked, "--out", str(out))
    lines = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    model = result.client("site-0").model()
    texts = ["a good day", "very sad"]
    assert [line["asked"] for line in lines] == texts
    assert [line["predicted"] for line in lines] == model.predict(texts)
    for line, wanted in zip(lines, model.probabilities(texts).tolist(), strict=True):
        given = [float(line[f"score_{label}"]) for label in model.labels]
        assert given == pytest.approx(wanted, abs=1e-5)
    said(*asked, "--out", str(tmp_path / "answers.jsonl"))
    first = json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["predicted"] == max(first["scores"], key=first["scores"].__getitem__)
    with pytest.raises(DataError, match="exists already"):
        said(*asked, "--out", str(out))
    with pytest.raises(DataError, match=r"ends in \.csv or \.jsonl"):
        said(*asked, "--out", str(tmp_path / "answers.xlsx"))


def test_the_name_of_a_file_is_no_text_to_ask_about(result: Result, tmp_path: Path) -> None:
    table = tmp_path / "new.csv"
    table.write_text("text\na good day\n", encoding="utf-8")
    output = said("predict", str(result.path), "--client", "site-0", str(table))
    assert f"{table} is a file, and its name is asked about; for its rows, use --data" in output
    assert "is a file" not in said("predict", str(result.path), "--client", "site-0", "good day")
    with pytest.raises(RunError, match="one of the two"):
        said("predict", str(result.path), "--client", "site-0")


def test_everybodys_model_on_everybodys_data(result: Result) -> None:
    output = said("evaluate", str(result.path), "--on", "all", "--metrics", "accuracy,f1_macro")
    assert "accuracy: model" in output
    assert "f1_macro: model" in output
    found = json.loads((result.path / "matrix.json").read_text(encoding="utf-8"))
    assert list(found) == ["site-0", "site-1", "_global"]
    own = result.client("site-1").evaluate()["accuracy"]
    assert found["site-1"]["site-1"]["accuracy"] == own
    crossed = result.client("site-1").model().evaluate(result.tests["site-0"])
    assert found["site-1"]["site-0"]["loss"] == crossed["loss"]
    lines = list(
        csv.DictReader((result.path / "matrix.csv").read_text(encoding="utf-8").splitlines())
    )
    assert len(lines) == 3 * 2
    assert float(lines[0]["accuracy"]) == found["site-0"]["site-0"]["accuracy"]
    with pytest.raises(RunError, match="there is no measure 'bleu'"):
        said("evaluate", str(result.path), "--on", "all", "--metrics", "bleu")
