"""The example of a foreign package: its task, metric and source are found and run in both
engines.
"""

from __future__ import annotations

import json
import random
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.engines.grid import FakeGrid, run_on, virtual
from tests.test_run import adapters, summary
from tests.tiny import BAD, FILLER, GOOD

import fedgrove as fg
from fedgrove.federation.metrics import METRICS, Answers, Metric
from fedgrove.federation.sources import SOURCES
from fedgrove.federation.sources.files import SilosOptions, SilosSource
from fedgrove.federation.tasks import TASKS
from fedgrove.ground.errors import DataError, JobError
from fedgrove.ground.registry import Registry
from fedgrove.job import Job
from fedgrove.methods.registry import METHODS

__all__ = ["virtual"]

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"
REGISTRIES: tuple[Registry[Any], ...] = (METHODS, TASKS, METRICS, SOURCES)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    for registry in REGISTRIES:
        registry.forget()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example as pip would leave it: importable, with its entry points beside it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / "fedgrove_ward-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedgrove-ward\nVersion: 0.1.0\n")
    lines: list[str] = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(PLUGIN))
    monkeypatch.syspath_prepend(str(info.parent))
    for registry in REGISTRIES:
        registry.forget()


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """Texts with one point for each good word and one less for each bad one."""
    folder = tmp_path / "texts"
    folder.mkdir()
    draw = random.Random(0)
    for client in range(3):
        lines = []
        for _ in range(24):
            words = draw.choices([*GOOD, *BAD], k=3) + draw.choices(FILLER, k=3)
            points = sum((word in GOOD) - (word in BAD) for word in words)
            lines.append(f"{points}|{' '.join(words)}")
        (folder / f"site-{client}.txt").write_text("\n".join(lines))
    return folder


def rating_job(bert: Path, folder: Path) -> Job:
    return Job.build(
        {
            "model": {"name": str(bert)},
            "lora": {"rank": 4},
            "data": {
                "source": "text-files",
                "folder": str(folder),
                "task": "rate-text",
                "middle": 0.5,
                "max_length": 32,
                "metrics": ["mean_miss"],
            },
            "train": {
                "lr": 2e-2,
                "batch_size": 4,
                "local_steps": 12,
                "dtype": "float32",
                "threads": 1,
                "device": "cpu",
                "cohort": 1,
            },
            "run": {"rounds": 2, "seed": 7},
        }
    )


@pytest.mark.usefixtures("installed", "virtual")
def test_a_foreign_package_runs_in_both_engines(
    tiny_bert: Path, ratings: Path, tmp_path: Path
) -> None:
    job = rating_job(tiny_bert, ratings)
    assert Job.parse(job.to_toml()) == job
    result = fg.run(job, tmp_path / "local")
    run_on(FakeGrid(3), job, tmp_path / "flower")
    assert adapters(tmp_path / "local") == adapters(tmp_path / "flower")
    assert summary(tmp_path / "local") == summary(tmp_path / "flower")
    assert (result.summary["task"], result.summary["metric"]) == ("rate-text", "r2")
    federation = json.loads((tmp_path / "local" / "federation.json").read_text())
    assert federation["source"]["source"] == "text-files"
    one = result.client("site-1")
    before, after = one.summary["metric_base"], one.summary["metric"]
    assert after != before, "nothing trained, so equality would mean nothing"
    (rated,) = one.predict(["good happy bright film"])
    assert isinstance(rated, float)
    assert one.evaluate()["r2"] == pytest.approx(after)


@pytest.mark.usefixtures("installed")
def test_what_a_foreign_package_declares_is_explained_and_checked(
    tiny_bert: Path, ratings: Path
) -> None:
    job = rating_job(tiny_bert, ratings)
    text = " ".join(job.explain().split())
    assert "text-files: a folder with CLIENT.txt" in text
    assert "data.middle: a number; default: 0.0; here: 0.5" in text
    assert "data.middle: a number; default: 0.0 With data.task = " in " ".join(
        Job.default().explain().split()
    )
    with pytest.raises(JobError, match=r"data\.middle must be a number, not true"):
        job.override(["data.middle=true"])
    with pytest.raises(JobError, match=r'data\.middle = 0\.5 has no use with data\.task = "class'):
        Job.default().override(["data.middle=0.5"])
    with pytest.raises(JobError, match=r"the key data\.midle is unknown; did you mean data\.mid"):
        job.override(["data.midle=0.5"])
    classes = job.override(["data.task=classify-text", "data.metrics=[]"])
    assert not hasattr(classes.data, "middle")
    with pytest.raises(JobError, match=r'"f1" needs truth and predicted, .* "generate" does not'):
        job.override(["data.task=generate", "data.metrics=[f1]"])
    ratings.joinpath("site-0.txt").write_text("many|good film\n1|bad film\n")
    with pytest.raises(DataError, match=r"site-0\.txt, line 1: the column 'rating' is no number"):
        fg.run(job, ratings.parent / "out")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.word)
def test_each_kind_is_registered_replaced_and_refused(registry: Registry[Any]) -> None:
    ours = next(iter(registry.catalogue().values()))
    base = type("Base", (ours,), {})
    mine = registry.register(type("Mine", (base,), {"name": "mine"}))
    assert registry.find("mine") is mine
    again = registry.register(type("Again", (base,), {"name": "mine"}))
    assert registry.find("mine") is again
    with pytest.raises(JobError, match=f"Mine is called '{ours.name}', which is .* already"):
        registry.register(type("Mine", (base,), {"name": ours.name}))
    with pytest.raises(JobError, match=f"has no name of its own; .* 'my-{registry.word}'"):
        registry.register(base)
    registry.forget()
    with pytest.raises(JobError, match=f"{registry.key} is 'mine', which does not exist; there"):
        registry.find("mine")


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.word)
def test_an_entry_point_that_is_none_is_named(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    points = info / "entry_points.txt"
    monkeypatch.syspath_prepend(str(tmp_path))
    for value, sentence in (
        ("nowhere_at_all:Thing", r"cannot be loaded \(ModuleNotFoundError"),
        ("json:loads", f"is no {registry.word}: it must be a class that extends fedgrove"),
    ):
        points.write_text(f"[{registry.group}]\nbroken = {value}\n")
        registry.forget()
        with pytest.raises(JobError, match=f"of the package broken .*{sentence}"):
            registry.names()


def test_parts_that_declare_the_same_key_are_refused() -> None:
    class Twice(SilosOptions):
        group: str = "ward"

    @SOURCES.register
    class Clash(SilosSource):
        name: ClassVar[str] = "clash"
        Options: ClassVar[type[SilosOptions]] = Twice

    with pytest.raises(JobError, match=r"'clash' declares 'group', which is of \[data\] already;"):
        Job.build({"data": {"source": "clash", "path": "x"}})


def test_a_metric_of_a_notebook_is_asked_for_by_name() -> None:
    @METRICS.register
    class Share(Metric):
        name: ClassVar[str] = "share_of_first"

        def __call__(self, answers: Answers) -> float:
            assert answers.predicted is not None
            return float((answers.predicted == 0).mean())

    job = Job.default().override(["data.metrics=[share_of_first]"])
    assert job.data.metrics == ("share_of_first",)
    assert Job.parse(job.to_toml()) == job


def test_the_example_is_a_whole_package() -> None:
    assert "ward" not in sys.modules or str(PLUGIN) in str(sys.modules["ward"].__file__)
    named = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(named) == {TASKS.group, METRICS.group, SOURCES.group}
