"""Ctrl-C in a place where Python drops it."""

from __future__ import annotations

import os
import signal

import pytest

from fedgrove.ground.ctrlc import remembered, stop_if_pressed


class Dying:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two steps of this
            pass


@pytest.fixture
def plain() -> None:
    """A suite in the background of a shell ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.filterwarnings("error")  # an exception that a destructor dropped
def test_a_ctrl_c_in_a_destructor_stops_the_next_piece_of_work(plain: None) -> None:
    with remembered():
        thing = Dying()
        del thing  # the run goes on, and nothing is printed
        with pytest.raises(KeyboardInterrupt):
            stop_if_pressed()
        stop_if_pressed()  # once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_old_one_does_not_stop_the_next_run(plain: None) -> None:
    with pytest.raises(KeyboardInterrupt), remembered():
        os.kill(os.getpid(), signal.SIGINT)
    with remembered():
        stop_if_pressed()


def test_another_handler_is_left_alone() -> None:
    def own(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGINT, own)
    try:
        with remembered():
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
