"""The tasks beside classes and texts, from rows to what others load: both engines, both heads."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.rows import TASKS, row_of, save_rows, task_job, task_rows
from tests.test_run import adapters, summary
from tests.tiny import save_llama, unclipped, without_reports
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import fedgrove as fg
from fedgrove.adapters import Assembly, Extra, Term, fresh
from fedgrove.engines.flower.deployable import deployable
from fedgrove.federation.tasks import TASKS as TASK_CLASSES
from fedgrove.federation.tasks import HeadedTask
from fedgrove.federation.tasks.labels import Labels
from fedgrove.federation.tasks.regression import Regression
from fedgrove.federation.tasks.spans import Spans
from fedgrove.federation.tasks.tokens import Tokens
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.seeds import generator
from fedgrove.interop.models import load_base
from fedgrove.job import DataSection
from fedgrove.methods.contract import Step
from fedgrove.training.kernel import Kernel, Work
from fedgrove.training.loop import Clock
from fedgrove.use.predictions import predictions, questions_of, write

__all__ = ["virtual"]

AUTO = {
    "labels": AutoPeftModelForSequenceClassification,
    "regression": AutoPeftModelForSequenceClassification,
    "tokens": AutoPeftModelForTokenClassification,
    "spans": AutoPeftModelForQuestionAnswering,
}
OUTPUTS = {"labels": 2, "regression": 2, "tokens": 5, "spans": 2}
TEXT = "the good day was very bad"
ASKED: dict[str, Any] = {"spans": {"question": "what was it", "context": TEXT}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows") / "silos")


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("task", TASKS)
def test_both_engines_give_the_same_bytes(
    tiny_bert: Path, rows: Path, tmp_path: Path, task: str
) -> None:
    job = task_job(tiny_bert, rows, task, train={"cohort": 1})
    with without_reports():
        fg.run(job, tmp_path / "local")
        run_on(FakeGrid(3), job, tmp_path / "flower")
    assert adapters(tmp_path / "local") == adapters(tmp_path / "flower")
    assert summary(tmp_path / "local") == summary(tmp_path / "flower")


@pytest.mark.parametrize("head", ["pooled", "stock"])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_is_measured_loaded_asked_and_exported(
    tiny_bert: Path, rows: Path, tmp_path: Path, task: str, head: str
) -> None:
    job = task_job(tiny_bert, rows, task, model={"head": head}, train={"local_steps": 12})
    with without_reports():
        result = fg.run(job, tmp_path / "run")
    one = result.client("site-1")
    model = one.model()
    found = one.evaluate()
    assert found[result.summary["metric"]] == pytest.approx(one.summary["metric"], abs=1e-6)
    assert found["loss"] == pytest.approx(one.summary["loss"], rel=1e-4)
    measured = {}
    if one.model().kernel.task.wanted():
        measured = json.loads((one.path / "measures.json").read_text())["test"]
    assert {**found, **measured}.keys() == one.measures().keys()
    asked = [ASKED.get(task, TEXT)]
    (answer,) = one.predict(asked)
    _check_answer(task, answer)
    logits = model.logits(asked)
    one.export(tmp_path / "merged", merge=True)
    whole = fg.load(tmp_path / "merged")
    assert torch.allclose(whole.logits(asked), logits, atol=1e-4)
    if head == "stock":
        _check_theirs(task, one.path, tmp_path / "merged", tiny_bert, logits, answer)
    elif task == "tokens":  # one linear layer on each token: transformers' own class is the same
        _check_tagger(tmp_path / "merged", answer)
        assert not (tmp_path / "merged" / "head.safetensors").exists()
    else:
        assert (tmp_path / "merged" / "head.safetensors").exists()


def _check_answer(task: str, answer: Any) -> None:
    if task == "labels":
        assert set(answer) <= {"up", "down"}
    elif task == "regression":
        assert set(answer) == {"points", "length"}
        assert 50 < answer["points"] < 150, "in true units"
    elif task == "spans":
        assert answer["answer"] == TEXT[answer["start"] : answer["end"]]
        assert answer["answer"]
        assert 0 < answer["score"] <= 1
    else:
        assert all(TEXT[each["start"] : each["end"]] == each["text"] for each in answer)


def _check_theirs(
    task: str, folder: Path, merged: Path, bert: Path, logits: torch.Tensor, answer: Any
) -> None:
    """The adapter in PEFT's Auto class, and the merged model in a pipeline of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(str(bert))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AUTO[task].from_pretrained(str(folder), num_labels=OUTPUTS[task]).eval()
    if task == "spans":
        _check_answers(theirs, merged, tokenizer, logits)
        return
    with torch.no_grad():
        output = theirs(**tokenizer(TEXT, return_tensors="pt")).logits
    assert torch.allclose(output, logits, atol=1e-5)
    if task == "tokens":
        _check_tagger(merged, answer)
        return
    piped: Any = pipeline("text-classification", str(merged), top_k=None)
    row: Any = piped([TEXT])[0]
    scores = {each["label"]: each["score"] for each in row}
    if task == "labels":
        expected = dict(zip(("down", "up"), torch.sigmoid(logits[0]).tolist(), strict=True))
    else:
        expected = answer
    assert scores == pytest.approx(expected, rel=1e-4)


def _check_tagger(merged: Path, answer: Any) -> None:
    tagger = pipeline("token-classification", str(merged), aggregation_strategy="first")
    found = [(each["start"], each["end"], each["entity_group"]) for each in tagger(TEXT)]
    assert found == [(each["start"], each["end"], each["label"]) for each in answer]


def _check_answers(theirs: Any, merged: Path, tokenizer: Any, logits: torch.Tensor) -> None:
    """The two logits of each token, in PEFT's model and in the merged one. PEFT's own class is stepped
    around: its forward takes token_type_ids and does not hand them on.
    """
    asked = tokenizer(*ASKED["spans"].values(), return_tensors="pt")
    plain = AutoModelForQuestionAnswering.from_pretrained(str(merged)).eval()
    for model in (theirs.base_model, plain):
        with torch.no_grad():
            output = model(**asked)
        both = torch.stack([output.start_logits, output.end_logits], -1)
        assert torch.allclose(both, logits, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"head": "shared"}},
        {"federation": {"head": "frozen"}},
        {"federation": {"held_out": ["site-2"]}, "train": {"final_local_epochs": 1}},
        {"privacy": {"example_clip": 1.0, "example_noise": 0.5}},
    ],
    ids=["shared", "frozen", "held out", "example privacy"],
)
def test_heads_newcomers_and_privacy_hold(
    tiny_bert: Path, rows: Path, tmp_path: Path, task: str, changes: dict[str, Any]
) -> None:
    job = task_job(tiny_bert, rows, task, **changes)
    if task == "spans" and "privacy" in changes:
        with pytest.raises(
            JobError, match=r"privacy\.example_clip bounds an example, but .* as several"
        ):
            fg.run(job, tmp_path / "run")
        return
    with without_reports():
        result = fg.run(job, tmp_path / "run")
    assert all(row["metric"] is not None for row in result.summary["clients"].values())


@pytest.mark.parametrize("task", TASKS)
def test_a_cohort_is_its_members_one_by_one(tiny_bert: Path, task: str) -> None:
    """Shared and packed batches change training in float64 by rounding alone."""
    base = load_base(str(tiny_bert), task=task, dtype=torch.float64)
    learnt = SETTLED[task]
    kernel = Kernel(base, learnt, unclipped(batch_size=3, local_steps=4))
    works = []
    for number in range(3):
        head = learnt.new_head(base.hidden, generator(number, "head"))
        extras = {f"head.{name}": Extra(value.double()) for name, value in head.items()}
        draw = generator(number, "A")
        own = Term("own", fresh(base.sites, 2, 0.7, draw, dtype=torch.float64), train="AB")
        given = task_rows(9, number)
        examples = learnt.encode([_row(task, each) for each in given], base.processor)
        works.append(Work(Step(Assembly((own,), extras=extras)), examples, Clock(number, ("t",))))
    alone = [kernel.work(work) for work in works]
    together = kernel.train_together(works)
    assert kernel.hooked.packs
    for one, other in zip(alone, together, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-9)
        for name, extra in one.assembly.extras.items():
            assert torch.allclose(extra.value, other.assembly.extras[name].value, rtol=1e-9)


SETTLED: dict[str, HeadedTask[Any]] = {
    "labels": Labels(("down", "up"), max_length=32),
    "regression": Regression(("points", "length"), 32, (100.0, 0.4), (5.0, 0.1)),
    "tokens": Tokens(("down", "up"), max_length=32),
    "spans": Spans(max_length=16, stride=4),
}


def _row(task: str, values: dict[str, Any]) -> dict[str, Any]:
    """As the task's own ``row``."""
    kind: Any = DataSection
    data = kind(source="silos", path="mine", task=task, **TASKS[task])
    return TASK_CLASSES.find(task).row(values, data, "here")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("task", TASKS)
def test_other_kinds_of_files_are_read_and_answered(
    tiny_bert: Path, rows: Path, tmp_path: Path, task: str, kind: str
) -> None:
    lines = [json.loads(line) for line in (rows / "site-0.jsonl").read_text().splitlines()]
    _table(tmp_path / f"all.{kind}", lines)
    job = task_job(tiny_bert, rows, task, run={"rounds": 1})
    with without_reports():
        result = fg.run(job, tmp_path / "run")
    one = result.client("site-0")
    first = one.evaluate(rows / "site-0.jsonl")
    assert one.evaluate(tmp_path / f"all.{kind}") == first
    asked = [{key: each[key] for key in ("text", "question")} for each in lines]
    _table(tmp_path / f"asked.{kind}", asked)
    asked = questions_of(tmp_path / f"asked.{kind}", result.job)
    found = predictions(one.model(), asked)
    assert len(found) == len(lines)
    assert {len(each.scores) for each in found} == {2 if task == "labels" else 0}
    write(tmp_path / "answers.csv", found)
    with (tmp_path / "answers.csv").open(encoding="utf-8") as stream:
        assert json.loads(next(csv.DictReader(stream))["predicted"]) is not None


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pandas

    frame = pandas.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
        return
    for column in set(frame.columns) & {"label", "spans", "answers"}:
        frame[column] = [json.dumps(value) for value in frame[column]]
    frame.to_csv(path, index=False)


def test_sites_need_what_a_simulation_looks_up(tiny_bert: Path, rows: Path) -> None:
    for task, sentence in (
        ("labels", r"data\.labels is missing: .* the job must name the classes"),
        ("tokens", r"data\.labels is missing"),
        ("regression", r"data\.center is missing: .* must name the center of the targets"),
    ):
        with pytest.raises(JobError, match=sentence):
            deployable(task_job(tiny_bert, rows, task))
    known = {"center": [100.0, 0.4], "scale": [5.0, 0.1]}
    assert deployable(task_job(tiny_bert, rows, "regression", data=known)).data.center == (
        100.0,
        0.4,
    )


def test_a_head_without_a_bias_has_no_center(rows: Path, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama")
    job = task_job(llama, rows, "regression", model={"head": "stock"})
    with pytest.raises(JobError, match=r"data\.center = \[.*\] needs a head with a bias"):
        fg.run(job, tmp_path / "run")
    job = job.override(["data.center=[0.0, 0.0]"])
    with without_reports():
        result = fg.run(job, tmp_path / "run")
    assert result.job.data.scale[0] > 50


def test_metrics_of_other_answers_are_refused(tiny_bert: Path, rows: Path) -> None:
    for task, metric in (
        ("labels", "mcc"),
        ("regression", "f1"),
        ("tokens", "rmse"),
        ("spans", "f1"),
    ):
        with pytest.raises(JobError, match=f'"{metric}" .*the task "{task}"'):
            task_job(tiny_bert, rows, task, data={"metrics": [metric]})


def test_a_report_of_each(tiny_bert: Path, rows: Path, tmp_path: Path) -> None:
    for task, words in (
        ("labels", "f1_micro"),
        ("regression", "r2"),
        ("tokens", "entity_f1"),
        ("spans", "answer_f1"),
    ):
        result = fg.run(task_job(tiny_bert, rows, task), tmp_path / task)
        assert words in result.report.read_text(encoding="utf-8")


def test_a_text_without_words_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder = save_rows(tmp_path / "silos")
    with (folder / "site-0.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row_of(["good"]) | {"text": "\u200b", "spans": []}) + "\n")
    with pytest.raises(DataError, match="of which the tokenizer keeps no word; remove it"):
        fg.run(task_job(tiny_bert, folder, "tokens"), tmp_path / "run")
