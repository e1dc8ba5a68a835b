from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgrove.federation import build
from fedgrove.federation.assets import ASSETS
from fedgrove.federation.instructions import TASKS_OF, file_of, natural_instructions
from fedgrove.job import Job

PREFIX = "Definition: In this task you do things. Emphasis: well.  Prompt: Do the thing."


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The asset's 61 files with six rows each, one of them without an answer."""
    for tasks in TASKS_OF.values():
        for task in tasks:
            rows = [
                {"input": f"Sentence: {task} {i}", "target": [f"first {i}", f"second {i}"]}
                for i in range(6)
            ]
            rows.append({"input": "Sentence: unanswered", "target": [" "]})
            (tmp_path / file_of(task)).write_text(
                json.dumps({"task_prefix": PREFIX, "examples": rows})
            )
    monkeypatch.setattr("fedgrove.federation.sources.embedded.asset", lambda name: tmp_path)
    return tmp_path


def test_rows(asset: Path) -> None:
    rows = list(natural_instructions(asset))
    assert len(rows) == 61 * 6
    assert rows[0] == {
        "prompt": "Do the thing.\nSentence: 001_quoref_question_generation 0",
        "full_prompt": f"{PREFIX}\nSentence: 001_quoref_question_generation 0",
        "input": "Sentence: 001_quoref_question_generation 0",
        "completion": ["first 0", "second 0"],
        "task": "001_quoref_question_generation",
        "source": "quoref",
    }
    assert len({row["source"] for row in rows}) == 9


def test_every_file_is_fetched() -> None:
    assert set(ASSETS["natural-instructions"].members) == {
        file_of(t) for tasks in TASKS_OF.values() for t in tasks
    }


def test_tasks_are_clients_or_groups_of_clients(asset: Path) -> None:
    named = ["data.name=natural-instructions"]
    natural = build(
        Job.parse("").override(
            [*named, "data.group=task", 'data.groups=["03[3-5]_*"]', "data.partition.by=natural"]
        )
    )
    assert [client.name for client in natural.clients] == [
        t for t in TASKS_OF["winogrande"] if t[:3] >= "033"
    ]
    row = natural.clients[0].train[0]
    assert row["prompt"].startswith("Do the thing.\nSentence: 033_winogrande_answer_generation")
    assert row["references"] == [row["completion"], row["completion"].replace("first", "second")]
    grouped = build(
        Job.parse("").override(
            [*named, "data.group=source", "data.partition.by=iid", "federation.clients=18"]
        )
    )
    assert {client.group for client in grouped.clients} == set(TASKS_OF)
    assert len(grouped.clients) == 18
    full = build(
        Job.parse("").override([*named, "data.partition.by=iid", "data.prompt=full_prompt"])
    )
    assert full.clients[0].train[0]["prompt"].startswith("Definition: ")


@pytest.mark.slow
def test_the_real_data() -> None:
    from fedgrove.federation.assets import asset as fetch

    rows = list(natural_instructions(fetch("natural-instructions")))
    assert len(rows) == 193_249  # one of the 193,250 has no answer
    assert all(row["prompt"].strip() and row["completion"][0].strip() for row in rows)
