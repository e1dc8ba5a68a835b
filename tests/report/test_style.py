from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrove.ground.errors import RunError
from fedgrove.report import style


def drawn(label: str = "round") -> style.Figure:
    figure, axes = style.new_figure(4, 2)
    axes.plot([0, 1], [0, 1], color=style.COLOURS["ours"], clip_on=True)
    axes.set_xlabel(label)
    return figure


def test_svg_is_well_formed_and_refers_to_nothing_outside_itself() -> None:
    with style.applied():
        text = style.svg(drawn(), "one", 'A "label" & <more>')
    root = ET.fromstring(text)
    assert root.attrib["aria-label"] == 'A "label" & <more>'
    assert "http" not in text
    assert "viewBox" in root.attrib
    ids = {each.attrib["id"] for each in root.iter() if "id" in each.attrib}
    assert ids
    assert all(each.startswith("one-") for each in ids)
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert references  # the clip path and the tick marks
    assert references <= ids


def test_colours_become_variables_and_text_stays_text() -> None:
    with style.applied():
        text = style.svg(drawn(), "one", "label")
    assert "var(--ours)" in text
    assert not any(colour in text for colour in style.COLOURS.values())
    assert re.search(r"<text[^>]*>round</text>", text)
    assert "DejaVu" not in text


def test_every_role_has_a_colour_on_light_and_on_dark() -> None:
    css = (Path(style.__file__).parent / "page" / "style.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    for role in style.COLOURS:
        assert f"--{role}:" in light
        assert f"--{role}:" in dark.split("}")[0]


def test_names_are_printed_as_they_are() -> None:
    with style.applied():
        text = style.svg(drawn("<script>a$b$c</script> 北京"), "one", "label")
    assert "&lt;script&gt;a$b$c&lt;/script&gt; 北京" in text
    assert "<script" not in text


def test_the_same_figure_gives_the_same_svg() -> None:
    with style.applied():
        assert style.svg(drawn(), "one", "label") == style.svg(drawn(), "one", "label")


def test_png_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with style.applied(), pytest.raises(RunError, match="cannot write"):
        style.png(drawn(), tmp_path / "file" / "figure.png")


@given(st.lists(st.floats(0, 1), max_size=6), st.floats(0.01, 0.3))
def test_spread_keeps_labels_apart_and_in_order(places: list[float], gap: float) -> None:
    moved = style.spread(places, gap)
    assert len(moved) == len(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for before, after in pairwise(order):
        assert moved[after] - moved[before] >= gap - 1e-9


def test_spread_leaves_labels_alone_that_do_not_touch() -> None:
    assert style.spread([0.9, 0.1, 0.5], 0.2) == [0.9, 0.1, 0.5]
    assert style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
