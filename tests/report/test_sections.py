from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedgrove.report import sections, write_report
from fedgrove.report.style import Figure, new_figure

from .conftest import MakeRun


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_MAKERS", {})


def line(width: float) -> Figure:
    figure, axes = new_figure(width, 2)
    axes.plot([1, 2], [3, 4])
    return figure


def test_an_artefact_adds_its_sections(make_run: MakeRun, picture: list[Any]) -> None:
    @sections.section("tree.json")
    def tree(run_dir: Path) -> list[sections.Section]:
        title = json.loads((run_dir / "tree.json").read_text())["title"]
        table = [["layer", "groups"], ["0", "<3>"]]
        return [
            sections.Section(title, "First <i>.\n\nSecond.", line, table),
            sections.Section("Finished figure", figure=line(6)),
        ]

    path = make_run("run", clients=1, rounds=1)
    assert "Who shares" not in write_report(path).read_text(encoding="utf-8")
    (path / "tree.json").write_text('{"title": "Who shares with whom"}')
    page = write_report(path).read_text(encoding="utf-8")
    assert "<h2>Who shares with whom</h2>" in page
    assert "First &lt;i&gt;." in page
    assert '<td class="number">&lt;3&gt;</td>' in page
    assert page.count('aria-label="Who shares with whom"') == 2  # page and phone
    assert page.count('aria-label="Finished figure"') == 1
    assert (path / "figures" / "extra-1.png").exists()


def test_a_failing_section_is_one_line_and_the_report_stands(
    make_run: MakeRun, picture: list[Any]
) -> None:
    @sections.section("clusters.json")
    def clusters(run_dir: Path) -> list[sections.Section]:
        raise KeyError("labels")

    @sections.section("noise.jsonl")
    def noise(run_dir: Path) -> list[sections.Section]:
        def broken(width: float) -> Figure:
            raise ValueError("no rounds\nat all")

        return [sections.Section("Noise", "What to see.", broken)]

    path = make_run("run", clients=1, rounds=1)
    (path / "clusters.json").write_text("{}")
    (path / "noise.jsonl").write_text("")
    page = write_report(path).read_text(encoding="utf-8")
    assert "clusters.json could not be shown (KeyError: &#39;labels&#39;)." in page
    assert "The figure “Noise” could not be shown (ValueError: no rounds at all)." in page
    assert "<h2>Noise</h2>" in page
    assert "What to see." in page
    assert "Each client" in page


def test_the_modules_of_pictures_are_found_and_import() -> None:
    sections._discover.cache_clear()
    assert sections._discover() == ()
