from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedgrove.federation.load import Silos, Table, load, rows_of
from fedgrove.ground.errors import DataError, JobError
from fedgrove.job import Job

MakeJob = Callable[..., Job]
WriteRows = Callable[[Path, list[dict[str, Any]]], Path]
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def silos(make_job: MakeJob, tmp_path: Path) -> Callable[..., Job]:
    """A job on the folder ``silos`` of this test."""
    folder = tmp_path / "silos"
    folder.mkdir()
    return lambda *settings: make_job("data.source=silos", f"data.path='{folder}'", *settings)


def table_of(job: Job) -> Table:
    table = load(job)
    assert isinstance(table, Table)
    return table


def silos_of(job: Job) -> Silos:
    loaded = load(job)
    assert isinstance(loaded, Silos)
    return loaded


# --- silos
# ------------------------------------------------------------


def test_one_client_a_file_with_columns_from_the_job(
    silos: Callable[..., Job], tmp_path: Path, write_rows: WriteRows
) -> None:
    folder = tmp_path / "silos"
    write_rows(folder / "clinic-2.jsonl", [{"words": "ache", "code": 3, "site": "north"}])
    (folder / "clinic-1.csv").write_text("site,code,words\nsouth,3,cough\nsouth,4,cold\n")
    for ignored in ("README.md", ".hidden", "job.toml"):
        (folder / ignored).write_text("no data")
    loaded = silos_of(silos("data.text=words", "data.label=code", "data.group=site"))
    assert list(loaded.clients) == ["clinic-1", "clinic-2"]
    assert loaded.clients["clinic-1"] == [
        {"text": "cough", "label": "3"},
        {"text": "cold", "label": "4"},
    ]
    assert loaded.groups == {"clinic-1": "south", "clinic-2": "north"}
    assert loaded.source["source"] == "silos"
    assert len(loaded.source["sha256"]) == 64
    assert silos_of(silos("data.text=words", "data.label=code")).groups == {
        "clinic-1": None,
        "clinic-2": None,
    }


def test_a_silo_belongs_to_one_group(
    silos: Callable[..., Job], tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = [
        {"text": "a", "label": "x", "site": "north"},
        {"text": "b", "label": "x", "site": "south"},
    ]
    write_rows(tmp_path / "silos" / "a.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"a\.jsonl, line 2: a silo belongs to one group, but 'site' is 'south' after",
    ):
        load(silos("data.group=site"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "clinic  1.jsonl",
            r"silos.clinic  1\.jsonl cannot name a client: .*letters, digits, single spaces",
        ),
        ("_mine.jsonl", r"_mine\.jsonl cannot name a client"),
        ("köln*.csv", r"köln\*\.csv cannot name a client"),
        ("x" * 65 + ".csv", r"x\.csv cannot name a client"),
        (
            "notes.xlsx",
            r"silos.notes\.xlsx is not a client's data file \(\.jsonl, \.json, \.csv, \.tsv, \.parquet\)",
        ),
        ("a.csv.gz", r"a\.csv\.gz is not a client's data file"),
    ],
)
def test_files_that_are_no_client(
    silos: Callable[..., Job], tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "silos" / name).write_text("")
    with pytest.raises(DataError, match=message):
        load(silos())


def test_folders_in_the_folder_are_refused(silos: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "silos" / "more.csv").mkdir()
    with pytest.raises(DataError, match=r"more\.csv is not a client's data file"):
        load(silos())


def test_two_files_of_one_name(
    silos: Callable[..., Job], tmp_path: Path, write_rows: WriteRows, rows: Rows
) -> None:
    write_rows(tmp_path / "silos" / "A.jsonl", rows(4))
    write_rows(tmp_path / "silos" / "a.csv", rows(4))
    with pytest.raises(DataError, match=r"A\.jsonl and .*a\.csv name the same client 'a'"):
        load(silos())


def test_missing_and_empty_folders_and_files(
    silos: Callable[..., Job], make_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"nowhere does not exist or is a file; data.path names a folder"
    ):
        load(make_job("data.source=silos", f"data.path='{tmp_path / 'nowhere'}'"))
    with pytest.raises(
        DataError,
        match=r"silos has no data files \(\.jsonl, \.json, \.csv, \.tsv, \.parquet\); put one file per client",
    ):
        load(silos())
    (tmp_path / "silos" / "a.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"a\.csv has no rows"):
        load(silos())


def test_a_label_outside_the_class_list(silos: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "silos" / "a.csv").write_text("text,label\nfine,pos\nwell,psitive\n")
    with pytest.raises(
        DataError,
        match=r"a\.csv, line 3: the label 'psitive' is not in data\.labels \('pos', 'neg'\)",
    ):
        load(silos("data.labels=['pos', 'neg']"))


# --- one table
# ------------------------------------------------------------


def test_a_table_keeps_what_the_partition_needs(
    make_job: MakeJob, tmp_path: Path, write_rows: WriteRows
) -> None:
    rows = [
        {"text": str(i), "label": i % 2, "site": f"s{i}", "age": 20 + i, "id": i} for i in range(4)
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    settings = ("data.source=table", f"data.path='{path}'", "data.group=site")
    table = table_of(make_job(*settings, "data.partition.options={partition_by='age'}"))
    assert table.rows[1] == {"text": "1", "label": "1"}
    assert table.columns == {
        "label": ["0", "1", "0", "1"],
        "site": ["s0", "s1", "s2", "s3"],
        "age": [20, 21, 22, 23],
    }
    assert table.group == "site"
    assert set(table_of(make_job(*settings[:2])).columns) == {"label"}


def test_bad_tables(make_job: MakeJob, tmp_path: Path, write_rows: WriteRows) -> None:
    def job(path: Path, *settings: str) -> Job:
        return make_job("data.source=table", f"data.path='{path}'", *settings)

    with pytest.raises(DataError, match=r"no\.csv does not exist or is a folder"):
        load(job(tmp_path / "no.csv"))
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(DataError, match=r"empty\.csv has no rows"):
        load(job(tmp_path / "empty.csv"))
    path = write_rows(
        tmp_path / "t.jsonl", [{"text": "a", "label": "x", "site": None, "age": None}]
    )
    with pytest.raises(
        DataError, match=r"t\.jsonl, line 1 has no column 'place'; it has: text, label, site, age"
    ):
        load(job(path, "data.group=place"))
    with pytest.raises(DataError, match=r"line 1: the column 'site' is empty"):
        load(job(path, "data.group=site"))
    with pytest.raises(DataError, match=r"line 1: the column 'age' is empty"):
        load(job(path, "data.partition.options={partition_by='age'}"))


# --- embedded
# ------------------------------------------------------------


def test_unknown_embedded_sets_and_columns(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgrove.federation.embedded import EMBEDDED, Embedded

    one = Embedded("sentiment", lambda folder: [{"text": "a", "label": "b", "domain": "c"}])
    monkeypatch.setattr("fedgrove.federation.sources.embedded.asset", lambda name: Path())
    monkeypatch.setitem(EMBEDDED, "sentiment", one)
    with pytest.raises(
        DataError,
        match="embedded set 'sentiment' has no column 'site'; it has: text, label, domain",
    ):
        load(make_job("data.group=site"))
    table = table_of(make_job("data.group=domain"))
    assert (table.rows, table.columns["domain"]) == ([{"text": "a", "label": "b"}], ["c"])
    assert table.source["licence"] == "MIT"
    job = make_job()
    other = job.model_copy(update={"data": job.data.model_copy(update={"name": "sentimental"})})
    with pytest.raises(
        JobError, match=r"'sentimental' is no embedded data set: take .*'sentiment'"
    ):
        load(other)


# --- hub
# ------------------------------------------------------------


@pytest.fixture
def hub(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """A data set in a folder, which goes through the same call as one of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    return lambda *settings: make_job(
        "data.source=hub", f"data.name='{tmp_path / 'set'}'", *settings
    )


def test_a_hub_data_set_gives_its_training_split(
    hub: Callable[..., Job], tmp_path: Path, write_rows: WriteRows
) -> None:
    write_rows(
        tmp_path / "set" / "train.jsonl",
        [{"text": "a", "label": 0, "id": 7}, {"text": "b", "label": 1, "id": 8}],
    )
    write_rows(tmp_path / "set" / "test.jsonl", [{"text": "c", "label": 0, "id": 9}])
    table = table_of(hub())
    assert table.rows == [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}]
    assert "split 'train'" in table.source["note"]
    with pytest.raises(DataError, match="has no column 'words'; it has: text, label, id"):
        load(hub("data.text=words"))


def test_class_numbers_of_the_hub_become_names(
    hub: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    whole = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"everything": whole})
    assert [row["label"] for row in table_of(hub()).rows] == ["yes", "no"]

    unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: {"train": unlabelled, "test": whole}
    )
    with pytest.raises(DataError, match="row 1 of split 'train': the column 'label' is empty"):
        load(hub())

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: {"dev": whole, "test": whole}
    )
    with pytest.raises(DataError, match="has no split 'train', only: dev, test"):
        load(hub())


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    hub: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, config: str | None) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong\ntrace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        load(hub())
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(tmp_path / "set"),
        "Couldn't reach the Hub",
        "data.name",
        "the network",
        json.dumps("silos"),
    ):
        assert part in message


def test_rows_of_one_file_for_an_evaluation(
    make_job: MakeJob, tmp_path: Path, write_rows: WriteRows
) -> None:
    job = make_job("data.text=words", "data.labels=['x', 'y']")
    path = write_rows(tmp_path / "new.jsonl", [{"words": "a", "label": "x", "id": 1}])
    assert rows_of(path, job) == [{"text": "a", "label": "x"}]
    with pytest.raises(
        DataError, match=r"new\.jsonl, line 1: the label 'z' is not in data\.labels"
    ):
        rows_of(write_rows(path, [{"words": "a", "label": "z"}]), job)
    with pytest.raises(DataError, match=r"new\.jsonl has no rows"):
        rows_of(write_rows(path, []), job)
    with pytest.raises(DataError, match=r"gone\.csv does not exist or is a folder"):
        rows_of(tmp_path / "gone.csv", job)


def test_several_hub_data_sets_are_groups_with_columns_of_their_own(
    hub: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = datasets.Dataset.from_dict(
        {"question": ["a", "b"], "sentence": ["c", "d"], "label": ["yes", "no"]}
    )
    single = datasets.Dataset.from_dict({"sentence": ["e", "f"], "mood": ["good", "bad"]})
    asked: list[tuple[str, str | None]] = []

    def given(name: str, config: str | None) -> dict[str, datasets.Dataset]:
        asked.append((name, config))
        return {"train": pairs if config == "qnli" else single, "validation": single}

    monkeypatch.setattr(datasets, "load_dataset", given)
    qnli = '{name = "qnli", config = "qnli", text = "question", pair = "sentence"}'
    sst = (
        '{name = "sst", dataset = "other", split = "validation", text = "sentence", label = "mood"}'
    )
    table = table_of(hub(f"data.parts=[{qnli}, {sst}]"))
    assert [config for _, config in asked] == ["qnli", None]
    assert asked[1][0] == "other"
    assert table.group == "part"
    assert table.columns["part"] == ["qnli", "qnli", "sst", "sst"]
    assert table.rows[0] == {"text": "a", "pair": "c", "label": "qnli: yes"}
    assert table.rows[3] == {"text": "f", "label": "sst: bad"}
    with pytest.raises(JobError, match=r"data\.label has no use with data\.parts"):
        hub(f"data.parts=[{qnli}]", "data.label=mood")
    with pytest.raises(DataError, match="has no split 'dev', only: train, validation"):
        load(hub('data.parts=[{name = "x", split = "dev"}]'))
