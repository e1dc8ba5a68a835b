"""Files as people have them: JSON lists, separators, encodings, own test files, odd names."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.tiny import picture

from fedgrove.federation import Federation, build
from fedgrove.federation.readers import Remarks, records
from fedgrove.ground.errors import DataError
from fedgrove.job import Job

MakeJob = Callable[..., Job]
HEADER = ["text", "label"]


def table(count: int = 24, labels: tuple[Any, ...] = ("unwell", "well"), word: str = "day") -> Any:
    rows = [
        (f"{word} {i}: calm; better, \tsaid Zoë", labels[i % len(labels)]) for i in range(count)
    ]
    return pd.DataFrame(rows, columns=HEADER)


@pytest.fixture
def silos(make_job: MakeJob, tmp_path: Path) -> Callable[..., Job]:
    (tmp_path / "silos").mkdir()
    return lambda *settings: make_job(
        "data.source=silos", f"data.path='{tmp_path / 'silos'}'", *settings
    )


# ------------------------------------------------------------------------ own test rows


@pytest.mark.parametrize(
    ("train", "test"), [("north_train.csv", "north_test.csv"), ("A Train.csv", "A TEST.csv")]
)
def test_two_files_of_one_client_are_not_two_clients(
    train: str, test: str, silos: Callable[..., Job], tmp_path: Path
) -> None:
    for name in (train, test, "south.csv"):
        table().to_csv(tmp_path / "silos" / name, index=False)
    with pytest.raises(DataError, match="read like the training and test rows of one client"):
        build(silos())


def test_test_rows_that_were_trained_on_are_said(silos: Callable[..., Job], tmp_path: Path) -> None:
    for name, overlap in (("north", 4), ("south", 0)):
        folder = tmp_path / "silos" / name
        folder.mkdir()
        rows = table(32)
        rows[: 24 + overlap].to_csv(folder / "train.csv", index=False)
        rows[24:].to_csv(folder / "test.csv", index=False)
    remarks = build(silos()).remarks
    assert remarks == (
        "Test rows that are among the training rows too, word for word: 4 of 8 of north.",
    )


# ------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    ("kinds", "labels", "said"),
    [
        (((0, 1), (0.0, 1.0), ("0", "1")), ("0", "1"), 0),  # a column of numbers has one spelling
        (((0, 1), ("0.0", "1.0"), (" 0 ", "1 ")), ("0", "1"), 2),
        (((True, False), (1, 0), ("TRUE", "False")), ("0", "1"), 2),
        ((("1", "one"), ("one", "1")), ("1", "one"), 0),
    ],
)
def test_spellings_of_one_label_are_one_class(
    kinds: tuple[tuple[Any, Any], ...],
    labels: tuple[str, ...],
    said: int,
    silos: Callable[..., Job],
    tmp_path: Path,
) -> None:
    for number, pair in enumerate(kinds):
        frame = table(labels=pair)
        if number % 2 and not isinstance(pair[0], str):
            frame.to_parquet(tmp_path / "silos" / f"{number}.parquet")
        else:
            frame.to_csv(tmp_path / "silos" / f"{number}.csv", index=False)
    found = build(silos())
    assert found.labels == labels
    assert len(found.remarks) == said
    for client in found.clients:
        assert {row["label"] for row in client.train} == set(labels)
    if said:
        assert "are taken for one, '0'." in found.remarks[0]


def test_spellings_are_one_class_before_a_table_is_split(make_job: MakeJob, tmp_path: Path) -> None:
    frame = table(48, labels=("0", "1.0", "0.0", "1"))
    frame.to_csv(tmp_path / "all.csv", index=False)
    job = make_job(
        "data.source=table",
        f"data.path='{tmp_path / 'all.csv'}'",
        "federation.clients=2",
        "data.partition.by=pathological",
        "data.partition.options={num_classes_per_partition=1}",
    )
    assert build(job).labels == ("0", "1")
    held = [Counter(row["label"] for row in client.train) for client in build(job).clients]
    assert sorted(map(sorted, held)) == [["0"], ["1"]]


def test_labels_that_a_job_names_are_found_in_any_spelling(
    silos: Callable[..., Job], tmp_path: Path
) -> None:
    table(labels=("0.0", "1.0")).to_csv(tmp_path / "silos" / "a.csv", index=False)
    table(labels=(False, True)).to_csv(tmp_path / "silos" / "b.csv", index=False)
    found = build(silos('data.labels=["0", "1"]'))
    assert found.labels == ("0", "1")
    assert {row["label"] for client in found.clients for row in client.train} == {"0", "1"}
    with pytest.raises(DataError, match=r"b\.csv, line 2: the label 'False' is not in data\.label"):
        build(silos('data.labels=["0.0", "1.0", "2.0"]'))


# ------------------------------------------------------------------------ kinds of files


def found_in(path: Path, remarks: Remarks | None = None, **more: Any) -> list[dict[str, Any]]:
    return [values for _, values in records(path, HEADER, remarks=remarks, **more)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_objects(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(table(3).to_dict("records"), indent=indent))
    assert found_in(path) == table(3).to_dict("records")
    assert [place for place, _ in records(path, HEADER)] == [f"{path}, row {i}" for i in (1, 2, 3)]


def test_json_lines_under_another_ending(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n" + table(3).to_json(orient="records", lines=True))
    assert found_in(path) == table(3).to_dict("records")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"data": [\n{"text": "a"}]}', r"is one object, not a list of objects .* give the list"),
        ('{"text": "a"}', r"a\.json, line 1 has no column 'label'; it has: text"),
        ('["a", "b"]', r"a\.json, row 1 is not a JSON object"),
        ('"a"', r"a\.json is no list of objects"),
        ('[{"text": "a",\n}]', r"a\.json is not valid JSON: .* at line 2, column 1"),
        ("[{}]", r"a\.json, row 1 has no column 'text'; it has: none"),
    ],
)
def test_json_that_is_none(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=sentence):
        found_in(path)


@pytest.mark.parametrize(
    ("separator", "said"), [(",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")]
)
@pytest.mark.parametrize("first", ["", "sep=;\r\n"])
def test_separators_are_found_and_said(
    tmp_path: Path, separator: str, said: str, first: str
) -> None:
    path = tmp_path / "a.csv"
    lines = table(4).to_csv(index=False, sep=separator, lineterminator="\r\n")
    path.write_text(first.replace(";", separator) + lines, newline="")
    remarks = Remarks()
    assert found_in(path, remarks) == table(4).to_dict("records")
    assert remarks.sentences() == ([f"a.csv: read as separated by {said}."] if said else [])


def test_a_comma_comes_first_and_one_column_needs_no_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label;x\nfine,a;b\n")
    assert [values for _, values in records(path, ["text"])] == [{"text": "fine"}]
    path.write_text("text\na;b\n")
    assert [values for _, values in records(path, ["text"])] == [{"text": "a;b"}]


def test_wrong_columns_of_a_file_with_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("note;code;extra, more\nfine;1;x\n")
    with pytest.raises(
        DataError, match=r"has no column 'text'; it has: note, code, extra, more \("
    ):
        found_in(path)
    path.write_text("text;label\nfine;1;x\n")
    with pytest.raises(
        DataError, match=r"line 2 has 3 fields, but the header has 2; quote the sem"
    ):
        found_in(path)


def test_tabs_by_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "export.TSV"
    table(4).to_csv(path, index=False, sep="\t")
    remarks = Remarks()
    assert found_in(path, remarks) == table(4).to_dict("records")
    assert remarks.sentences() == []


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_encodings(tmp_path: Path, ending: str, encoding: str) -> None:
    path = tmp_path / f"a.{ending}"
    frame = table(3)
    if ending in ("csv", "tsv"):
        text = frame.to_csv(index=False, sep="," if ending == "csv" else "\t")
    else:
        text = frame.to_json(orient="records", lines=ending == "jsonl", force_ascii=False)
    path.write_bytes(text.encode(encoding))
    remarks = Remarks()
    if encoding == "cp1252":
        with pytest.raises(DataError, match=r"line \d is not UTF-8 text; .* in data\.encoding"):
            found_in(path)
        assert found_in(path, remarks, encoding="cp1252") == frame.to_dict("records")
        assert remarks.sentences() == []
        return
    assert found_in(path, remarks) == frame.to_dict("records")
    said = [f"a.{ending}: read as {encoding.upper()}, as the mark at its start says."]
    assert remarks.sentences() == (said if encoding in ("utf-16", "utf-32") else [])


def test_an_encoding_that_does_not_fit_or_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nZoë,a\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"line 2 is no text in ascii; correct data\.encoding"):
        found_in(path, encoding="ascii")
    with pytest.raises(DataError, match=r"data\.encoding = 'latin-99' is no encoding of text"):
        found_in(path, encoding="latin-99")


def test_what_is_said_of_many_files_is_said_once() -> None:
    remarks = Remarks()
    for name in "abcde":
        remarks.say("read as separated by tabs", f"{name}.csv")
    assert remarks.sentences() == ["a.csv, b.csv and 3 more files: read as separated by tabs."]


def test_lines_that_end_as_on_old_computers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(table(3).to_csv(index=False).encode().replace(b"\n", b"\r"))
    assert found_in(path) == table(3).to_dict("records")


# ------------------------------------------------------------------------ own test rows


def texts(found: Federation, name: str, part: str) -> set[str]:
    client = next(client for client in found.clients if client.name == name)
    return {row["text"] for row in getattr(client, part)}


def test_a_client_with_files_for_training_and_test(
    silos: Callable[..., Job], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        folder = tmp_path / "silos" / name
        folder.mkdir()
        table(12, word="learnt").to_csv(folder / "train.csv", index=False)
        table(5, word="asked").to_json(folder / "Test.json", orient="records")
        (folder / "README.md").write_text("notes")
    table(12, word="whole").to_csv(tmp_path / "silos" / "c.csv", index=False)
    table(4, word="tuned").to_csv(tmp_path / "silos" / "b" / "dev.tsv", index=False, sep="\t")
    found = build(silos())
    assert [client.name for client in found.clients] == ["a", "b", "c"]
    assert {text.split()[0] for text in texts(found, "a", "train")} == {"learnt"}
    assert [len(texts(found, "a", part)) for part in ("train", "test")] == [12, 5]
    assert {text.split()[0] for text in texts(found, "b", "validation")} == {"tuned"}
    assert len(texts(found, "c", "test")) == 3  # drawn
    before = found.source["sha256"]
    (tmp_path / "silos" / "a" / "Test.json").write_text(table(6).to_json(orient="records"))
    assert build(silos()).source["sha256"] != before


def test_a_column_that_says_what_rows_are_for(make_job: MakeJob, tmp_path: Path) -> None:
    frame = table(60)
    frame["part"] = ["Train", "train", "TEST", "training", "val"] * 12
    path = tmp_path / "all.csv"
    frame.to_csv(path, index=False)
    job = make_job(
        "data.source=table",
        f"data.path='{path}'",
        "data.split=part",
        "federation.clients=2",
        "data.partition.by=iid",
    )
    found = build(job)
    tests = set(frame[frame.part == "TEST"].text)
    validation = set(frame[frame.part == "val"].text)
    for client in found.clients:
        assert {row["text"] for row in client.test} <= tests
        assert {row["text"] for row in client.validation} <= validation
        assert not {row["text"] for row in client.train} & (tests | validation)
    assert sum(len(client.test) for client in found.clients) == len(tests)
    capped = build(job.override(["data.train_examples=4", "data.test_examples=2"]))
    assert [(len(c.train), len(c.test)) for c in capped.clients] == [(4, 2), (4, 2)]
    frame.loc[7, "part"] = "held back"
    frame.to_csv(path, index=False)
    with pytest.raises(
        DataError, match=r"line 9: the column 'part' is 'held back'; it must be one"
    ):
        build(job)
    frame["part"] = "train"
    frame.to_csv(path, index=False)
    with pytest.raises(
        DataError, match=r"the client 'client-00' has no rows for test; mark or add"
    ):
        build(job)


def test_a_validation_that_the_data_lack_is_drawn(
    silos: Callable[..., Job], tmp_path: Path
) -> None:
    folder = tmp_path / "silos" / "a"
    folder.mkdir()
    table(20, word="learnt").to_csv(folder / "train.csv", index=False)
    table(5, word="asked").to_csv(folder / "test.csv", index=False)
    found = build(silos("data.validation_fraction=0.2"))
    (client,) = found.clients
    assert (len(client.train), len(client.test), len(client.validation)) == (16, 5, 4)


def test_a_table_in_two_files(make_job: MakeJob, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    table(30, word="learnt").to_parquet(folder / "train.parquet")
    table(10, word="asked").to_parquet(folder / "test.parquet")
    job = make_job(
        "data.source=table",
        f"data.path='{folder}'",
        "federation.clients=2",
        "data.partition.by=iid",
    )
    for client in build(job).clients:
        assert {row["text"].split()[0] for row in client.test} == {"asked"}
    (folder / "more.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"names one file .*, or a folder with a file train and a"):
        build(job)


def test_what_is_no_division_is_named(silos: Callable[..., Job], tmp_path: Path) -> None:
    folder = tmp_path / "silos"
    table(12).to_csv(folder / "train.csv", index=False)
    table(12).to_csv(folder / "test.csv", index=False)
    with pytest.raises(DataError, match=r"holds what is for training and for the test, not one cl"):
        build(silos())
    for path in list(folder.iterdir()):
        path.unlink()
    (folder / "a").mkdir()
    table(12).to_csv(folder / "a" / "train.csv", index=False)
    with pytest.raises(
        DataError, match=r"silos/a is not a client's data file .* but a folder with"
    ):
        build(silos())
    for name in ("test.csv", "val.csv", "dev.csv"):
        table(12).to_csv(folder / "a" / name, index=False)
    with pytest.raises(DataError, match=r"dev\.csv and .*val\.csv are both for validation"):
        build(silos())
    (folder / "a" / "dev.csv").unlink()
    (folder / "a" / "val.csv").rename(folder / "a" / "Eval.csv")
    (client,) = build(silos()).clients
    assert len(client.validation) == 12


def put_pictures(folder: Path, count: int) -> None:
    draw = random.Random(str(folder))
    for label in ("red", "blue"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            picture(label, draw).save(folder / label / f"{number}.png")


def test_images_in_folders_for_training_and_test(make_job: MakeJob, tmp_path: Path) -> None:
    for client in ("a", "b"):
        put_pictures(tmp_path / "silos" / client / "train", 4)
        put_pictures(tmp_path / "silos" / client / "test", 2)
    job = make_job(
        "data.task=classify-images", "data.source=silos", f"data.path='{tmp_path / 'silos'}'"
    )
    found = build(job)
    assert [(len(c.train), len(c.test)) for c in found.clients] == [(8, 4), (8, 4)]
    assert all("/test/" in str(row["image"].content) for c in found.clients for row in c.test)
    one = job.override(
        [
            "data.source=table",
            f"data.path='{tmp_path / 'silos' / 'a'}'",
            "federation.clients=2",
            "data.partition.by=iid",
        ]
    )
    assert sum(len(client.test) for client in build(one).clients) == 4


def test_labels_called_train_and_test_are_labels(make_job: MakeJob, tmp_path: Path) -> None:
    put_pictures(tmp_path / "vehicles", 6)
    os.rename(tmp_path / "vehicles" / "red", tmp_path / "vehicles" / "train")
    os.rename(tmp_path / "vehicles" / "blue", tmp_path / "vehicles" / "test")
    job = make_job(
        "data.task=classify-images",
        "data.source=table",
        f"data.path='{tmp_path / 'vehicles'}'",
        "federation.clients=1",
        "data.partition.by=iid",
    )
    assert build(job).labels == ("test", "train")


# ------------------------------------------------------------------------ names


def test_clients_with_names_of_any_letters(silos: Callable[..., Job], tmp_path: Path) -> None:
    names = ["Klinik Köln", "北京 医院", "St. Mary's (A&E)", "Zu\u0308rich"]
    for name in names:
        table(8).to_csv(tmp_path / "silos" / f"{name}.csv", index=False)
    found = [client.name for client in build(silos()).clients]
    assert found == sorted(["Klinik Köln", "北京 医院", "St. Mary's (A&E)", "Zürich"])
