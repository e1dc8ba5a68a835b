"""The page of a run in a process of its own, so that drawing takes nothing from the training's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

from fedgrove.ground.errors import RunError
from fedgrove.watch.server import HOST, Server

RUN = "fedgrove.watch.look:Look"  # what looks at a run's directory


@contextmanager
def page(folder: Path, port: int, look: str = RUN) -> Iterator[str]:
    """Within it there is a page; its address. ``folder`` need not be there yet; ``look``: what looks at
    it (``module:class``, a ``server.Looks`` of a folder). Raises ``RunError`` where the port cannot
    be used.
    """
    command = [sys.executable, "-m", "fedgrove.watch.beside", str(folder), str(port), look]
    # a session of its own: Ctrl-C ends the run first, then this block the page
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        answer = process.stdout.readline().strip()
        if not answer.startswith("http"):
            raise RunError(answer or "The page could not be started.")
        yield answer
    finally:
        process.stdin.close()  # its sign to end, also where this process is killed
        process.wait(timeout=10)
        process.stdout.close()


@contextmanager
def told(
    folder: Path,
    port: int | None,
    say: Callable[[str], object] = print,
    look: str = RUN,
) -> Iterator[None]:
    """A page and a line that names it, where ``port`` is one."""
    if port is None:
        yield
        return
    with page(folder, port, look) as address:
        say(f"Watch it at {address}")
        yield


def _main(folder: str, port: str, look: str) -> None:
    import threading

    try:
        server = Server(Path(folder), HOST, int(port), look=resolve_name(look))
    except RunError as error:
        print(error, flush=True)
        return
    print(server.address, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
