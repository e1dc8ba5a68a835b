"""Defences and attacks in whole runs on a tiny federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stops import StopAfter
from tests.tiny import save_silos, tiny_job

from fedgrove.defence.attack import SPLIT
from fedgrove.ground.errors import FedgroveError
from fedgrove.job import Job
from fedgrove.methods.registry import method_class, names
from fedgrove.start import run

CLIENTS = 5


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_silos(tmp_path_factory.mktemp("five"), clients=CLIENTS, rows=30)


def job(bert: Path, silos: Path, method: str = "fedit", **sections: Any) -> Job:
    sections.setdefault("run", {"rounds": 3})
    return tiny_job(bert, silos, method={"name": method}, **sections)


def weights(out: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted((out / "adapters").rglob("adapter_model.safetensors")):
        for key, value in load_file(file).items():
            found[f"{file.parent.name}/{key}"] = value
    return found


def test_no_bound_that_bites_changes_nothing(tiny_bert: Path, five: Path, tmp_path: Path) -> None:
    run(job(tiny_bert, five), tmp_path / "plain")
    run(job(tiny_bert, five, defence={"norm": 1e9}), tmp_path / "bounded")
    plain, bounded = weights(tmp_path / "plain"), weights(tmp_path / "bounded")
    assert plain.keys() == bounded.keys()
    assert all(torch.equal(plain[key], bounded[key]) for key in plain)


def test_a_norm_bound_holds_the_server_where_it_was(
    tiny_bert: Path, five: Path, tmp_path: Path
) -> None:
    run(job(tiny_bert, five, defence={"norm": 1e-9}), tmp_path / "out")
    B = [value for key, value in weights(tmp_path / "out").items() if "lora_B" in key]
    assert max(float(value.abs().max()) for value in B) < 1e-8
    lines = json.loads((tmp_path / "out" / "defence.json").read_text())["lines"]
    assert len(lines) == 3 * CLIENTS
    assert all(line["scale"] < 1e-3 for line in lines)


@pytest.mark.parametrize("rule", ["krum", "median", "geometric-median", "foolsgold"])
def test_a_robust_rule_is_told_in_summary_and_report(
    rule: str, tiny_bert: Path, five: Path, tmp_path: Path
) -> None:
    defended = job(
        tiny_bert,
        five,
        defence={"rule": rule, "attackers": 0.25},
        attack={"kind": "sign-flip", "strength": 5.0},
        federation={"head": "shared"},
    )
    result = run(defended, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["defence"] == {"rule": rule, "norm": None}
    assert len(summary["attack"]["attackers"]) == 1
    assert summary["attack"]["success"] is None
    text = result.report.read_text()
    assert "The attack" in text
    assert "Whose changes the defence cut" in text


@pytest.mark.parametrize("kind", ["label-flip", "backdoor", "scale"])
def test_poisoned_rows_are_the_attackers_and_honest_rows_tell(
    kind: str, tiny_bert: Path, five: Path, tmp_path: Path
) -> None:
    attack: dict[str, Any] = {"kind": kind, "share": 0.4, "trigger": "book"}
    if kind == "scale":
        attack["strength"] = 3.0
    run(job(tiny_bert, five, attack=attack), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["attack"]
    assert len(summary["attackers"]) == 2
    assert 0 <= summary["success"] <= 1
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    told = [each for each in map(json.loads, lines) if each["split"] == SPLIT]
    assert {each["client"] for each in told}.isdisjoint(summary["attackers"])
    if kind != "backdoor":  # two labels: what the attackers want is what is wrong
        row = json.loads((tmp_path / "out" / "summary.json").read_text())["clients"]
        for each in told[-3:]:
            assert each["accuracy"] == pytest.approx(1 - row[each["client"]]["metric"])


@pytest.mark.parametrize("kind", ["little", "adaptive", "gaussian"])
def test_a_defended_run_resumes_to_the_same_bytes(
    kind: str, tiny_bert: Path, five: Path, tmp_path: Path
) -> None:
    whole = job(tiny_bert, five, attack={"kind": kind}, defence={"rule": "foolsgold"})
    run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(whole, tmp_path / "cut", callbacks=[StopAfter(2)])
    run(whole, tmp_path / "cut", resume=True)
    one, other = tmp_path / "whole" / "defence.json", tmp_path / "cut" / "defence.json"
    assert one.read_bytes() == other.read_bytes()
    kept, gone_on = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(kept[key], gone_on[key]) for key in kept)


#: methods of which the server cannot tell what a client changed, at their defaults
UNMEASURED = ("fed-hello", "fedex-lora", "flora", "hetlora")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["none", "krum", "trimmed-mean"])
@pytest.mark.parametrize("method", [name for name in names() if name != "local"])
def test_every_method_takes_a_bound_and_a_rule_or_says_why(
    method: str, rule: str, tiny_bert: Path, five: Path, tmp_path: Path
) -> None:
    defence: dict[str, Any] = {"rule": rule}
    if method not in UNMEASURED:
        defence["norm"] = "median"
    defended = job(tiny_bert, five, method, defence=defence)
    means = getattr(method_class(method), "centres", "none")
    if rule == "none" or means == "values" or (rule == "krum" and means == "weights"):
        run(defended, tmp_path / "out")
        return
    with pytest.raises(FedgroveError, match=r"defence\.rule"):
        run(defended, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", UNMEASURED)
@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"defence": {"norm": 1.0}}, "defence.norm"),
        ({"defence": {"rule": "foolsgold"}}, "foolsgold"),
        ({"attack": {"kind": "sign-flip"}}, "sign-flip"),
    ],
)
def test_what_needs_a_change_is_refused_where_it_cannot_be_told(
    method: str,
    sections: dict[str, Any],
    key: str,
    tiny_bert: Path,
    five: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(FedgroveError, match=f"{key}.*cannot be told with"):
        run(job(tiny_bert, five, method, **sections), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"defence": {"rule": "median"}, "privacy": {"clip": 1.0}}, "privacy.clip bounds"),
        (
            {"defence": {"norm": 1.0}, "privacy": {"clip": 1.0, "secure_aggregation": True}},
            "which privacy.secure_aggregation hides",
        ),
        ({"defence": {"norm": 1.0}, "federation": {"late": "next"}}, "federation.late"),
        ({"attack": {"kind": "backdoor", "target": 7}}, "numbered 0 to 1"),
        ({"attack": {"kind": "scale"}}, "above 1"),
        ({"defence": {"attackers": 0.5}}, "defence.attackers"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    sections: dict[str, Any], words: str, tiny_bert: Path, five: Path, tmp_path: Path
) -> None:
    with pytest.raises((FedgroveError, ValueError), match=words):
        run(job(tiny_bert, five, **sections), tmp_path / "out")
    assert not (tmp_path / "out").exists()
