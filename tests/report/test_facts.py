from __future__ import annotations

import json

from fedgrove.report import facts
from fedgrove.report.compare import compare
from fedgrove.report.data import load

from .conftest import MakeRun, change


def test_the_headline_says_what_ran(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=3, rounds=2, seed=5))
    assert facts.headline(run) == (
        "3 clients together fine-tuned minilm on sentiment with fedit in 2 rounds at LoRA rank 8 "
        "(seed 5)"
    )
    alone = load(make_run("local", method="local", clients=1, rounds=1))
    assert facts.headline(alone) == (
        "1 client fine-tuned minilm on sentiment, each on its own, in 1 round at LoRA rank 8 (seed "
        "0)"
    )


def test_mixed_ranks_are_a_range(make_run: MakeRun) -> None:
    path = make_run("run", clients=3)
    summary = json.loads((path / "summary.json").read_text())
    summary["clients"]["amazon-0"]["rank"] = 4
    assert "LoRA ranks 4 to 8" in facts.headline(load(change(path, summary)))


def test_trained_stored_and_sent_are_three_rows(make_run: MakeRun) -> None:
    path = make_run("run", clients=2, rounds=2)
    summary = json.loads((path / "summary.json").read_text())
    summary["parameters"] = {"trained": 1001, "stored": 2002, "sent_up": 303, "sent_down": 404}
    rows = {name: amount for name, amount, _ in facts.cost_rows(load(change(path, summary)))}
    assert rows["parameters trained"] == "1,001"
    assert rows["parameters stored"] == "2,002"
    assert rows["parameters sent up"] == "303"
    assert rows["parameters sent down"] == "404"
    assert rows["bytes up in a round"] == "98 kB"
    assert rows["bytes up in the run"] == "393 kB"


def test_times_add_up_to_the_total(make_run: MakeRun) -> None:
    path = make_run("run", clients=2)
    summary = json.loads((path / "summary.json").read_text())
    summary["seconds"] = {"total": 100.0, "training": 60.0, "evaluation": 20.0, "server": 5.0}
    rows = facts.time_rows(load(change(path, summary)))
    assert [share for _, _, share in rows] == [60.0, 20.0, 5.0, 15.0, 100.0]
    assert rows[-1][1] == "1 min 40 s"


def test_one_client_has_no_tail_and_no_count_of_winners(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=1))
    labels = [tile.label for tile in facts.tiles(run, compare(run, []))]
    assert labels == ["mean accuracy", "sent up in the whole run", "wall time, from start to end"]
