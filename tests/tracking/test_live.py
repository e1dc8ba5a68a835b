from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedgrove.tracking.callback import Callback, RunInfo
from fedgrove.tracking.display import MOST_LOST, PlainProgress
from fedgrove.tracking.live import LiveProgress, progress

CLIENTS = tuple(f"tweets-{number}" for number in range(4))
INFO = RunInfo("fedit", "fedit on minilm", 3, CLIENTS, Path("runs/fedit"))


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    """A second passes each time somebody looks."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def play(display: Callback, rounds: int = 3, info: RunInfo = INFO) -> None:
    display.phase("loading the model")
    display.run_started(info)
    for round in range(info.start_round, info.start_round + rounds):
        display.round_started(round, info.clients)
        for number, client in enumerate(info.clients):
            line = {
                "round": round,
                "client": client,
                "split": "train",
                "loss": 1 / round,
                "bytes_up": 1000,
            }
            display.client_done(round, {**line, "bytes_down": 2000, "seconds": number})
        display.phase("evaluating", 4)
        display.phase_advanced()
        display.evaluated(
            round, [scored(round, client, 0.5 + 0.1 * round) for client in info.clients]
        )
        display.round_done(round, {})


def scored(round: int, client: str, value: float) -> dict[str, Any]:
    return {
        "round": round,
        "client": client,
        "split": "test",
        "loss": 0.5,
        "accuracy": value,
        "examples": 10,
    }


def frame(display: LiveProgress, width: int = 80) -> list[str]:
    """What the live view shows now, as lines."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system=None,
        legacy_windows=False,
    )
    console.print(display)
    assert isinstance(console.file, io.StringIO)
    return [
        re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()
        for line in console.file.getvalue().splitlines()
    ]


@pytest.mark.parametrize(
    ("stream", "environment", "kind"),
    [
        (io.StringIO, {}, PlainProgress),
        (
            io.StringIO,
            {"FORCE_COLOR": "1"},
            PlainProgress,
        ),  # rich calls this a terminal; it is a pipe all the same
        (Terminal, {}, LiveProgress),
        (Terminal, {"NO_COLOR": "1"}, LiveProgress),
        (Terminal, {"TERM": "dumb"}, PlainProgress),
    ],
)
def test_the_display_fits_the_stream(
    stream: Callable[[], io.StringIO],
    environment: dict[str, str],
    kind: type[Callback],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert type(progress(Console(file=stream()))) is kind


def test_plain_lines_say_everything_once() -> None:
    file = io.StringIO()
    display = PlainProgress(Console(file=file, width=40), Clock())
    play(display)
    display.run_finished({"rounds": 3}, Path("runs/fedit"))
    lines = file.getvalue().splitlines()
    assert lines[:2] == ["loading the model", "fedit on minilm | 4 clients, 3 rounds | runs/fedit"]
    assert lines[2].startswith(
        "round 1/3 | 4 clients | loss 1.000 | accuracy 60.0 % | tail 60.0 % | up 4.0 kB | down 8.0 "
        "kB | "
    )
    assert lines[2].endswith(" left")
    assert "accuracy 70.0 % (+10.0) | tail 70.0 % (+10.0) | up 8.0 kB | down 16 kB" in lines[3]
    assert "left" not in lines[4]
    assert lines[5].startswith("finished 3 rounds in ")
    assert len(lines) == 6
    assert file.getvalue().isascii()
    assert file.getvalue().replace("\n", "").isprintable()


def test_plain_says_where_a_resumed_run_begins_and_where_a_run_stops() -> None:
    file = io.StringIO()
    display = PlainProgress(Console(file=file), Clock())
    play(display, rounds=1, info=RunInfo("fedit", "fedit", 3, CLIENTS, Path("run"), start_round=3))
    display.run_stopped(3, "interrupted")
    lines = file.getvalue().splitlines()
    assert lines[1] == "fedit | 4 clients, 3 rounds, from round 3 | run"
    assert lines[-1] == "stopped after round 3 of 3: interrupted"


def test_plain_shows_an_evaluation_outside_rounds() -> None:
    file = io.StringIO()
    display = PlainProgress(Console(file=file), Clock())
    display.run_started(INFO)
    display.evaluated(0, [scored(0, client, 0.25) for client in CLIENTS])
    assert (
        file.getvalue().splitlines()[-1]
        == "evaluated after round 0 | accuracy 25.0 % | tail 25.0 %"
    )


def test_plain_lines_survive_a_stream_that_knows_only_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display = PlainProgress(Console(file=file), Clock())
    display.line("fedit · minilm")
    file.seek(0)
    assert file.read() == "fedit ? minilm\n"


def test_the_live_view_at_eighty_columns() -> None:
    display = LiveProgress(Console(file=Terminal(), width=80), Clock())
    try:
        play(display, rounds=2)
        display.round_started(3, CLIENTS)
        display.client_done(
            3, {"client": "tweets-2", "loss": 0.25, "bytes_up": 1000, "bytes_down": 2000}
        )
        lines = frame(display)
    finally:
        display.close()
    assert lines[0] == "fedit on minilm  runs/fedit"
    assert re.fullmatch(r"round    3/3  [━╸╺ ]+  .* left", lines[1])
    assert re.fullmatch(r"clients  1/4  [━╸╺ ]+  tweets-2", lines[2])
    assert lines[3].startswith("loss 0.250   accuracy 70.0 % (+10.0)   tail 70.0 % (+10.0)")
    assert "best 70.0 % in round 2" in " ".join(lines[3:])
    assert "up 9.0 kB   down 18 kB" in " ".join(lines[3:])
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("width", [20, 40, 59, 61, 80, 200])
def test_the_live_view_fits_any_width(width: int) -> None:
    display = LiveProgress(Console(file=Terminal(), width=width), Clock())
    try:
        play(display, rounds=1)
        display.phase("writing adapters of every client and then some", 4)
        lines = frame(display, width)
    finally:
        display.close()
    assert all(len(line) <= width for line in lines)
    if width >= 30:
        assert any(
            "accuracy 60.0 %" in line for line in lines
        )  # a number is not torn from its name


def test_a_phase_shows_its_steps_until_the_next_hook() -> None:
    display = LiveProgress(Console(file=Terminal(), width=80), Clock())
    try:
        display.phase("loading the model")
        assert frame(display)[0].startswith("loading the model")
        display.phase("base heads", 4)
        display.phase_advanced()
        assert frame(display)[0].startswith("base heads  1/4")
        display.run_started(INFO)
        display.round_started(1, CLIENTS)
        assert not any("base heads" in line for line in frame(display))
        assert any(line.startswith("clients  0/4") for line in frame(display))
    finally:
        display.close()


def test_the_live_view_cleans_up_after_itself() -> None:
    file = Terminal()
    display = LiveProgress(
        Console(file=file, width=80, force_terminal=True, legacy_windows=False), Clock()
    )
    play(display)
    display.run_finished({"rounds": 3}, Path("runs/fedit"))
    display.close()
    text = file.getvalue()
    assert (
        text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    )  # the cursor is hidden and shown again
    last = text.split("\x1b[?25h")[-1]
    assert re.sub(r"\x1b\[\w\w|\x1b\[K", "", last).strip().startswith("finished 3 rounds in ")
    assert text.index("\x1b[2K") < text.index("finished")  # what was drawn is erased


def test_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    display = progress(Console(file=file, width=80, force_terminal=True))
    play(display)
    display.close()
    codes = {
        code
        for codes in re.findall(r"\x1b\[([\d;]*)m", file.getvalue())
        for code in codes.split(";")
    }
    assert codes <= {"", "0", "1", "2", "22"}  # bold and dim only


@pytest.mark.parametrize("kind", [PlainProgress, LiveProgress])
def test_of_many_lost_clients_a_few_are_named_and_the_rest_counted(kind: Any) -> None:
    file = io.StringIO()
    display = kind(Console(file=file, width=200), Clock())
    for round in (1, 2):
        display.round_started(round, [f"c{n}" for n in range(1000)])
        for n in range(1000):
            display.client_lost(round, f"c{n}", "left out", "no answer")
        display.round_done(round, {})
    display.client_lost(3, "c7", "refused", "its data changed")
    display.run_stopped(2, "interrupted")
    said = [line.strip() for line in file.getvalue().splitlines()]
    assert said.count("round 2: c0 left out: no answer") == 1
    assert said.count("round 2: 995 more clients lost; events.jsonl names all of them") == 1
    assert said.count("round 3: c7 refused: its data changed") == 1
    assert len(said) == 2 * (MOST_LOST + 1) + 2
