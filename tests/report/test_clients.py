"""The clients in numbers: all of few, a choice of many, groups and quantiles."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedgrove.report import clients, write_report
from fedgrove.report.compare import compare
from fedgrove.report.data import load

from .conftest import MakeRun


def test_every_client_of_few_is_in_the_table(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=3, held_out=1))
    found = clients.table(run, compare(run, []))
    assert [row[0] for row in found.rows] == [
        "amazon-0",
        "amazon-1",
        "amazon-2",
        "amazon-3 (never trained)",
    ]
    assert {len(row) for row in found.rows} == {len(found.headings)}
    assert {row[found.headings.index("tuned")] for row in found.rows} == {"–"}
    assert "alone" not in found.headings
    assert found.data == ""
    local = load(make_run("local", method="local", clients=3))
    both = clients.table(run, compare(run, [local]))
    assert "alone" in both.headings


def test_of_many_the_weakest_stand_in_the_page_and_all_can_be_searched(make_run: MakeRun) -> None:
    run = load(make_run("run", clients=300))
    comparison = compare(run, [])
    found = clients.table(run, comparison)
    values = comparison.ours.values
    assert len(found.rows) == clients.WEAKEST
    shown = {row[0] for row in found.rows}
    assert max(values[name] for name in shown) <= min(
        value for name, value in values.items() if name not in shown
    )
    everyone = json.loads(found.data)
    assert len(everyone) == found.clients == 300
    assert found.rows[0] in everyone


def test_names_in_the_data_close_no_script(make_run: MakeRun, picture: list[Any]) -> None:
    names = [f"</script><b>{number}" for number in range(clients.WHOLE + 1)]
    page = write_report(make_run("run", names=names, rounds=1)).read_text(encoding="utf-8")
    assert page.count("</script>") == 2  # our own
    data = page.split('id="clients-data">')[1].split("</script>")[0]
    assert sorted(row[0] for row in json.loads(data)) == sorted(names)


def test_groups_are_summed_up(make_run: MakeRun) -> None:
    run = load(make_run("run"))
    comparison = compare(run, [])
    header, *rows = clients.groups(run, comparison)
    assert [row[0] for row in rows] == ["amazon", "movies", "nyt", "tweets"]
    assert {len(row) for row in rows} == {len(header)}
    mean = np.mean([value for name, value in comparison.ours.values.items() if "nyt" in name])
    assert rows[2][header.index("mean")] == f"{100 * mean:.1f}\u202f%"
    many = load(make_run("many", clients=30))  # names that begin with no group
    assert clients.groups(many, compare(many, [])) == []


def test_quantiles_are_shown_of_a_crowd(make_run: MakeRun) -> None:
    few, many = load(make_run("few")), load(make_run("many", clients=60))
    assert clients.quantiles(few, compare(few, [])) == []
    comparison = compare(many, [])
    header, base, ours = clients.quantiles(many, comparison)
    values = list(comparison.ours.values.values())
    assert ours[header.index("median")] == f"{100 * np.median(values):.1f}\u202f%"
    assert ours[header.index("worst")] == f"{100 * min(values):.1f}\u202f%"
    assert base[0] == "Untouched base, head only"
