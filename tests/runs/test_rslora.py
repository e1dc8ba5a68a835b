"""``lora.rslora``: alpha over the square root of the rank, in training and in what leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.interop.test_peft import TEXTS, in_peft
from tests.tiny import tiny_job, without_reports

import fedgrove as fg
from fedgrove.adapters import alpha_of, scale_of
from fedgrove.ground.errors import JobError
from fedgrove.start import run


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 12, 64])
def test_alpha_and_scale_are_each_others_inverse(rank: int) -> None:
    assert scale_of(16.0, rank, rslora=True) == 16.0 / math.sqrt(rank)
    assert scale_of(16.0, rank, rslora=False) == 16.0 / rank
    assert alpha_of(16.0 / math.sqrt(rank), rank, rslora=True) == 16.0


@pytest.mark.parametrize(
    ("method", "scaling", "wanted"),
    [
        ("flexlora", "client", [6 / math.sqrt(2), 6 / 2, 6 / math.sqrt(3)]),
        ("flexlora", "global", [6 / 2] * 3),
        ("hilora", "global", None),
        ("fedex-lora", "global", None),
    ],
)
def test_an_adapter_leaves_with_the_scale_of_its_training(
    method: str,
    scaling: str,
    wanted: list[float] | None,
    tiny_bert: Path,
    silos: Path,
    tmp_path: Path,
) -> None:
    """PEFT gives the logits that were reported, whatever the ranks of clients and terms."""
    changes: dict[str, Any] = {}
    if method == "flexlora":
        changes["federation"] = {"ranks": [2, 4, 3]}
    job = tiny_job(
        tiny_bert,
        silos,
        **changes,
        method={"name": method},
        lora={"rank": 4, "alpha": 6.0, "rslora": True, "scaling": scaling},
        run={"rounds": 3 if method == "hilora" else 1},
    )
    with without_reports():
        result = run(job, tmp_path / "out")
    for number, name in enumerate(result.names()):
        folder = result.client(name).path
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["use_rslora"] is True
        model = fg.load(folder)
        if wanted is not None:
            scales = {factors.scale for factors in model.assembly.terms[0].adapter.values()}
            assert list(scales) == [pytest.approx(wanted[number], rel=1e-15)]
            assert config["lora_alpha"] == pytest.approx(wanted[number] * math.sqrt(config["r"]))
        theirs = in_peft(tiny_bert, folder, stock=False)
        torch.testing.assert_close(theirs, model.logits(TEXTS), atol=2e-6, rtol=0)


def test_the_scale_is_that_of_training(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """At rank 4 rsLoRA with alpha is LoRA with twice the alpha, step for step."""
    kept = {}
    for name, lora in {"rs": {"alpha": 3.0, "rslora": True}, "plain": {"alpha": 6.0}}.items():
        job = tiny_job(tiny_bert, silos, lora={"rank": 4, **lora}, run={"rounds": 1})
        with without_reports():
            kept[name] = run(job, tmp_path / name)
    for name in kept["rs"].names():
        weights = [
            (kept[which].client(name).path / "adapter_model.safetensors").read_bytes()
            for which in ("rs", "plain")
        ]
        assert weights[0] == weights[1]


def test_fedrora_has_no_alpha(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": "fedrora"}, lora={"rslora": True})
    with pytest.raises(JobError, match=r"lora\.rslora = true has no use with FedRoRA"):
        run(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()
