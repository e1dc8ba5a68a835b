"""A model's answers to a whole table: classes with their probabilities, or texts, row by row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.federation.readers import KINDS, Row
from fedgrove.federation.tables import files_of, rows_at
from fedgrove.federation.tasks import task_class
from fedgrove.ground.errors import DataError
from fedgrove.ground.files import write_text
from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from fedgrove.federation.tasks.base import Task
    from fedgrove.job import Job
    from fedgrove.use.personal import ClientModel

SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Prediction:
    """One row's answer; ``scores`` by label, {} where the model writes."""

    row: int  # from 1
    asked: str
    predicted: str
    scores: dict[str, float]

    def flat(self) -> Plain:
        """A line of a table."""
        scores = {f"score_{label}": value for label, value in self.scores.items()}
        return {
            "row": self.row,
            "asked": self.asked,
            "predicted": self.predicted,
        } | scores


def questions_of(path: Path, job: Job) -> list[Row]:
    """The rows of a table with the job's columns but for the answer, which it need not have.
    Raises ``DataError``.
    """
    task, data = task_class(job.data), job.data
    if task.folders and path.is_dir():
        files = sorted(each for each in path.rglob("[!.]*") if each.is_file())
        if not files:
            raise DataError(f"the folder {path} has no images; name one with images in it")
        return [{task.asks: each} for each in files]
    if not files_of(path):
        raise DataError(f"the table {path} does not exist or is a folder; name one file ({KINDS})")
    answers = task.answer_columns(data)
    columns = [name for name in task.columns(data) if name not in answers]
    found = rows_at(path, columns, getattr(data, "encoding", None))
    rows = [task.question(values, data, place) for place, values in found]
    if not rows:
        raise DataError(f"the table {path} has no rows; give a file with rows")
    return rows


def predictions(model: ClientModel, rows: Sequence[Row]) -> list[Prediction]:
    """The model's answer to each row."""
    task = model.kernel.task
    if task.written(rows):
        examples = task.encode(rows, model.kernel.base.processor)
        told = model.kernel.generate(model.assembly, examples)
        scores: list[dict[str, float]] = [{} for _ in told]
    else:
        found = model.asked(rows)
        told = [_said(answer) for answer in found.answers]
        scores = found.scores
    answered: list[Prediction] = []
    for number, (row, answer, own) in enumerate(zip(rows, told, scores, strict=True), start=1):
        asked = _words(row.get(task.asks), f"row {number}")
        answered.append(Prediction(number, asked, answer, own))
    return answered


def _said(answer: object) -> str:
    """An answer as a cell of a table: a text as it is, anything else as JSON."""
    if isinstance(answer, str):
        return answer
    return json.dumps(answer, ensure_ascii=False)


def _words(asked: object, place: str) -> str:
    """What was asked, where it is a text or a file; else its row."""
    if isinstance(asked, str | Path):
        return str(asked)
    return place


def check_out(out: Path) -> None:
    """Raises ``DataError`` for a file that is no table, or is there."""
    if out.suffix.lower() not in SUFFIXES:
        raise DataError(f"--out {out}: name a file that ends in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise DataError(f"--out {out} exists already; name a new file")


def check_probs(task: type[Task]) -> None:
    """Raises ``DataError`` where there are no classes to have probabilities."""
    if not task.classifies:
        raise DataError(
            f"--probs: the task {task.name!r} has no classes; leave it out, the answer is printed"
        )


def write(out: Path, found: Sequence[Prediction]) -> None:
    """As CSV, a column for each score, or as JSON lines, by the file's ending."""
    if out.suffix.lower() == ".csv":
        write_text(out, table([each.flat() for each in found]))
        return
    lines: list[str] = []
    for each in found:
        line: Plain = {
            "row": each.row,
            "asked": each.asked,
            "predicted": each.predicted,
        }
        if each.scores:
            line["scores"] = each.scores
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(out, "\n".join(lines) + "\n")


def table(rows: Sequence[Plain]) -> str:
    """CSV with the first row's keys as its header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
