"""The report and the page of a comparison in a real browser: no error, every figure drawn, readable
on a phone, in light and dark, and with the keyboard alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.compare import made
from tests.report.conftest import build

from fedgrove.compare.write import write_page
from fedgrove.report import write_report

pytestmark = pytest.mark.browser

WIDE, PHONE = 1280, 390
PAGES = ("report", "crowd", "compare", "compare-crowd")

#: [text, contrast, size in pixels, bold] of every text on the page. SVG texts are measured as drawn.
TEXTS = """() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return numbers.length > 3 ? numbers : [...numbers, 1];
  };
  const light = ([r, g, b]) => [r, g, b].map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement;
    const a = light(parse(drawn ? style.fill : style.color)), b = light(ground(element));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const scale = drawn ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    const size = parseFloat(style.fontSize) * scale;
    found.push([element.textContent.trim().slice(0, 60), contrast, size, style.fontWeight >= 600]);
  }
  return found;
}"""

#: What is wrong with each figure that shows, "" where nothing is.
FIGURES = """() => [...document.querySelectorAll("figure")].map((figure) => {
  const drawn = [...figure.querySelectorAll("svg, img")].filter((each) => each.checkVisibility());
  if (drawn.length !== 1) return `${drawn.length} drawings show`;
  const [shown] = drawn, box = shown.getBoundingClientRect();
  if (box.width < 200 || box.height < 60) return `it is ${box.width} by ${box.height}`;
  if (shown.tagName === "IMG") return shown.naturalWidth ? "" : "its image is broken";
  return shown.querySelectorAll("path").length > 3 ? "" : "it is empty";
})"""


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    found = {}
    for name, clients in (("report", 16), ("crowd", 1000)):
        local = build(root / name / "local", method="local", clients=clients, tuned=True)
        run = build(root / name / "fedit", clients=clients, tuned=True)
        found[name] = write_report(run, [local])
    for name, clients in (("compare", 12), ("compare-crowd", 1000)):
        (root / name).mkdir()
        found[name] = write_page(made.content(clients), root / name)
    return found


@pytest.fixture
def shown(chromium: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page by name; at the end no page has said anything or asked for anything else."""
    contexts, said = [], []

    def open_page(name: str, width: int = WIDE, scheme: str = "light") -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=width == PHONE
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if _away(request.url) else None)
        page.goto(pages[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def _away(address: str) -> bool:
    return not address.startswith(("file:", "data:"))


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_drawn_and_nothing_hangs_over(name: str, width: int, shown: Any) -> None:
    page = shown(name, width)
    found = page.evaluate(FIGURES)
    assert len(found) >= 4
    assert set(found) == {""}
    over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert over <= 0, "the page scrolls sideways"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("name", PAGES)
def test_texts_are_large_and_strong_enough(name: str, width: int, scheme: str, shown: Any) -> None:
    page = shown(name, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    texts = page.evaluate(TEXTS)
    assert len(texts) > 100
    small = [text for text, _, size, _ in texts if size < 8.5]
    assert small == []
    pale = {
        (text, round(contrast, 2))
        for text, contrast, size, bold in texts
        if contrast < (3 if size >= 24 or (bold and size >= 18.6) else 4.5)
    }
    assert pale == set()


@pytest.mark.parametrize("name", PAGES)
def test_a_screen_reader_finds_its_way(name: str, shown: Any) -> None:
    page = shown(name)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((h) => +h.tagName[1])")
    assert all(after - before <= 1 for before, after in pairwise(levels))
    unnamed = "svg:not([role=img][aria-label]), img:not([alt]), table th:not([scope])"
    assert page.locator(unnamed).all_inner_texts() == []
    assert page.locator("main").count() == 1


@pytest.mark.parametrize("name", ["report", "compare"])
def test_the_keyboard_reaches_what_can_be_opened_and_scrolled(name: str, shown: Any) -> None:
    page = shown(name, PHONE)
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        at = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e.tagName, e.className, s.outlineStyle]; })()"
        )
        if at[0] == "BODY":
            break
        reached.append(at)
        assert at[2] != "none", f"{at[0]} shows no focus"
    tags = [tag for tag, _, _ in reached]
    assert tags.count("SUMMARY") == page.locator("summary").count()
    sideways = page.evaluate(
        "[...document.querySelectorAll('.scroll, pre')].filter((e) => e.checkVisibility()"
        " && e.scrollWidth > e.clientWidth && e.tabIndex < 0).length"
    )
    assert sideways == 0, "what scrolls cannot be reached"
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None


@pytest.mark.parametrize(
    ("name", "typed", "first", "said"),
    [
        ("report", "NYT-3", "nyt-3", "1 found"),
        ("report", "movies", "movies-0", "4 found"),
        ("crowd", "client-99", "client-990", "10 found"),
        ("crowd", "nobody", None, "0 found"),
    ],
)
def test_clients_are_searched(
    name: str, typed: str, first: str | None, said: str, shown: Any
) -> None:
    page = shown(name)
    page.locator("summary", has_text="All clients").click()
    rows = page.locator("#everyone tbody tr")
    before, note = rows.all_inner_texts(), page.locator("#matches").inner_text()
    page.locator("#search").press_sequentially(typed)
    found = rows.locator("th").all_inner_texts()
    assert page.locator("#matches").inner_text() == said
    assert sorted(found)[:1] == ([first] if first in found else [])
    assert len(found) == int(said.split()[0])
    page.locator("#search").fill("")
    assert rows.all_inner_texts() == before
    assert page.locator("#matches").inner_text() == note
