"""``fedgrove vertical`` as a user types it, and what a job's mistakes are told as."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.vertical.made import save_parties, values

from fedgrove.cli.entry import main
from fedgrove.ground.errors import JobError
from fedgrove.vertical.job import VerticalJob

JOBS = sorted((Path(__file__).parents[2] / "jobs" / "vertical").glob("*.toml"))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file beside its tables."""
    save_parties(tmp_path)
    path = tmp_path / "job.toml"
    path.write_text(VerticalJob.build(values()).to_toml())
    return path


def test_a_run_and_the_same_again(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgrove.vertical.start.write_page", lambda folder: folder)
    out = job.parent / "out"
    given = ["vertical", "run", str(job), "--out", str(out), "--seed", "3"]
    given += ["--set", "train.epochs=1"]
    assert main(given) == 0
    said = capsys.readouterr()
    assert "clinic alone (1)" in said.err
    assert "VIM, 3 parties together (1)" in said.err
    assert said.out.splitlines()[0].split() == [
        *("party", "reads", "alone", "all", "without", "it", "norm", "of", "its", "weights")
    ]
    assert said.out.endswith(f"Wrote {out / 'report.html'}.\n")
    assert tomllib.loads((out / "job.toml").read_text())["run"]["seed"] == 3
    assert main(given) == 2
    assert "continue a run with --resume" in capsys.readouterr().err
    assert main([*given, "--resume"]) == 0


def test_ctrl_c_says_how_to_go_on(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*given: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedgrove.vertical.course.carried_down", press)
    out = job.parent / "out"
    assert main(["vertical", "run", str(job), "--out", str(out)]) == 130
    assert f"fedgrove vertical run {job} --out {out} --resume" in capsys.readouterr().err
    assert not (out / "run.lock").exists()


def test_flower_is_refused_in_one_sentence(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vertical", "run", str(job), "--engine", "flower"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: A vertical run is simulated in one process")
    assert said.count("\n") == 1


def test_every_key_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vertical", "keys"]) == 0
    said = capsys.readouterr().out
    for key in ("data.unmatched", "method.rho", "party.NAME.columns", "privacy.noise", "run.alone"):
        assert f"  {key}: " in said


def test_a_job_is_what_its_file_says() -> None:
    made = VerticalJob.build(values())
    again = VerticalJob.build(tomllib.loads(made.to_toml()))
    assert again.to_dict() == made.to_dict()
    assert list(again.parties) == ["clinic", "lab", "other"]


@pytest.mark.parametrize("file", JOBS, ids=lambda path: path.stem)
def test_the_job_files_are_valid(file: Path) -> None:
    job = VerticalJob.load(file)
    assert len(job.speaking) >= 3
    assert "2207.10226" in file.read_text(encoding="utf-8")


def party(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda given: given["party"]["lab"].update(keys)


def section(name: str, /, **keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda given: given.setdefault(name, {}).update(keys)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            party(colums=["x"]),
            "the key party.lab.colums is unknown; did you mean party.lab.columns?",
        ),
        (party(columns=["b", "b"]), 'columns = ["b", "b"] names "b" twice; name each once.'),
        (
            party(columns=["b", "label"]),
            'party.lab would read the label itself, the column "label"',
        ),
        (party(columns=["b", "id"]), 'party.lab would learn from the id "id"; take it out.'),
        (party(width=0), "would send its columns as they are; set a width"),
        (party(text="note"), "a party has columns or a text; make two parties of one table."),
        (party(path=""), 'party.lab.path must be text, not "".'),
        (
            lambda given: given["party"]["lab"].pop("path"),
            "party.lab: path is missing; name its table.",
        ),
        (party(columns=None), "party.lab has neither columns nor a text"),
        (section("data", labels="nobody"), 'data.labels = "nobody" must name the one party'),
        (section("method", name="vin"), 'did you mean "vim"?'),
        (section("privacy", noise=1.0), "privacy.noise is in units of privacy.clip; set both."),
        (section("methd", name="vim"), "the section [methd] is unknown; did you mean [method]?"),
        (
            lambda given: given.pop("party"),
            "there is no party; write a table [party.NAME] for each.",
        ),
        (section("party", copy={"path": "x.csv"}), "party.copy: a party's name has letters"),
        (
            lambda given: [given["party"].pop(name) for name in ("lab", "other")],
            "needs two parties",
        ),
    ],
)
def test_mistakes_are_one_sentence(spoil: Callable[[dict[str, Any]], Any], words: str) -> None:
    given = values()
    spoil(given)
    with pytest.raises(JobError) as refused:
        VerticalJob.build(given, "job.toml")
    assert words in str(refused.value)
    assert str(refused.value).startswith("job.toml: ")
    assert "\n" not in str(refused.value)


def test_a_job_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"missing\.toml cannot be read"):
        VerticalJob.load(tmp_path / "missing.toml")
    (tmp_path / "broken.toml").write_text("[data\n")
    with pytest.raises(JobError, match=r"broken\.toml, line 1, column 6: broken TOML"):
        VerticalJob.load(tmp_path / "broken.toml")
