"""Ctrl-C that is not lost.

Python drops a ``KeyboardInterrupt`` that falls into a destructor or a callback from C ("Exception
ignored in …"), and the program goes on. So the signal is also remembered, and long work asks.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_pressed = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Within it ``stop_if_pressed`` knows of a Ctrl-C. Another's handler is left alone."""
    _pressed.clear()
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # only the main thread may set a handler, and only it gets the interrupt
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_if_pressed() -> None:
    """Raise the ``KeyboardInterrupt`` that was dropped on its way."""
    if _pressed.is_set():
        _pressed.clear()
        raise KeyboardInterrupt


def _press(number: int, frame: FrameType | None) -> None:
    _pressed.set()
    if not _in_destructor(frame):
        signal.default_int_handler(number, frame)


def _in_destructor(frame: FrameType | None) -> bool:
    """Where Python would print the interrupt and drop it."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
