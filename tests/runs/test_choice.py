"""``run.keep`` and ``run.patience``: which round's models leave, and when a run stops."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stops import StopAfter
from tests.test_run import adapters, lines, summary
from tests.tiny import tiny_job, without_reports

import fedgrove as fg
from fedgrove.ground.errors import RunError
from fedgrove.runs.choice import Choice, Rule
from fedgrove.runs.directory import refuse_longer
from fedgrove.start import run
from fedgrove.use.adapt import adapt


def line(client: str, value: float | None, split: str = "test") -> dict[str, Any]:
    return {"round": 1, "client": client, "split": split, "accuracy": value, "loss": 1.0}


def both(a: float | None, b: float | None) -> list[dict[str, Any]]:
    return [line("a", a), line("b", b)]


def test_the_best_round_is_the_first_with_the_highest_mean_of_all_clients() -> None:
    choice = Choice(Rule(True, 2, "test", "accuracy", 2))
    for number, lines_, best, since in (
        (1, both(1.0, 1.0), 0, 0),  # before the method is complete
        (2, both(0.2, 0.4), 2, 0),
        (3, both(0.5, 0.5), 3, 0),
        (4, both(0.9, None), 3, 0),  # of other clients: no score
        (5, [line("a", 1.0)], 3, 0),
        (6, [line("a", 1.0, "validation"), line("b", 1.0, "validation")], 3, 0),
        (7, both(0.6, 0.4), 3, 1),  # as good is not better
    ):
        choice.look(number, lines_, ["a", "b"])
        assert (choice.round, choice.since) == (best, since), number
    before = choice.enough
    choice.look(8, both(0.0, 0.0), ["a", "b"])
    assert (before, choice.enough) == (False, True)
    again = Choice(choice.rule)
    again.restore(choice.notes())
    assert again == choice
    assert choice.told(8) == {
        "kept": {"round": 3, "split": "test", "best": {"round": 3, "accuracy": 0.5}},
        "stopped_early": True,
    }
    choice.start_anew()
    assert (choice.kept, choice.enough) == (0, False)


def swinging(bert: Path, silos: Path, **changes: Any) -> fg.Job:
    """A job whose rate is so large that later rounds are not always better."""
    values: dict[str, Any] = {
        "data": {"validation_fraction": 0.25},
        "run": {"rounds": 6, "keep": "best"},
        "train": {"lr": 0.05},
        "method": {"name": "fedsa-lora"},
    }
    for section, keys in changes.items():
        values.setdefault(section, {}).update(keys)
    return tiny_job(bert, silos, **values)


def means(path: Path, split: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for each in lines(path):
        if each["split"] == split:
            found.setdefault(each["round"], []).append(each["accuracy"])
    return {number: fmean(values) for number, values in found.items()}


@pytest.fixture(scope="module")
def kept(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("choice") / "kept"
    run(swinging(tiny_bert, silos), out)
    return out


def test_the_models_of_the_best_round_leave(
    kept: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    """They are those of a run that ended there, and their measures those of that round."""
    scores = means(kept, "validation")
    best = max(scores, key=lambda number: (scores[number], -number))
    assert best < 6, "the job must swing"
    found = json.loads((kept / "summary.json").read_text())
    assert found["kept"] == {
        "round": best,
        "split": "validation",
        "best": {"round": best, "accuracy": pytest.approx(scores[best])},
    }
    assert (found["rounds"], found["stopped_early"]) == (6, False)
    assert found["mean"] == pytest.approx(means(kept, "test")[best])
    assert fg.Result(kept).left_after == best
    ended = tmp_path / "ended"
    with without_reports():
        run(swinging(tiny_bert, silos, run={"rounds": best, "keep": "last"}), ended)
    for file in sorted((ended / "adapters").rglob("*.safetensors")):
        mine = load_file(kept / file.relative_to(ended))
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, mine[name]), (file, name)
    page = (kept / "report.html").read_text(encoding="utf-8")
    assert f"round {best}, the best by accuracy on the clients’ validation rows" in page
    latest = json.loads((kept / "checkpoints" / "latest.json").read_text())
    assert (latest["round"], latest["kept"]["round"]) == (6, best)
    files = {latest["server"], latest["kept"]["server"]}
    files |= {*latest["clients"].values(), *latest["kept"]["clients"].values()}
    there = (kept / "checkpoints").rglob("*.safetensors")
    assert {str(f.relative_to(kept / "checkpoints")) for f in there} == files


def test_a_resumed_run_keeps_the_same_round(
    kept: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    best = fg.Result(kept).left_after
    job = swinging(tiny_bert, silos)
    for stop in (StopAfter(best), StopAfter(best + 1, 1), StopAfter(6)):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[stop])
    with without_reports():
        run(job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "cut") == adapters(kept)
    assert summary(tmp_path / "cut") == summary(kept)
    assert lines(tmp_path / "cut") == lines(kept)


def test_a_newcomer_is_welcomed_with_the_kept_models(
    kept: Path, silos: Path, tmp_path: Path
) -> None:
    adapted = adapt(kept, silos / "site-0.jsonl", name="new", epochs=0, out=tmp_path / "new")
    common = load_file(adapted.path / "adapter_model.safetensors")
    mine = load_file(kept / "adapters" / "site-0" / "adapter_model.safetensors")
    shared = [name for name in common if "lora_A" in name]
    assert shared
    assert all(torch.equal(common[name], mine[name]) for name in shared)


def test_a_run_stops_where_nothing_gets_better(
    kept: Path, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    scores = means(kept, "validation")
    best = 1
    while scores.get(best + 1, 0.0) > scores[best]:
        best += 1
    job = swinging(tiny_bert, silos, run={"patience": 1, "checkpoint_every": 5})
    with without_reports():
        result = run(job, tmp_path / "out")
    assert result.summary["rounds"] == best + 1
    assert result.summary["stopped_early"] is True
    assert result.left_after == best
    last = swinging(tiny_bert, silos, run={"patience": 1, "keep": "last"})
    with without_reports():
        for stop in (StopAfter(best + 1),):
            with pytest.raises(KeyboardInterrupt):
                run(last, tmp_path / "last", callbacks=[stop])
        other = run(last, tmp_path / "last", resume=True)
    assert other.summary["rounds"] == other.left_after == best + 1
    assert "kept" not in json.loads((tmp_path / "last" / "checkpoints" / "latest.json").read_text())


def test_what_was_spent_after_the_best_round_is_told(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("dp_accounting")
    private = {"example_clip": 1.0, "example_noise": 1.0, "randomness": "seed"}
    spent = {}
    for keep in ("last", "best"):
        job = swinging(tiny_bert, silos, privacy=private, run={"keep": keep})
        with without_reports():
            result = run(job, tmp_path / keep)
        spent[keep] = result.summary["privacy"]
        if keep == "best":
            assert result.left_after < 6
    assert spent["best"] == spent["last"]


def test_a_job_that_compares_rounds_goes_on_only_from_a_due_evaluation(
    tiny_bert: Path, silos: Path
) -> None:
    job = swinging(tiny_bert, silos, run={"eval_every": 4})
    with pytest.raises(RunError, match="evaluated out of turn"):
        refuse_longer(job.replace(run={"rounds": 9}), job)
    even = swinging(tiny_bert, silos, run={"eval_every": 3})
    refuse_longer(even.replace(run={"rounds": 9}), even)


@pytest.mark.parametrize(
    ("method", "first"), [("fedit", 1), ("hilora", 5), ("fdlora", 6), ("feddpa-f", 5)]
)
def test_a_method_with_phases_keeps_only_complete_models(
    method: str, first: int, tiny_bert: Path, silos: Path
) -> None:
    from fedgrove.engines.local import prepare

    stage = prepare(swinging(tiny_bert, silos, method={"name": method}))
    assert Rule.of(stage.parts).first == first
