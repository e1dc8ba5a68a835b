"""The live page in a real browser: it follows a run that grows, without an error, wide and on a
phone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser.test_pages import FIGURES, PHONE, TEXTS, WIDE
from tests.deploy.test_audit import written
from tests.report.conftest import build

from fedgrove.deploy.leaving import Leaving
from fedgrove.watch.server import Server

pytestmark = pytest.mark.browser

WAIT = 120_000  # milliseconds
CUT = [
    {"round": number, "client": client, "scale": 1.0, "weight": float(client != "nyt-1")}
    for number in (1, 2, 3)
    for client in ("nyt-0", "nyt-1")
]


@pytest.fixture
def going(tmp_path: Path) -> Path:
    """A run after its third round of eight, with a defence."""
    run = build(tmp_path / "triage", rounds=3, clients=16)
    (run / "summary.json").unlink()
    (run / "run.lock").touch()
    job = (run / "job.toml").read_text().replace("rounds = 3", "rounds = 8")
    (run / "job.toml").write_text(job)
    told = {"time": "2026-01-02T03:04:05+00:00", "round": 3, "client": "nyt-2", "event": "left out"}
    reason = "no answer before the deadline of 60 s (federation.deadline)"
    (run / "events.jsonl").write_text(json.dumps(told | {"reason": reason}) + "\n")
    (run / "defence.json").write_text(json.dumps({"defence": {"rule": "krum"}, "lines": CUT}))
    return run


@pytest.fixture
def address(going: Path) -> Iterator[str]:
    server = Server(going, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.address
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "light"), (PHONE, "dark")])
def test_a_run_is_followed(
    width: int, scheme: str, chromium: Any, going: Path, address: str
) -> None:
    said: list[str] = []
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith(address) else said.append(asked.url)
    )
    page.goto(address)
    page.wait_for_selector("figure svg:visible", timeout=WAIT)

    found = page.evaluate(FIGURES)
    assert len(found) == 4
    assert set(found) == {""}
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    texts = page.evaluate(TEXTS)
    assert len(texts) > 60
    assert [text for text, _, size, _ in texts if size < 8.5] == []
    assert [(text, contrast) for text, contrast, *_ in texts if contrast < 4.5] == []
    assert page.locator("h1").count() == 1
    assert "round 3 of 8" in page.locator("#head").inner_text()
    assert "no answer before the deadline" in page.locator("#clients").inner_text()

    scrolled = page.locator("#clients .scroll").first
    scrolled.focus()
    with (going / "metrics.jsonl").open("a") as file:
        for place in range(16):
            line = {"round": 4, "client": f"nyt-{place % 4}", "split": "train", "loss": 0.5}
            file.write(json.dumps(line) + "\n")
    page.locator("#head", has_text="round 4 of 8").wait_for(timeout=WAIT)
    assert page.evaluate("document.activeElement.className") == "scroll"
    context.close()
    assert said == []


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_what_left_a_site_is_read(width: int, scheme: str, chromium: Any, tmp_path: Path) -> None:
    written(tmp_path / "audit.jsonl")
    server = Server(tmp_path, port=0, look=Leaving)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.address)
        page.wait_for_selector("table", timeout=WAIT)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        texts = page.evaluate(TEXTS)
        assert [(text, contrast) for text, contrast, *_ in texts if contrast < 4.5] == []
        assert "4 messages of 1 run left" in page.locator("#head").inner_text()
        written(tmp_path / "audit.jsonl", 1)
        page.locator("#head", has_text="5 messages").wait_for(timeout=WAIT)
        assert said == []
    finally:
        context.close()
        server.shutdown()
        thread.join()
        server.server_close()
