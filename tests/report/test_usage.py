from __future__ import annotations

import ast
import json

import pytest

from fedgrove.report.data import load
from fedgrove.report.usage import usage

from .conftest import MakeRun, change


def test_the_peft_code_is_python_and_names_the_recorded_base(make_run: MakeRun) -> None:
    path = make_run("run", clients=3)
    shell, peft = usage(load(path))
    assert "--client amazon-0" in shell[1]
    ast.parse(peft[1])
    assert '"some/MiniLM-L6"' in peft[1]
    assert "AutoModel.from_pretrained" in peft[1]
    assert "head.safetensors" in peft[0]
    job = (path / "job.toml").read_text().replace('"pooled"', '"stock"')
    (path / "job.toml").write_text(job)
    stock = usage(load(path))[1]
    ast.parse(stock[1])
    assert "AutoModelForSequenceClassification.from_pretrained(base_name, num_labels=3)" in stock[1]
    assert "head.safetensors" not in stock[0]


@pytest.mark.parametrize(
    ("task", "head", "asked", "expected"),
    [
        (
            "classify-images",
            "pooled",
            "photo.png",
            ["AutoModel.from_pretrained", "AutoImageProcessor", "Image.open"],
        ),
        (
            "classify-images",
            "stock",
            "photo.png",
            ["AutoModelForImageClassification", "output.logits"],
        ),
        (
            "generate",
            "pooled",
            "capital",
            ["AutoModelForCausalLM.from_pretrained(base_name)", "model.generate("],
        ),
        (
            "prefer",
            "pooled",
            '--between "Paris."',
            ["AutoModelForCausalLM.from_pretrained(base_name)", "model.generate("],
        ),
        (
            "reward",
            "stock",
            '--between "Paris."',
            ["AutoModelForSequenceClassification", "output.logits"],
        ),
        (
            "spans",
            "stock",
            '--context "Two pills are taken."',
            ["AutoModelForQuestionAnswering", "model.base_model(", "output.start_logits"],
        ),
    ],
)
def test_the_peft_code_is_that_of_the_task(
    task: str, head: str, asked: str, expected: list[str], make_run: MakeRun
) -> None:
    path = make_run("run", clients=2)
    change(path, json.loads((path / "summary.json").read_text()) | {"task": task})
    (path / "job.toml").write_text((path / "job.toml").read_text().replace('"pooled"', f'"{head}"'))
    shell, peft = usage(load(path))
    assert asked in shell[1]
    ast.parse(peft[1])
    assert all(part in peft[1] for part in expected)
    assert "text to classify" not in shell[1] + peft[1]
    assert ("head.safetensors" in peft[0]) == (
        task not in ("generate", "prefer") and head == "pooled"
    )
    config = path / "adapters" / "amazon-0" / "adapter_config.json"
    config.write_text(config.read_text().replace("some/MiniLM-L6", "grove-vit"))
    assert 'resolve_name("grove-vit")' in usage(load(path))[1][1]


def test_no_peft_code_for_a_client_without_an_adapter(make_run: MakeRun) -> None:
    path = make_run("run", clients=1)
    (path / "adapters" / "amazon-0" / "adapter_config.json").unlink()
    assert len(usage(load(path))) == 1


def test_a_task_of_another_package_has_the_command_alone(make_run: MakeRun) -> None:
    path = make_run("run", clients=1)
    change(path, json.loads((path / "summary.json").read_text()) | {"task": "fold-proteins"})
    ((_, command),) = usage(load(path))
    assert command == 'fedgrove predict . --client amazon-0 "a row of your data"'
