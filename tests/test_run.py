"""The round loop as a user meets it: the run directory, equality of repeated, resumed and reloaded
runs, refusals.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stops import StopAfter
from tests.tiny import tiny_job

import fedgrove as fg
from fedgrove.cli import main
from fedgrove.ground.errors import FedgroveError, JobError, RunError
from fedgrove.runs.directory import refuse_longer
from fedgrove.start import run
from fedgrove.tracking.metrics import read

METHODS = ["local", "fedit", "ffa-lora", "fedsa-lora", "fedvlm"]


def adapters(path: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted((path / "adapters").rglob("*"))
        if f.is_file()
    }


def summary(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "summary.json").read_text())
    del content["seconds"]
    return content


def lines(path: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k != "seconds"} for line in read(path / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(tiny_bert: Path, silos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fedit"
    run(tiny_job(tiny_bert, silos), out)
    return out


def test_a_finished_run_has_everything_that_the_readme_promises(finished: Path) -> None:
    for name in (
        "job.toml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "federation.json",
        "checkpoints/latest.json",
    ):
        assert (finished / name).is_file(), name
    found = json.loads((finished / "summary.json").read_text())
    assert list(found["clients"]) == ["site-0", "site-1", "site-2"]
    assert set(found["clients"]["site-0"]) == {
        "examples",
        "rank",
        "metric_base",
        "metric",
        "metric_tuned",
        "loss",
    }
    assert set(found["parameters"]) == {"trained", "stored", "sent_up", "sent_down"}
    for client in [*found["clients"], "_global"]:
        files = {f.name for f in (finished / "adapters" / client).iterdir()}
        assert files == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "head.safetensors",
            "fedgrove.json",
        } | ({"measures.json"} if client != "_global" else set())
    assert len(read(finished / "metrics.jsonl")) == 3 * 3 * 2
    assert not list(finished.rglob("*.partial"))
    assert not list(finished.rglob("run.lock"))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_job_twice_is_the_same_byte_for_byte(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": method})
    run(job, tmp_path / "a")
    again = fg.Job.load(tmp_path / "a" / "job.toml")
    run(again, tmp_path / "b")
    assert adapters(tmp_path / "a") == adapters(tmp_path / "b")
    assert summary(tmp_path / "a") == summary(tmp_path / "b")
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_identical_to_one_never_stopped(
    method: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(
        tiny_bert,
        silos,
        method={"name": method},
        federation={"fraction": 0.7},
        train={"final_local_epochs": 1},
    )
    run(job, tmp_path / "whole")
    for stop in (StopAfter(1), StopAfter(2, 2), StopAfter(3)):
        with pytest.raises(KeyboardInterrupt):
            run(job, tmp_path / "cut", resume=True, callbacks=[stop])
    run(job, tmp_path / "cut", resume=True)
    assert adapters(tmp_path / "whole") == adapters(tmp_path / "cut")
    assert summary(tmp_path / "whole") == summary(tmp_path / "cut")
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_another_seed_gives_another_run(
    tiny_bert: Path, silos: Path, finished: Path, tmp_path: Path
) -> None:
    run(tiny_job(tiny_bert, silos, run={"seed": 8}), tmp_path / "other")
    assert adapters(finished) != adapters(tmp_path / "other")


def test_the_number_of_evaluations_and_checkpoints_does_not_change_the_result(
    tiny_bert: Path, silos: Path, finished: Path, tmp_path: Path
) -> None:
    run(
        tiny_job(tiny_bert, silos, run={"eval_every": 3, "checkpoint_every": 2}),
        tmp_path / "sparse",
    )
    assert adapters(finished) == adapters(tmp_path / "sparse")
    assert {line["round"] for line in lines(tmp_path / "sparse") if line["split"] == "test"} == {3}


def test_resume_of_a_finished_run_does_nothing(
    tiny_bert: Path, silos: Path, finished: Path
) -> None:
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("*")}
    run(tiny_job(tiny_bert, silos), finished, resume=True)
    assert before == {f: f.stat().st_mtime_ns for f in finished.rglob("*")}


def test_a_used_directory_and_another_job_are_refused(
    tiny_bert: Path, silos: Path, finished: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos)
    with pytest.raises(RunError, match="--resume"):
        run(job, finished)
    with pytest.raises(RunError, match=r"another job .*train\.lr is 0\.005 there, 0\.1 here"):
        run(job.override(["train.lr=0.1"]), finished, resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="holds no run"):
        run(job, tmp_path / "notes", resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        run(job, tmp_path / "file")


def test_changed_data_are_refused_on_resume(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    own = tmp_path / "silos"
    shutil.copytree(silos, own)
    job = tiny_job(tiny_bert, own)
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "out", callbacks=[StopAfter(2)])
    file = own / "site-1.jsonl"
    file.write_text(file.read_text().replace("good", "bad", 1))
    with pytest.raises(RunError, match="data changed"):
        run(job, tmp_path / "out", resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": {"targets": ["no_such_layer"]}}, "no_such_layer"),
        ({"lora": {"rank": 64}}, "lora.rank = 64"),
        ({"data": {"max_length": 128}}, "data.max_length = 128"),
        ({"model": {"name": "./nowhere"}}, "nowhere"),
        ({"data": {"text": "body"}}, "body"),
        ({"federation": {"ranks": [2, 4]}}, "uniform_rank"),
    ],
)
def test_bad_jobs_are_one_sentence_and_leave_nothing_behind(
    change: Any, words: str, tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {}
    for section, keys in change.items():
        values.setdefault(section, {}).update(keys)
    with pytest.raises(FedgroveError) as caught:
        run(tiny_job(tiny_bert, silos, **values), tmp_path / "out")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_uniform_rank_settles_mixed_ranks(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    mixed: Any = {"federation": {"ranks": [2, 4, 3]}, "lora": {"rank": 4}}
    result = run(
        tiny_job(tiny_bert, silos, **mixed, method={"uniform_rank": "min"}), tmp_path / "min"
    )
    assert {row["rank"] for row in result.summary["clients"].values()} == {2}
    local = run(tiny_job(tiny_bert, silos, **mixed, method={"name": "local"}), tmp_path / "local")
    assert [row["rank"] for row in local.summary["clients"].values()] == [2, 4, 3]


def test_what_is_sent_equals_the_theory(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    """Rank 4, four sites of 32 × 32: 4·32 numbers for each factor."""
    factor = 4 * 4 * 32
    for method, up in {
        "local": 0,
        "fedit": 2 * factor,
        "ffa-lora": factor,
        "fedsa-lora": factor,
        "fedvlm": factor,
    }.items():
        result = run(
            tiny_job(tiny_bert, silos, method={"name": method}, run={"rounds": 2}),
            tmp_path / method,
        )
        assert result.summary["parameters"]["sent_up"] == up
        assert result.summary["parameters"]["sent_down"] == up
        assert result.summary["bytes"] == {"up": 4 * up * 3 * 2, "down": 4 * up * 3 * 2}


def test_the_shared_head_travels_and_is_one_for_all(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run(tiny_job(tiny_bert, silos, federation={"head": "shared"}), tmp_path / "shared")
    heads = [
        load_file(tmp_path / "shared" / "adapters" / f"site-{i}" / "head.safetensors")["weight"]
        for i in range(3)
    ]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])
    run(tiny_job(tiny_bert, silos, federation={"head": "local"}), tmp_path / "local")
    own = [
        load_file(tmp_path / "local" / "adapters" / f"site-{i}" / "head.safetensors")["weight"]
        for i in range(3)
    ]
    assert not torch.equal(own[0], own[1])


def test_held_out_clients_never_train(tiny_bert: Path, silos: Path, tmp_path: Path) -> None:
    result = run(tiny_job(tiny_bert, silos, federation={"held_out": ["site-1"]}), tmp_path / "out")
    assert {line["client"] for line in result.metrics()} == {"site-0", "site-2"}
    assert result.summary["clients"]["site-1"]["held_out"] is True
    assert result.summary["unseen"]["clients"] == 1


def test_a_rank_below_one_is_refused(tiny_bert: Path, silos: Path) -> None:
    with pytest.raises(JobError, match=r"lora\.rank"):
        tiny_job(tiny_bert, silos, lora={"rank": 0})


def test_a_finished_model_is_measured_by_every_metric(
    tiny_bert: Path, silos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tiny_job(
        tiny_bert,
        silos,
        data={"validation_fraction": 0.2},
        run={"rounds": 1},
        train={"final_local_epochs": 1},
    )
    result = run(job, tmp_path / "run")
    one = result.client("site-1")
    written = json.loads((one.path / "measures.json").read_text())
    assert set(written) == {"test"}
    found = one.measures()
    assert {key: found[key] for key in written["test"]} == written["test"]
    assert found["accuracy"] == one.summary["metric"]
    assert set(found["f1"]) == {"negative", "positive"}
    tuned = tmp_path / "run" / "adapters_tuned" / "site-1" / "measures.json"
    assert json.loads(tuned.read_text()) != written
    assert "f1_macro" not in result.summary["clients"]["site-1"], "it stays with the client"
    assert main(["evaluate", str(result.path), "--client", "site-1"]) == 0
    first, by_class = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("site-1  loss ")
    assert f"f1_macro {found['f1_macro']:.4g}" in first
    assert by_class.split("  ")[-2:] == [f"{k} {v:.4g}" for k, v in found["f1"].items()]


def test_a_finished_run_is_not_measured_on_data_that_changed(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "silos"
    shutil.copytree(silos, mine)
    result = run(tiny_job(tiny_bert, mine, run={"rounds": 1}), tmp_path / "run")
    name = result.names()[0]
    assert result.client(name).evaluate()["accuracy"] == pytest.approx(
        result.client(name).summary["metric"]
    )
    file = sorted(mine.iterdir())[0]
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(
        RunError, match=r"The data changed since .* was run, and with them who tests on what"
    ):
        fg.Result(result.path).client(name).evaluate()
    assert fg.Result(result.path).client(name).evaluate(file)["examples"] > 0


def test_a_run_says_that_rows_are_cut(
    tiny_bert: Path, silos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedgrove.tracking.live import progress

    run(tiny_job(tiny_bert, silos, run={"rounds": 1}), tmp_path / "whole", callbacks=[progress()])
    assert "max_length" not in capsys.readouterr().out
    run(
        tiny_job(tiny_bert, silos, run={"rounds": 1}, data={"max_length": 4}),
        tmp_path / "cut",
        callbacks=[progress()],
    )
    assert (
        "rows fill data.max_length = 4 tokens, and longer ones are cut there"
        in capsys.readouterr().out
    )


def test_a_finished_run_goes_on_to_more_rounds(
    tiny_bert: Path, silos: Path, finished: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos)
    short = tmp_path / "short"
    run(job.replace(run={"rounds": 1}), short)
    with pytest.raises(RunError, match=r"run\.rounds is 1 there, 3 here"):
        run(job, short, resume=True, engine="flower")
    with pytest.raises(KeyboardInterrupt):
        run(job, short, resume=True, callbacks=[StopAfter(2)])
    assert not (short / "summary.json").exists()
    run(job, short, resume=True)
    assert adapters(short) == adapters(finished)
    assert summary(short) == summary(finished)
    assert lines(short) == lines(finished)
    with pytest.raises(RunError, match=r"run\.rounds is 3 there, 2 here"):
        run(job.replace(run={"rounds": 2}), short, resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"schedule": "cosine"}}, "learning rate follows the whole run"),
        ({"train": {"warmup_fraction": 0.1}}, "learning rate follows the whole run"),
        (
            {
                "privacy": {"example_noise": 1.0, "example_clip": 1.0},
                "train": {"final_local_epochs": 1},
            },
            "final_local_epochs",
        ),
    ],
)
def test_a_job_whose_rounds_depend_on_their_number_does_not_go_on(
    changes: Any, words: str, tiny_bert: Path, silos: Path
) -> None:
    job = tiny_job(tiny_bert, silos, **changes)
    refuse_longer(job, job)
    with pytest.raises(RunError, match=words):
        refuse_longer(job.replace(run={"rounds": 9}), job)


def test_a_method_that_lays_out_the_whole_run_does_not_go_on(
    tiny_bert: Path, silos: Path, tmp_path: Path
) -> None:
    job = tiny_job(tiny_bert, silos, method={"name": "hilora"})
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "out", callbacks=[StopAfter(1)])
    with pytest.raises(RunError, match="HiLoRA lays out its phases"):
        run(job.replace(run={"rounds": 9}), tmp_path / "out", resume=True)
    assert fg.Job.load(tmp_path / "out" / "job.toml").run.rounds == 3
