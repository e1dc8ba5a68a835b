"""A whole comparison: what it runs, what it writes, what it does not do twice."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from rich.console import Console
from tests.compare.conftest import ASKED
from tests.tiny import tiny_job

from fedgrove.cli import main
from fedgrove.compare import compare, tables
from fedgrove.compare.campaign import validation_score
from fedgrove.compare.progress import Overall
from fedgrove.ground.errors import FedgroveError, RunError
from fedgrove.job import Job
from fedgrove.tracking.callback import Callback, Callbacks
from fedgrove.use.result import Result

HELD_OUT = ["federation.held_out=['site-2']"]
LABELS = ["local", "alike"]


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    return found


def stamps(out: Path) -> dict[str, int]:
    return {
        str(file.relative_to(out)): file.stat().st_mtime_ns
        for part in ("runs", "tune")
        for file in sorted((out / part).rglob("*"))
        if file.is_file()
    }


def test_every_method_runs_on_every_seed_with_one_job(compared: Path) -> None:
    runs = {
        label: [Result(compared / "runs" / label / f"seed-{seed}") for seed in (0, 1)]
        for label in LABELS
    }
    for index, seed in enumerate((0, 1)):
        prints = {
            json.loads((each[index].path / "federation.json").read_text())["fingerprint"]
            for each in runs.values()
        }
        assert len(prints) == 1
        jobs = [each[index].job.to_dict() for each in runs.values()]
        for job in jobs:
            assert job["run"].pop("seed") == seed
            del job["method"], job["train"]["lr"], job["train"]["head_lr"]
            assert job["train"]["final_local_epochs"] == 2
            assert job["data"]["validation_fraction"] == 0
        assert jobs[0] == jobs[1]
    assert runs["alike"][0].job.method.options.weights == "uniform"


def test_the_numbers_are_those_of_the_runs(compared: Path) -> None:
    found = content(compared)
    assert [row["label"] for row in found["methods"]] == LABELS
    assert found["seeds"] == [0, 1]
    assert found["head"] == "local"
    for row in found["methods"]:
        summaries = [Result(compared / row["runs"] / f"seed-{seed}").summary for seed in (0, 1)]
        means = [s["mean"] for s in summaries]
        assert row["metric"]["by_seed"] == means
        assert row["metric"]["mean"] == pytest.approx(fmean(means))
        assert row["metric"]["std"] == pytest.approx(stdev(means))
        assert row["metric"]["tail10"] == pytest.approx(fmean(s["tail10"] for s in summaries))
        trained = [[c for c in s["clients"].values() if not c.get("held_out")] for s in summaries]
        assert row["metric"]["worst"] == pytest.approx(
            fmean(min(c["metric"] for c in each) for each in trained)
        )
        assert row["metric_tuned"]["mean"] == pytest.approx(
            fmean(fmean(c["metric_tuned"] for c in each) for each in trained)
        )
        assert row["unseen"]["metric"]["mean"] == pytest.approx(
            fmean(s["unseen"]["mean"] for s in summaries)
        )
        assert row["unseen"]["metric_tuned"]["by_seed"] == [
            s["clients"]["site-2"]["metric_tuned"] for s in summaries
        ]
        assert row["parameters"] == summaries[0]["parameters"]
        assert row["bytes"] == summaries[0]["bytes"]
        assert row["seconds"] == pytest.approx(fmean(s["seconds"]["total"] for s in summaries))
        assert [point["round"] for point in row["curve"]] == [1, 2]
        assert row["curve"][-1]["mean"] == pytest.approx(fmean(means))
        assert row["curve"][-1]["bytes"] == row["bytes"]["up"] + row["bytes"]["down"]
        assert row["curve"][0]["bytes"] * 2 == row["curve"][1]["bytes"]
    base = [
        Result(compared / "runs" / "local" / f"seed-{s}").summary["clients"]["site-0"][
            "metric_base"
        ]
        for s in (0, 1)
    ]
    assert [found["base"]["values"]["metric"][seed]["site-0"] for seed in ("0", "1")] == base
    for measure in ("metric", "metric_tuned"):
        assert all(test["n"] == 4 for test in found["tests"][measure]["against_best"].values())
        assert len(found["tests"][measure]["against_best"]) == 1


def test_tuning_is_the_same_for_all_on_its_own_seed(compared: Path) -> None:
    found = content(compared)
    assert found["tuning"]["seed"] == 1001
    for label in LABELS:
        tuned = found["tuning"]["methods"][label]
        assert [trial["values"] for trial in tuned["trials"]] == [
            {"train.lr": 1e-4},
            {"train.lr": 2e-2},
        ]
        scores = []
        for trial in tuned["trials"]:
            result = Result(compared / "tune" / label / trial["name"])
            assert result.job.run.seed == 1001
            assert result.job.data.validation_fraction == 0.2
            assert result.job.train.lr == trial["values"]["train.lr"]
            lines = [line for line in result.metrics() if line["split"] == "validation"]
            assert [line["client"] for line in lines] == ["site-0", "site-1"]
            scores.append(fmean(line["accuracy"] for line in lines))
            assert trial["score"] == pytest.approx(scores[-1])
        best = scores.index(max(scores))
        assert tuned["chosen"] == tuned["trials"][best]["values"]
        run = Result(compared / "runs" / label / "seed-0")
        assert run.job.train.lr == tuned["chosen"]["train.lr"]


def test_a_trial_whose_loss_is_not_finite_has_no_score(compared: Path, tmp_path: Path) -> None:
    source = compared / "tune" / "alike" / "lr=0.02"
    assert validation_score(Result(source)) is not None
    (tmp_path / "summary.json").write_text((source / "summary.json").read_text())
    lines = (source / "metrics.jsonl").read_text()
    broken = re.sub(
        r'("client": "site-0", "split": "validation", "loss": )[\d.e-]+', r"\1null", lines
    )
    assert broken != lines
    (tmp_path / "metrics.jsonl").write_text(broken)
    assert validation_score(Result(tmp_path)) is None
    (tmp_path / "metrics.jsonl").write_text(
        "".join(x for x in lines.splitlines(True) if "validation" not in x)
    )
    with pytest.raises(RunError, match="no validation measures of round 2"):
        validation_score(Result(tmp_path))


def test_a_diverged_trial_loses_and_does_not_end_the_comparison(job: Job, tmp_path: Path) -> None:
    found = compare(
        job, "local", "0", tmp_path / "out", tune=["lr=1e-3,1e30"], settings=["train.clip=0"]
    )
    trials = found["tuning"]["methods"]["local"]["trials"]
    assert trials[1]["score"] is None
    assert trials[1]["problem"]
    assert found["tuning"]["methods"]["local"]["chosen"] == {"train.lr": 1e-3}


def test_the_tables_parse_and_name_the_head(compared: Path) -> None:
    markdown = (compared / "table.md").read_text(encoding="utf-8")
    assert "Head: local for every method." in markdown
    blocks = [
        [line for line in part.splitlines() if line.startswith("|")]
        for part in markdown.split("**Traffic")
    ]
    for block, first in zip(blocks, ("base, head alone", "local"), strict=True):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block]
        assert len({len(row) for row in rows}) == 1
        assert rows[2][0] == first
        assert [row[0] for row in rows[-2:]] == LABELS
    found = content(compared)["methods"][0]["metric"]
    assert f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}" in blocks[0][3]
    latex = (compared / "table.tex").read_text(encoding="utf-8")
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 2
    assert latex.count("{") == latex.count("}")
    assert not re.search(r"(?<!\\)%(?! \\usepackage)(?!$)", latex, re.M)
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 4 + 3
    assert {line.count("&") for line in body[:4]} == {10}
    assert latex.isascii()


def test_the_page_needs_nothing_else(compared: Path) -> None:
    page = (compared / "compare.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?:https?:|//)|@import|url\((?!#)", page)
    assert page.count("<svg") == 8  # four figures, each for a page and for a phone
    for name in ("rounds", "bytes", "clients", "differences"):
        assert (compared / "figures" / f"{name}.png").is_file()
    for label in LABELS:
        assert f'href="runs/{label}/seed-1/report.html"' in page


def test_what_is_done_is_not_done_again(
    compared: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, numbers = stamps(compared), content(compared)

    def never(*_: Any) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr("fedgrove.engines.local.LocalEngine.train", never)
    monkeypatch.setattr("fedgrove.compare.campaign.check", never)
    compare(job, out=compared, settings=HELD_OUT, **ASKED)
    assert stamps(compared) == before
    assert content(compared) == numbers


class Stopping(Overall):
    """Ctrl-C in the second round of run number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    @contextmanager
    def step(self, title: str, *, skipped: bool) -> Iterator[Callback]:
        class Stop(Callback):
            def round_started(self, round: int, clients: Any) -> None:
                if round == 2:
                    raise KeyboardInterrupt

        with super().step(title, skipped=skipped) as watch:
            yield Callbacks([watch, Stop()]) if self.done + 1 == self.at else watch


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(
    compared: Path, job: Job, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for at in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            compare(job, out=out, settings=HELD_OUT, progress=Stopping(at), **ASKED)
    before = {
        name: stamp
        for name, stamp in stamps(out).items()
        if name.startswith(("tune", "runs/local/seed-0"))
    }
    assert len({name.split("/seed-")[0].rsplit("/lr=")[0] for name in before}) == 3
    compare(job, out=out, settings=HELD_OUT, **ASKED)
    assert before.items() <= stamps(out).items()
    cut, whole = content(out), content(compared)
    for found in (cut, whole):
        for row in found["methods"]:
            del row["seconds"]
    assert cut == whole


def test_more_methods_are_added_to_what_is_there(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(job, "local", "0", out)
    before = stamps(out)
    found = compare(job, "fedit", "0", out)
    assert [row["label"] for row in found["methods"]] == ["local", "fedit"]
    assert before.items() <= stamps(out).items()
    assert found["methods"][0]["metric"]["std"] is None
    assert found["tuning"] is None
    assert found["methods"][0]["unseen"] is None
    assert any("local) was added" in note for note in found["notes"])
    assert any("got 2 epochs" in note for note in found["notes"])


def test_runs_on_other_data_are_not_compared(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(job, "fedit", "0", out)
    table = out / "runs" / "fedit" / "seed-0" / "federation.json"
    table.write_text(re.sub(r'("fingerprint": ")\w', r"\1z", table.read_text()))
    with pytest.raises(RunError, match=r"seed-0 was run on other data than .*local"):
        compare(job, "fedit", "0", out)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"methods": "fedit,fedxyz"}, "fedxyz"),
        ({"methods": "fedit[weigths=uniform]"}, "did you mean method.weights"),
        ({"seeds": "0,x"}, "'x'"),
        ({"tune": ["speed=1,2"]}, "speed"),
        ({"tune": ["method.tau=1,2"]}, "a method's own key"),
        ({"tune": ["lr=-1,1"]}, "train.lr must be"),
        ({"settings": ["method.weights=uniform"]}, "fedit[weights=uniform]"),
        ({"settings": ["run.seed=1"]}, "--seeds"),
        ({"settings": ["federation.ranks=[2,4]"]}, "fedit: federation.ranks gives different ranks"),
        ({"tune": ["lr=1,2"], "tune_seed": 0}, "--tune-seed 0"),
    ],
)
def test_wrong_inputs_are_one_sentence_and_write_nothing(
    asked: Any, words: str, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(FedgroveError) as caught:
        compare(job, out=tmp_path / "out", **{"methods": "fedit", "seeds": "0"} | asked)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_foreign_directory_is_refused(job: Job, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunError, match="holds no comparison"):
        compare(job, "fedit", "0", tmp_path)
    with pytest.raises(RunError, match="is a file"):
        compare(job, "fedit", "0", tmp_path / "notes.txt")


def test_the_command(
    compared: Path, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(job.to_toml())
    common = [
        "compare",
        str(file),
        "--methods",
        ASKED["methods"],
        "--set",
        HELD_OUT[0],
        "--tune",
        ASKED["tune"][0],
    ]
    assert main([*common, "--seeds", "0,1", "--out", str(compared)]) == 0
    printed = capsys.readouterr().out
    assert "[8/8] alike, seed 1" in printed
    assert "done before" in printed
    assert "Head: local for every method." in printed
    assert re.search(r"^(alike|local) .* best", printed, re.M)
    assert main([*common, "--seeds", "0,0", "--out", str(compared)]) == 2
    assert capsys.readouterr().err == "Error: --seeds has 0 twice; give each seed once.\n"


def test_a_narrow_terminal_gets_the_table_in_parts_and_every_number_whole(compared: Path) -> None:
    found = content(compared)
    grid = tables.results(found)
    printed = {}
    for width in (60, 200):
        console = Console(width=width, file=io.StringIO())
        parts = tables.terminal(grid, width)
        for part in parts:
            console.print(part)
        assert (len(parts) > 1) == (width == 60)
        printed[width] = console.file.getvalue()  # type: ignore[attr-defined]
        assert "…" not in printed[width]
        assert max(map(len, printed[width].splitlines())) <= width
        for row in grid.rows:
            assert all(cell.text in printed[width] for cell in row)
    assert printed[60].count("base, head alone") > printed[200].count("base, head alone") == 1


def test_methods_that_learn_to_write_are_compared_too(
    tiny_llama: Path, exchanges: Path, tmp_path: Path
) -> None:
    data = {"task": "generate", "max_length": 48, "max_new_tokens": 4, "generate_examples": 2}
    job = tiny_job(tiny_llama, exchanges, data=data, run={"rounds": 1})
    found = compare(job, ["fedit"], [0], tmp_path / "out")
    assert found["metric"] == "rouge_l"
    assert [row["label"] for row in found["methods"]] == ["local", "fedit"]
    figures = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"bytes.png", "clients.png", "differences.png"}, (
        "one measured round has no course"
    )
    grid = tables.results(found)
    assert "Rouge_l" in grid.title
    assert grid.rows[0][0].text == "base", "a language model has no head of ours"
    assert "head" not in " ".join(grid.caption).casefold()
    column = grid.headings.index("loss")
    losses = {row["label"]: row["loss"]["mean"] for row in found["methods"]}
    for row in grid.rows:
        if (label := row[0].text) in losses:
            assert row[column].text.startswith(f"{losses[label]:.3f}"[:4])
            assert row[column].best == (losses[label] == min(losses.values())), "the lowest is best"
