"""The membership audit: each attack against a dense reference, and what protects from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_job

from fedgrove import run
from fedgrove.cli import main
from fedgrove.ground.errors import RunError
from fedgrove.use import audit as audits
from fedgrove.use.audit import Attacker, Found, audit, cosine, outcome, share_found
from fedgrove.use.result import Result


@pytest.fixture(scope="module")
def memorised(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients learnt their few rows by heart: half of the labels are wrong."""
    folder = tmp_path_factory.mktemp("audited")
    mixed = folder / "silos"
    mixed.mkdir()
    for file in silos.iterdir():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number, line in enumerate(lines):
            line["label"] = ("positive", "negative")[number % 2]
        (mixed / file.name).write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    job = tiny_job(
        tiny_bert,
        mixed,
        run={"rounds": 6},
        train={"lr": 2e-2, "local_steps": 20},
        lora={"rank": 8},
    )
    return run(job, folder / "run").path


def test_what_was_learnt_by_heart_is_found(
    memorised: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(memorised)]) == 0
    said = capsys.readouterr().out
    told = json.loads((memorised / "audit.json").read_text())
    assert set(told["attacks"]) == {"loss", "gain", "update"}
    assert told["attacks"]["loss"]["auc"] > 0.65
    assert f"{told['attacks']['loss']['auc']:.3f}" in said
    low, high = told["attacks"]["loss"]["interval"]
    assert low <= told["attacks"]["loss"]["auc"] <= high
    assert set(told["attacks"]["update"]["by_client"]) == {"site-0", "site-1", "site-2"}


def test_numbers_are_the_losses_of_the_model_that_left(memorised: Path) -> None:
    result = Result(memorised)
    found = Attacker(result).numbers(["loss"], "site-1", [0, 1], [0, 2])["loss"]
    model, rows = result.client("site-1").model(), result.tests["site-1"]
    losses = [model.evaluate([rows[number]])["loss"] for number in (0, 2)]
    np.testing.assert_allclose(found.others, [-loss for loss in losses], rtol=1e-5)


def test_a_cosine_is_of_the_gradient_that_a_client_would_send(memorised: Path) -> None:
    """One step of SGD on one row: its gradient and the change are opposite, and no other row is
    nearer."""
    attacker = Attacker(Result(memorised))
    job = attacker.parts.job.replace(
        train={"local_steps": 1, "batch_size": 1, "optimizer": "sgd", "clip": 0.0}
    )
    attacker.parts = type(attacker.parts).of(job, list(attacker.infos.values()))
    train = attacker.parts.encode(attacker.clients["site-0"])["train"]
    scores = attacker._of_update("site-0", train[:1], train[:4])
    assert scores is not None
    assert scores[0] == pytest.approx(1.0, abs=1e-3)
    assert max(scores[1:]) < 1.0


def test_nothing_travels_nothing_is_seen(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": "local"}, run={"rounds": 1})
    out = run(job, tmp_path / "run").path
    assert [each.attack for each in audit(out, ["update"], examples=4)] == []
    assert main(["audit", str(out), "--attacks", "update"]) == 0


def test_figures_of_an_attack_by_hand() -> None:
    """Members 3, 1 above others 2, 0: three of four pairs in order."""
    one = Found(np.array([3.0, 1.0]), np.array([2.0, 0.0]))
    other = Found(np.array([5.0, 6.0]), np.array([1.0, 2.0]))
    both = outcome("loss", {"a": one, "b": other})
    assert both.by_client == {"a": 0.75, "b": 1.0}
    assert both.auc == 0.875
    assert both.interval is not None
    low, high = both.interval
    assert 0.75 <= low <= high <= 1.0
    assert outcome("loss", {"a": one}).interval is None
    assert share_found([other]) == 1.0
    assert share_found([Found(np.zeros(3), np.zeros(3))]) == 0.0
    assert cosine(torch.zeros(2), torch.ones(2)) == 0.0
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])) == -1.0


def test_what_stays_with_the_client_is_not_seen() -> None:
    from fedgrove.adapters import Assembly, Extra, Term
    from fedgrove.adapters.adapter import Factors

    factors = {"s": Factors(torch.ones(2, 3), torch.ones(4, 2), 1.0)}
    own = Term("own", factors, train="AB", home="client")
    half = Term("half", factors, train="AB", kept="B")
    head = {"head.bias": Extra(torch.zeros(2)), "gate": Extra(torch.zeros(2), home="server")}
    seen = audits.travelling(Assembly((own, half), extras=head))
    assert [term.train for term in seen.terms] == ["", "A"]
    assert {name: extra.train for name, extra in seen.extras.items()} == {
        "head.bias": False,
        "gate": True,
    }


def test_nonsense_is_answered_in_a_sentence(
    memorised: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match="no attack 'lost'; choose from loss, gain, update"):
        audit(memorised, ["lost"])
    assert main(["audit", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
