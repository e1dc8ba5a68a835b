"""One holder's rows: a file, or a folder with a file for training and one for the test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgrove.federation.purposes import marked, purposes_of
from fedgrove.federation.readers import Found, Place, Remarks, Values, records


def files_of(path: Path) -> dict[str, Path]:
    """``{"": file}``, or by purpose the files of a folder; {} where it holds anything else."""
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        return {}
    return purposes_of([each for each in sorted(path.iterdir()) if not passed_over(each)])


def passed_over(path: Path) -> bool:
    """Whether a file is hidden, or a note beside the data."""
    return path.name.startswith(".") or path.suffix.lower() in (".md", ".toml")


def rows_at(
    path: Path,
    columns: Sequence[str],
    encoding: str | None,
    remarks: Remarks | None = None,
) -> Found:
    """Each row with its place; of a folder, with what it is for."""
    for purpose, file in files_of(path).items():
        found: Iterator[tuple[Place, Values]] = records(file, columns, encoding, remarks)
        yield from marked(found, purpose) if purpose else found
