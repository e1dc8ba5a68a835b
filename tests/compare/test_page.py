"""The page of a comparison: few clients and very many, and tables with their headings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.compare import made

from fedgrove.compare import figures, tables, write
from fedgrove.compare.spread import MOST, clients_are_many, values_of
from fedgrove.report import style


def test_few_clients_are_dots_and_many_are_quantiles() -> None:
    few, many = made.content(12), made.content(1500, methods=2)
    assert not clients_are_many(few)
    assert clients_are_many(many)
    with style.applied():
        dots = figures.clients(few, style.WIDE).axes[0]
        lines = figures.clients(many, style.WIDE).axes[0]
    drawn = sum(np.asarray(each.get_offsets()).shape[0] for each in dots.collections)
    assert drawn == 12 * 2 * 2 * len(few["methods"]), "a dot for each client, seed and measure"
    assert len(lines.lines) + len(lines.collections) < 40
    values = values_of(many["methods"][1], "metric")
    assert len(values) == 3000 > MOST
    reaches = [np.asarray(line.get_xdata()).tolist() for line in lines.lines]
    assert [values.min(), values.max()] in reaches


def test_the_page_of_thousands_of_clients_is_small(tmp_path: Path) -> None:
    page = write.write_page(made.content(5000, methods=3, seeds=2), tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "the box holds the middle half" in text
    assert "could not be shown" not in text
    assert len(text) < 300_000


def test_the_tests_have_their_headings(tmp_path: Path) -> None:
    content = made.content()
    ((_, (header, *rows)), _) = write.test_rows(content)
    assert header[:2] == ["method", "mean difference"]
    assert {len(row) for row in rows} == {len(header)}
    page = write.write_page(content, tmp_path).read_text(encoding="utf-8")
    assert page.count('<th scope="col" class="number">mean difference</th>') == 2


def test_the_reference_is_named_as_its_row_is() -> None:
    content = made.content()
    content["methods"][0]["label"] = "alone"
    assert any("alone is each client training alone" in said for said in tables.caption(content))


@pytest.mark.parametrize("count", [3, 400])
def test_dots_that_lie_together_stay_in_their_row(count: int) -> None:
    shifts = figures._swarm(np.full(count, 0.5))
    assert np.abs(shifts).max() <= 0.13 + 1e-9
    assert len(set(np.round(shifts, 9))) == count
