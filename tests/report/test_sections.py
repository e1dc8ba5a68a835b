from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedgrove.methods import registry
from fedgrove.methods.contract import Method
from fedgrove.report import sections, write_report
from fedgrove.report.sections import Left, Section
from fedgrove.report.style import Figure, new_figure

from .conftest import MakeRun


def line(width: float) -> Figure:
    figure, axes = new_figure(width, 2)
    axes.plot([1, 2], [3, 4])
    return figure


def draw(left: Left) -> list[Section]:
    if not left.has("who.json"):
        return []
    table = [["layer", "groups"], ["0", "<3>"]]
    return [
        Section(left.read("who.json")["title"], "First <i>.\n\nSecond.", line, table),
        Section("Finished figure", figure=line(6)),
    ]


def fail(left: Left) -> list[Section]:
    raise KeyError("labels")


def broken(left: Left) -> list[Section]:
    def figure(width: float) -> Figure:
        raise ValueError("no rounds\nat all")

    return [Section("Noise", "What to see.", figure)]


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Installs a method of another package, with the picture that is named."""

    def install(pictures: str) -> None:
        module = ModuleType("somebodys_package")
        module.draw, module.fail, module.broken = draw, fail, broken  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        registry.register(
            type("Theirs", (Method,), {"name": "theirs", "title": "T", "pictures": pictures})
        )

    yield install
    registry.METHODS.forget()


def test_a_foreign_method_brings_its_picture(
    make_run: MakeRun, picture: list[Any], foreign: Any
) -> None:
    foreign("somebodys_package:draw")
    path = make_run("run", clients=1, rounds=1, method="theirs")
    assert "Who shares" not in write_report(path).read_text(encoding="utf-8")
    (path / "who.json").write_text('{"title": "Who shares with whom"}')
    page = write_report(path).read_text(encoding="utf-8")
    assert "<h2>Who shares with whom</h2>" in page
    assert "First &lt;i&gt;." in page
    assert '<td class="number">&lt;3&gt;</td>' in page
    assert page.count('aria-label="Who shares with whom"') == 2  # page and phone
    assert page.count('aria-label="Finished figure"') == 1
    assert (path / "figures" / "extra-1.png").exists()
    # the same file of another method is not its business
    other = make_run("other", clients=1, rounds=1)
    (other / "who.json").write_text('{"title": "Who shares with whom"}')
    assert "Who shares" not in write_report(other).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("somebodys_package:fail", "could not be shown (KeyError: &#39;labels&#39;)."),
        ("somebodys_package:nothing", "could not be shown (AttributeError"),
        ("no_such_package:draw", "could not be shown (ModuleNotFoundError"),
        (
            "somebodys_package:broken",
            "The figure “Noise” could not be shown (ValueError: no rounds at all).",
        ),
    ],
)
def test_a_failing_picture_is_one_line_and_the_report_stands(
    name: str, said: str, make_run: MakeRun, picture: list[Any], foreign: Any
) -> None:
    foreign(name)
    page = write_report(make_run("run", clients=1, rounds=1, method="theirs")).read_text("utf-8")
    assert said in page
    assert "Each client" in page
    assert ("What to see." in page) == name.endswith("broken")


def test_a_method_that_is_not_installed_is_said(make_run: MakeRun, picture: list[Any]) -> None:
    page = write_report(make_run("run", clients=1, rounds=1, method="gone")).read_text("utf-8")
    assert "gone is not installed here" in page


def test_every_picture_that_a_method_names_exists() -> None:
    named = [kind.pictures for kind in registry.catalogue().values() if hasattr(kind, "pictures")]
    assert len(named) >= 2
    for name in (*named, *sections.ALWAYS):
        assert callable(sections.resolve_name(name))


def test_a_method_with_a_picture_loads_no_matplotlib() -> None:
    code = "import sys; from fedgrove.methods import hilora; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_events_are_counted_by_kind(make_run: MakeRun, picture: list[Any]) -> None:
    path = make_run("run", clients=2, rounds=1)
    events = [
        {
            "round": round,
            "client": f"c{client}",
            "event": "left out",
            "reason": f"no answer within {60 + client} s",
        }
        for round in (2, 5)
        for client in range(300)
    ]
    events.append({"round": 3, "client": "c7", "event": "late", "reason": "its update <b>"})
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    page = write_report(path).read_text(encoding="utf-8")
    assert "601 events of 300 clients" in page
    assert '<th scope="row">left out</th><td class="prose">600</td>' in page
    assert '<td class="prose">2 to 5</td>' in page
    assert "c0, c1, c10 and 297 more" in page
    assert "its update &lt;b&gt;" in page


def test_a_run_directory_tells_what_it_has(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    (one / "a.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    (other / "b.json").write_text("{}")
    left = Left(one, (other,))
    assert [line["n"] for line in left.lines("a.jsonl")] == [1, 2]
    assert left.lines("c.jsonl") == []
    assert left.others("b.json") == [other]
    assert left.others("a.jsonl") == []
