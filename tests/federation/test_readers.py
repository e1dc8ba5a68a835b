from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fedgrove.federation.readers import fingerprint, label_of, records, text_of
from fedgrove.ground.errors import DataError


def read(
    path: Path, content: str | bytes, columns: tuple[str, ...] = ("text", "label")
) -> list[tuple[str, dict[str, Any]]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(records(path, columns))


def test_jsonl_csv_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": 'a, "quoted"\ntext', "label": "x"}, {"text": "ü", "label": "y"}]
    jsonl = read(
        tmp_path / "a.jsonl",
        '{"text": "a, \\"quoted\\"\\ntext", "label": "x", "id": 1}\n\n{"label": "y", "text": '
        '"ü"}\n',
    )
    table = read(tmp_path / "a.csv", '\ufefftext, label\n"a, ""quoted""\ntext",x\n\nü,y\n')
    parquet = tmp_path / "a.PARQUET"
    pyarrow.parquet.write_table(
        pyarrow.table({"id": [1, 2], **{key: [row[key] for row in rows] for key in rows[0]}}),
        parquet,
    )
    for found in (jsonl, table, list(records(parquet, ("text", "label")))):
        assert [row for _, row in found] == rows
    assert [place.removeprefix(str(tmp_path)) for place, _ in jsonl] == [
        "/a.jsonl, line 1",
        "/a.jsonl, line 3",
    ]
    assert [place.removeprefix(str(tmp_path)) for place, _ in table] == [
        "/a.csv, line 2",
        "/a.csv, line 5",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"text": "a", "label": "x"}\n{"text": "b"\n',
            r"a\.jsonl, line 2 is not valid JSON: .* at column 13",
        ),
        ('{"text": "a", "label": "x"}\n["b"]\n', r"a\.jsonl, line 2 is not a JSON object"),
        (
            '{"text": "a", "label": "x"}\n{"label": 1, "id": 2}\n',
            r"a\.jsonl, line 2 has no column 'text'; it has: label, id",
        ),
        ("{}", r"a\.jsonl, line 1 has no column 'text'; it has: none"),
        (
            b'{"text": "a", "label": "x"}\n{"text": "\xff"}',
            r"a\.jsonl, line 2 is not UTF-8 text; save the file as",
        ),
        pytest.param(
            '{"text": ' + "[" * 100_000,
            r"a\.jsonl, line 1 cannot be read as JSON \(nested too deeply\); correct or remove",
            id="deep",
        ),
        pytest.param(
            '{"text": ' + "1" * 5_000 + "}",
            r"a\.jsonl, line 1 cannot be read as JSON \(a number in it is too long\)",
            id="long",
        ),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words,label\na,x\n", r"a\.csv \(line 1\) has no column 'text'; it has: words, label"),
        (
            "text,label\na,x\nb, c,y\n",
            r"a\.csv, line 3 has 3 fields, but the header has 2; quote the commas",
        ),
        ('text,label\na,x\n"b,y\n', r"a\.csv, line 3 is not valid CSV"),
        ("text,label,text\na,x,b\n", r"a\.csv has the column 'text' twice"),
        ("text,label\na,x\n\xff,y\n".encode("latin-1"), r"a\.csv, line 3 is not UTF-8 text"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"text": "a", "label": "x"}]}', "has its rows inside 'data'; give that list"),
        (
            '{"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}',
            'as pandas writes them by default; write it with to_json(path, orient="records"',
        ),
        ('{"messages": [{"role": "user"}]}', "has no column 'text'"),
    ],
)
def test_one_object_around_all_rows(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", content)
    assert message in str(caught.value)


def test_a_list_in_a_file_called_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert [values for _, values in read(tmp_path / "a.jsonl", json.dumps(rows, indent=1))] == rows
    assert [values for _, values in read(tmp_path / "b.jsonl", "\n" + json.dumps(rows))] == rows


def test_a_column_of_many_texts_is_no_row_of_words() -> None:
    with pytest.raises(DataError, match="is a list of 2 texts; give a row for each of them"):
        text_of(["day 1: calm", "worse"], "text", "a.json, line 1")


def test_long_texts_fit_into_csv(tmp_path: Path) -> None:
    ((_, row),) = read(tmp_path / "a.csv", f"text,label\n{'word ' * 100_000},x\n")
    assert len(row["text"]) == 500_000


def test_bad_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file"):
        read(tmp_path / "a.parquet", "text,label\n")
    path = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["a"] * 1000, "label": list(range(1000))}), path
    )
    with pytest.raises(DataError, match=r"b\.parquet has no column 'words'; it has: text, label"):
        list(records(path, ("words",)))
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"c\.parquet is not a readable Parquet file"):
        read(tmp_path / "c.parquet", whole[:200] + b"\0" * 400 + whole[600:])


def test_unknown_kinds_and_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.xlsx is not a data file: give \.jsonl, \.json, \.csv"):
        list(records(tmp_path / "a.xlsx", ("text",)))
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=rf"{name} cannot be read: Is a directory"):
            list(records(tmp_path / name, ("text",)))


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_empty_texts(value: object) -> None:
    with pytest.raises(DataError, match=r"^here: the column 'text' is empty"):
        text_of(value, "text", "here")


def test_half_a_character_is_named(tmp_path: Path) -> None:
    """JSON can write it, but neither a tokenizer nor a file can."""
    ((place, row),) = read(
        tmp_path / "a.jsonl", '{"text": "well \\ud83d done", "label": "\\ud83d"}'
    )
    sentence = r"a\.jsonl, line 1: the column '{}' has a broken character, '\\ud83d', which is half of a pair; correct"
    with pytest.raises(DataError, match=sentence.format("text")):
        text_of(row["text"], "text", place)
    with pytest.raises(DataError, match=sentence.format("label")):
        label_of(row["label"], "label", place)
    assert text_of("well \U0001f600 done", "text", "here") == "well \U0001f600 done"


def test_texts_must_be_texts() -> None:
    assert text_of(" a ", "text", "here") == " a "
    with pytest.raises(DataError, match=r"^here: the column 'text' is a int, not a text"):
        text_of(3, "text", "here")


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, "3"),
        (3.0, "3"),
        ("3", "3"),
        (" spam ", "spam"),
        (True, "true"),
        (False, "false"),
        (0.5, "0.5"),
    ],
)
def test_labels_become_names(value: object, label: str) -> None:
    assert label_of(value, "label", "here") == label


@pytest.mark.parametrize("value", [None, "", " ", float("nan")])
def test_empty_labels(value: object) -> None:
    with pytest.raises(DataError, match=r"^here: the column 'label' is empty"):
        label_of(value, "label", "here")


def test_a_label_is_one_value() -> None:
    with pytest.raises(DataError, match=r"^here: the column 'label' holds a list, not one value"):
        label_of(["a", "b"], "label", "here")


def test_the_fingerprint_depends_on_names_and_contents_not_on_order(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    both = fingerprint([one, two])
    assert fingerprint([two, one]) == both
    assert fingerprint([one]) != both
    two.write_text("3")
    assert fingerprint([one, two]) != both
