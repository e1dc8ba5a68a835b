from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fedgrove.ground.errors import RunError
from fedgrove.report import write_report

from .conftest import MakeRun, change


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects what matters."""

    VOID = frozenset({"meta", "img", "br", "path", "use", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._attributes(attributes)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def _attributes(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            elif name == "href" and (value or "").startswith("#"):
                self.anchors.append((value or "")[1:])
            elif name in ("href", "src", "srcset", "data", "action"):
                self.addresses.append(value or "")

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_a_full_report_is_one_file_with_everything_in_it(
    make_run: MakeRun, picture: list[Any]
) -> None:
    local = make_run("alone", method="local", gain=0.1)
    run = make_run("together", clients=14, held_out=2, tuned=True)
    target = write_report(run, [local])
    assert target == run / "report.html"
    text, page = target.read_text(encoding="utf-8"), read(target)
    assert [address[:22] for address in page.addresses] == ["data:image/png;base64,"]
    assert "http" not in text.replace("http-equiv", "")
    assert re.findall(r"@import|url\((?!#)", text) == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.anchors) <= set(page.ids)
    for heading in (
        "Compared",
        "Over rounds",
        "Each client",
        "Who gains and who loses",
        "Who holds what data",
    ):
        assert heading in page.text
    for heading in (
        "Parameters and traffic",
        "Time",
        "Use the adapters",
        "The resolved job",
        "Versions",
    ):
        assert heading in page.text
    assert "Each client alone" in page.text
    assert "then trained on at each client" in page.text
    assert "2 clients that never trained" in page.text
    assert "torch 2.13.0" in re.sub(r"\s+", " ", page.text)
    assert 'name = "minilm"' in text.replace("&#34;", '"')
    assert picture == [json.loads((run / "federation.json").read_text())]
    figures = {path.name for path in (run / "figures").iterdir()}
    assert figures == {
        "accuracy.png",
        "losses.png",
        "clients.png",
        "gains.png",
        "who-holds-what.png",
    }
    assert "Notes" not in page.text


def test_the_same_run_gives_the_same_report(make_run: MakeRun, picture: list[Any]) -> None:
    run = make_run("run", clients=3, rounds=1)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_one_client_and_one_round(make_run: MakeRun, picture: list[Any]) -> None:
    page = read(write_report(make_run("run", clients=1, rounds=1)))
    assert "1 client fine-tuned minilm" in page.text
    assert "Over rounds" not in page.text  # one evaluation is no curve
    assert "Who gains" not in page.text
    assert "could not be shown" not in page.text


def test_two_hundred_clients(make_run: MakeRun, picture: list[Any]) -> None:
    target = write_report(make_run("run", clients=200, rounds=2))
    page = read(target)
    assert "200 clients, best first" in page.text
    assert "could not be shown" not in page.text
    assert target.stat().st_size < 2_000_000


def test_two_thousand_clients_are_drawn_as_a_hundred_bars(make_run: MakeRun) -> None:
    local = make_run("local", method="local", clients=2000, rounds=2)
    target = write_report(make_run("run", clients=2000, rounds=2, tuned=True), [local])
    page = read(target)
    assert "2,000 clients, best first; a bar is the mean of 20" in page.text
    assert "the 100 weakest of 2,000 clients" in page.text
    assert "could not be shown" not in page.text
    assert target.stat().st_size < 1_500_000


def test_all_losses_and_metrics_missing(make_run: MakeRun, picture: list[Any]) -> None:
    run = make_run("run", clients=3, rounds=3)
    summary = json.loads((run / "summary.json").read_text())
    for row in summary["clients"].values():
        row.update(metric=None, metric_base=None, loss=None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.update({key: None for key in ("loss", "accuracy") if key in line})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(write_report(change(run, summary)))
    assert "nothing to compare" in page.text
    assert "could not be shown" not in page.text


def test_names_cannot_inject_anything_and_lost_losses_are_said(
    make_run: MakeRun, picture: list[Any]
) -> None:
    names = ["<script>alert(1)<script>", 'a"b&c$d$', "</style>北京"]
    run = make_run("run", names=names, rounds=2, nan_losses=True)
    (run / "job.toml").write_text('title = "</pre><script>alert(2)</script>"\n')
    target = write_report(run)
    text = target.read_text(encoding="utf-8")
    assert text.count("<script>") == 1  # our own
    assert text.count("</style>") == 1
    page = read(target)
    assert (
        "The training loss was not a finite number 1 time: <script>alert(1)<script>." in page.text
    )
    assert "could not be shown" not in page.text


def test_only_the_summary(make_run: MakeRun, picture: list[Any]) -> None:
    run = make_run("run", clients=3)
    for name in ("job.toml", "metrics.jsonl", "federation.json", "versions.json"):
        (run / name).unlink()
    page = read(write_report(run))
    assert "Each client" in page.text
    assert "job.toml is missing" in page.text
    assert "federation.json is missing" in page.text
    assert "This run did not record them" in page.text
    assert picture == []


def test_a_metric_that_is_no_share(make_run: MakeRun, picture: list[Any]) -> None:
    run = make_run("run", clients=3, rounds=1)
    summary = json.loads((run / "summary.json").read_text()) | {"metric": "rouge1"}
    for number, row in enumerate(summary["clients"].values()):
        row.update(metric_base=30.0, metric=32.5 + number)
    page = read(write_report(change(run, summary)))
    assert "The average client’s rouge1 went from 30.000 (untouched base) to 33.500." in page.text


def test_a_picture_of_the_data_that_fails(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = ModuleType("fedgrove.federation.picture")
    monkeypatch.setitem(sys.modules, broken.__name__, broken)
    page = read(write_report(make_run("run", clients=2, rounds=1)))
    assert "The picture of who holds what could not be shown (ImportError" in page.text


def test_no_summary_and_no_place_to_write(make_run: MakeRun, picture: list[Any]) -> None:
    run = make_run("run", clients=2, rounds=2)
    (run / "figures").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        write_report(run)
    (run / "summary.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        write_report(run)
