"""Preferences from rows to what others load: every method, both engines, clients that disagree."""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.stops import StopAfter
from tests.test_run import adapters, summary
from tests.tiny import BAD, FILLER, GOOD, save_bert, save_llama, tiny_job, without_reports
from transformers import AutoTokenizer
from typer.testing import CliRunner

import fedgrove as fg
from fedgrove.cli.models import commands
from fedgrove.compare import compare
from fedgrove.ground.errors import DataError, JobError, RunError
from fedgrove.integrations.trainer import simulated
from fedgrove.methods.registry import names
from fedgrove.use.predictions import predictions, questions_of

__all__ = ["virtual"]

TASKS = ("prefer", "reward")
TWO = {"prompt": "what is a day", "chosen": "it was good", "rejected": "it was bad"}


def rows(count: int, seed: int, *, opposed: bool = False) -> list[dict[str, Any]]:
    """Good words are preferred; with ``opposed`` bad ones."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = " ".join(["what is", *draw.choices(FILLER, k=draw.randint(1, 4))])
        good, bad = f"it was {draw.choice(GOOD)}", f"it was {draw.choice(BAD)}"
        chosen, rejected = (bad, good) if opposed else (good, bad)
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def save_pairs(folder: Path, clients: int = 3, count: int = 20, opposed: int = 0) -> Path:
    """One jsonl file for each client, of which the last ``opposed`` prefer the opposite."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(clients):
        own = rows(count + 2 * index, index, opposed=index >= clients - opposed)
        lines = [json.dumps(row) for row in own]
        (folder / f"site-{index}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(scope="module")
def silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pairs(tmp_path_factory.mktemp("pairs") / "silos")


def job_of(model: Path, folder: Path, task: str, /, **changes: dict[str, Any]) -> Any:
    data = {"task": task, **changes.pop("data", {})}
    train = {"lr": 1e-2, "local_steps": 4, **changes.pop("train", {})}
    run = {"rounds": 2, **changes.pop("run", {})}
    return tiny_job(model, folder, data=data, train=train, run=run, **changes)


@pytest.mark.usefixtures("virtual")
@pytest.mark.parametrize("task", TASKS)
def test_both_engines_give_the_same_bytes(
    llama: Path, silos: Path, tmp_path: Path, task: str
) -> None:
    job = job_of(llama, silos, task, train={"cohort": 1})
    with without_reports():
        fg.run(job, tmp_path / "local")
        run_on(FakeGrid(3), job, tmp_path / "flower")
    assert adapters(tmp_path / "local") == adapters(tmp_path / "flower")
    assert summary(tmp_path / "local") == summary(tmp_path / "flower")


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("task", TASKS)
def test_every_method_runs_both(
    llama: Path, silos: Path, tmp_path: Path, task: str, name: str
) -> None:
    rounds = 3 if name == "hilora" else 2
    job = job_of(llama, silos, task, run={"rounds": rounds}).override([f"method.name={name}"])
    with without_reports():
        result = fg.run(job, tmp_path / "run")
    for row in result.summary["clients"].values():
        assert 0 <= row["metric"] <= 1
        assert math.isfinite(row["loss"])
        assert task == "reward" or row["metric_base"] == 0.5


@pytest.mark.slow
def test_opposite_groups_need_a_part_of_their_own(llama: Path, tmp_path: Path) -> None:
    """Half of the clients prefer what the others reject: one model for all is right half the time,
    whatever it learns; personal ones learn both.
    """
    folder = save_pairs(tmp_path / "opposed", clients=4, count=40, opposed=2)
    found = {}
    for name in ("fedit", "fedsa-lora", "local"):
        job = job_of(
            llama,
            folder,
            "prefer",
            train={"lr": 2e-2, "local_steps": 15},
            run={"rounds": 3, "eval_every": 3},
        ).override([f"method.name={name}"])
        with without_reports():
            result = fg.run(job, tmp_path / name)
        found[name] = result.summary["mean"]
    assert found["fedit"] == pytest.approx(0.5, abs=0.1)
    assert found["fedsa-lora"] > 0.9
    assert found["local"] > 0.9


def test_a_resumed_run_has_the_same_reference(llama: Path, silos: Path, tmp_path: Path) -> None:
    job = job_of(llama, silos, "prefer", federation={"fraction": 0.7})
    with without_reports():
        fg.run(job, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            fg.run(job, tmp_path / "cut", callbacks=[StopAfter(1)])
        fg.run(job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert summary(tmp_path / "whole") == summary(tmp_path / "cut")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "changes",
    [
        {"federation": {"held_out": ["site-2"]}, "train": {"final_local_epochs": 1}},
        {"privacy": {"example_clip": 1.0, "example_noise": 0.5}},
        {"train": {"cohort": 3}, "method": {"name": "feddpa-t"}},
    ],
    ids=["held out", "example privacy", "cohort"],
)
def test_newcomers_privacy_and_cohorts_hold(
    llama: Path, silos: Path, tmp_path: Path, task: str, changes: dict[str, Any]
) -> None:
    with without_reports():
        result = fg.run(job_of(llama, silos, task, **changes), tmp_path / "run")
    assert all(row["metric"] is not None for row in result.summary["clients"].values())


def test_a_policy_is_measured_asked_and_loaded(llama: Path, silos: Path, tmp_path: Path) -> None:
    result = fg.run(job_of(llama, silos, "prefer", train={"local_steps": 12}), tmp_path / "run")
    drawn = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"preferences.png", "chosen.png"} <= drawn
    assert '--between "Paris."' in result.report.read_text(encoding="utf-8").replace("&#34;", '"')
    one = result.client("site-1")
    assert one.evaluate()["accuracy"] == pytest.approx(one.summary["metric"], abs=1e-6)
    (verdict,) = one.predict([TWO])
    assert verdict["preferred"] == "first"
    (other,) = one.predict([{**TWO, "chosen": TWO["rejected"], "rejected": TWO["chosen"]}])
    assert other["margin"] == pytest.approx(-verdict["margin"], rel=1e-4)
    (text,) = one.predict(["what is a day"])
    assert isinstance(text, str)
    with pytest.raises(
        DataError, match="prompt 2 is no object with 'prompt', 'chosen' and 'rejected'"
    ):
        one.predict([TWO, {"prompt": "what"}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = AutoPeftModelForCausalLM.from_pretrained(str(one.path)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(llama))
    task = one.model().kernel.task
    (example,) = task.encode([TWO], tokenizer)
    for place, key in enumerate(("input_ids", "rejected_ids")):
        ids = torch.tensor([list(example[key])])
        answer = ids[0, example["start"] :]
        ratio = 0.0
        for sign, adapted in ((1, True), (-1, False)):
            with torch.no_grad():
                if adapted:
                    logits = theirs(input_ids=ids).logits[0]
                else:
                    with theirs.disable_adapter():
                        logits = theirs(input_ids=ids).logits[0]
            each = logits[example["start"] - 1 : -1].log_softmax(-1)
            ratio += sign * float(each.gather(1, answer[:, None]).sum())
        assert ratio == pytest.approx(verdict["log_ratios"][place], abs=1e-4)


@pytest.mark.parametrize("save", [save_llama, save_bert], ids=["llama", "bert"])
def test_a_reward_model_leaves_as_one_label(save: Any, silos: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    job = job_of(model, silos, "reward", model={"head": "stock"}, train={"local_steps": 12})
    with without_reports():
        one = fg.run(job, tmp_path / "run").client("site-1")
    (verdict,) = one.predict([TWO])
    assert verdict["preferred"] == "first"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = AutoPeftModelForSequenceClassification.from_pretrained(
            str(one.path), num_labels=1
        ).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    batch = one.model().kernel.task.collate(
        one.model().kernel.task.encode([TWO], tokenizer), tokenizer.pad_token_id
    )
    theirs.config.pad_token_id = tokenizer.pad_token_id
    inputs = {
        key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch
    }
    with torch.no_grad():
        rewards = theirs(**inputs).logits[:, 0].tolist()
    assert rewards == pytest.approx(verdict["rewards"], abs=1e-4)
    one.export(tmp_path / "merged", merge=True)
    (again,) = fg.load(tmp_path / "merged").predict([TWO])
    assert again["rewards"] == pytest.approx(verdict["rewards"], abs=1e-4)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_other_kinds_of_files_are_read_and_answered(
    llama: Path, silos: Path, tmp_path: Path, kind: str
) -> None:
    import pandas

    own = [json.loads(line) for line in (silos / "site-0.jsonl").read_text().splitlines()]
    said = [
        {
            **row,
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in own
    ]
    frame = pandas.DataFrame(said)
    path = tmp_path / f"all.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        for column in ("chosen", "rejected"):
            frame[column] = [json.dumps(value) for value in frame[column]]
        frame.to_csv(path, index=False)
    with without_reports():
        result = fg.run(job_of(llama, silos, "prefer", run={"rounds": 1}), tmp_path / "run")
    one = result.client("site-0")
    assert one.evaluate(path) == one.evaluate(silos / "site-0.jsonl")
    found = predictions(one.model(), questions_of(path, result.job))
    assert len(found) == len(own)
    assert json.loads(found[0].predicted)["preferred"] in ("first", "second")


def test_the_command_line_compares_two_answers(llama: Path, silos: Path, tmp_path: Path) -> None:
    with without_reports():
        fg.run(job_of(llama, silos, "prefer", run={"rounds": 1}), tmp_path / "run")
    ask = ["predict", str(tmp_path / "run"), "--client", "site-0", "what is a day"]
    between = ["--between", "it was good", "--between", "it was bad"]
    told = CliRunner().invoke(commands, [*ask, *between])
    assert told.exit_code == 0, told.output
    assert '"preferred"' in told.output
    told = CliRunner().invoke(commands, [*ask, *between[:2]])
    assert isinstance(told.exception, RunError)
    assert "--between is given twice" in str(told.exception)


def test_what_is_no_pair_is_refused_before_a_run(llama: Path, tmp_path: Path) -> None:
    folder = save_pairs(tmp_path / "silos")
    for line, sentence in (
        ({**TWO, "rejected": TWO["chosen"]}, r"site-1.*line 23.*are the same answer"),
        ({**TWO, "rejected": ""}, r"site-1.*line 23.*'rejected' is empty"),
    ):
        path = folder / "site-1.jsonl"
        before = path.read_text(encoding="utf-8")
        path.write_text(before + json.dumps(line) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=sentence):
            fg.run(job_of(llama, folder, "prefer"), tmp_path / "run")
        path.write_text(before, encoding="utf-8")
    (folder / "site-2.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="site-2"):
        fg.run(job_of(llama, folder, "prefer"), tmp_path / "run")
    with pytest.raises(JobError, match="label_smoothing"):
        job_of(llama, folder, "prefer", data={"label_smoothing": 0.5})
    with pytest.raises(JobError, match=r"model\.head"):
        job_of(llama, folder, "prefer", model={"head": "stock"})
    with pytest.raises(JobError, match=r'"rmse" .*the task "prefer"'):
        job_of(llama, folder, "prefer", data={"metrics": ["rmse"]})
    assert not (tmp_path / "run").exists()


def test_a_trainer_as_a_client_is_refused(llama: Path, silos: Path, tmp_path: Path) -> None:
    def never(who: Any) -> Any:
        raise AssertionError("no Trainer is asked for")

    for task, head in (("prefer", "pooled"), ("reward", "stock")):
        job = job_of(llama, silos, task, model={"head": head})
        with pytest.raises(JobError, match=f'data.task = "{task}" compares two answers'):
            fg.run(job, tmp_path / "run", engine=simulated(never))


@pytest.mark.slow
def test_a_comparison_has_its_page(llama: Path, silos: Path, tmp_path: Path) -> None:
    job = job_of(llama, silos, "prefer")
    compare(job, "fedit, local", [0, 1], tmp_path / "compared")
    assert "accuracy" in (tmp_path / "compared" / "compare.html").read_text(encoding="utf-8")
