from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from fedgrove.tracking.callback import Callback, Callbacks, RunInfo

HOOKS: dict[str, tuple[Any, ...]] = {
    "run_started": (RunInfo("fedit", "title", 2, ("a",), Path("runs/x")),),
    "phase": ("loading", 3),
    "phase_advanced": (),
    "remark": ("3 rows are cut",),
    "round_started": (1, ["a"]),
    "client_done": (1, {"client": "a"}),
    "client_lost": (1, "a", "train", "too late"),
    "client_event": (1, "a", "late", "used in this round", ""),
    "evaluated": (1, [{"client": "a"}]),
    "round_done": (1, {}),
    "run_finished": ({"rounds": 2}, Path("runs/x")),
    "run_stopped": (1, "interrupted"),
    "close": (),
}


class Recorder(Callback):
    """Writes down which hook was called with what."""

    def __init__(self, name: str, heard: list[tuple[str, str, tuple[Any, ...]]]) -> None:
        for hook in HOOKS:
            setattr(self, hook, lambda *values, hook=hook: heard.append((name, hook, values)))


def test_every_hook_reaches_every_callback_in_order() -> None:
    public = {
        name
        for name, _ in inspect.getmembers(Callback, inspect.isfunction)
        if not name.startswith("_")
    }
    assert public == set(HOOKS)
    heard: list[tuple[str, str, tuple[Any, ...]]] = []
    many = Callbacks([Recorder("first", heard), Recorder("second", heard)])
    for hook, values in HOOKS.items():
        heard.clear()
        getattr(many, hook)(*values)
        assert heard == [("first", hook, values), ("second", hook, values)]


def test_a_bare_callback_ignores_everything() -> None:
    for hook, values in HOOKS.items():
        assert getattr(Callback(), hook)(*values) is None
