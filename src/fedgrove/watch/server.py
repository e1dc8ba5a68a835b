"""One page over HTTP, for whoever knows its token: the page, its parts as server-sent events, and
the finished run's report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Protocol

from fedgrove.ground.ctrlc import stop_if_pressed
from fedgrove.ground.errors import RunError
from fedgrove.watch.look import Look, Parts

PORT = 8750
HOST = "127.0.0.1"
_REST = 1.0  # seconds between two looks at the directory
_BREATH = 4.0  # drawing rests that many times as long as it took
_KEEP = 15.0  # seconds of silence on a stream
_PATIENCE = 30.0  # seconds for a request to come


class Looks(Protocol):
    """What a page is made of, as ``watch.look.Look`` makes it of a run's directory."""

    def stamp(self) -> object:
        """Another one where there is something else to see."""

    def page(self) -> str:
        """The whole page, with empty places for its parts."""

    def parts(self, now: float) -> Parts:
        """HTML by the place; ``now``: seconds of a clock that only goes on."""


class Board:
    """The newest parts. They are drawn by one thread, and only while somebody looks."""

    def __init__(self, look: Looks):
        self.look = look
        self.parts: Parts = {}
        self.number = 0  # of the newest parts, from 1
        self.closed = False
        self._news = threading.Condition()
        self._watchers = 0
        self._thread = threading.Thread(target=self._work, name="board", daemon=True)
        self._thread.start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with self._news:
            self._watchers += 1
            self._news.notify_all()
        try:
            yield
        finally:
            with self._news:
                self._watchers -= 1

    def after(self, number: int, patience: float) -> tuple[int, Parts]:
        """Parts newer than ``number``, or the same ones where none came in ``patience`` seconds."""
        with self._news:
            self._news.wait_for(lambda: self.number > number or self.closed, patience)
            return self.number, self.parts

    def close(self) -> None:
        with self._news:
            self.closed = True
            self._news.notify_all()

    def _work(self) -> None:
        seen: object = None
        while True:
            with self._news:
                self._news.wait_for(lambda: self._watchers > 0 or self.closed)
                if self.closed:
                    return
            now = self.look.stamp()
            took = 0.0
            if now != seen or not self.number:
                seen = now
                began = time.monotonic()
                self._tell(self.look.parts(began))
                took = time.monotonic() - began
            with self._news:
                self._news.wait_for(lambda: self.closed, max(_REST, _BREATH * took))

    def _tell(self, parts: Parts) -> None:
        with self._news:
            self.parts = parts
            self.number += 1
            self._news.notify_all()


class Server(ThreadingHTTPServer):
    """Listens as soon as it is made. Raises ``RunError`` where it cannot."""

    daemon_threads = True

    def __init__(
        self,
        folder: Path,
        host: str = HOST,
        port: int = PORT,
        token: str = "",
        look: Callable[[Path], Looks] = Look,
    ):
        self.token = token or secrets.token_urlsafe(16)
        self.folder = folder
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RunError(
                f"The page cannot be served at {host}, port {port} ({reason}); choose another "
                "--port (0: any free one) or --host."
            ) from error
        self.board = Board(look(folder))

    def service_actions(self) -> None:
        """Between two polls: a Ctrl-C that Python dropped."""
        stop_if_pressed()

    def server_bind(self) -> None:
        # not HTTPServer's, which asks the network for this machine's name
        TCPServer.server_bind(self)

    @property
    def address(self) -> str:
        """Where the page is, its token included."""
        host = str(self.server_address[0])
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.server_address[1]}/{self.token}/"

    def server_close(self) -> None:
        if hasattr(self, "board"):
            self.board.close()
        super().server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader who leaves in mid-answer is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "fedgrove"
    sys_version = ""
    timeout = _PATIENCE

    def do_GET(self) -> None:
        address, *_ = self.path.removeprefix("/").split("?")
        token, *rest = address.split("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._plain(HTTPStatus.FORBIDDEN, "The token in the address is not that of this page.")
        elif rest == [""]:
            self._page(self.server.board.look.page())
        elif rest == ["events"]:
            self._events()
        elif rest == ["report.html"] and (self.server.folder / "report.html").is_file():
            self._page((self.server.folder / "report.html").read_text(encoding="utf-8"))
        else:
            self._plain(HTTPStatus.NOT_FOUND, "There is nothing at this address.")

    def log_message(self, format: str, *args: object) -> None:
        """A log of addresses would hold the token."""

    def _plain(self, status: HTTPStatus, sentence: str) -> None:
        self._whole(status, "text/plain; charset=utf-8", sentence + "\n", "default-src 'none'")

    def _page(self, page: str) -> None:
        self._whole(HTTPStatus.OK, "text/html; charset=utf-8", page, policy(page))

    def _whole(self, status: HTTPStatus, kind: str, text: str, allowed: str) -> None:
        body = text.encode()
        self._head(status, kind, allowed)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, allowed: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", allowed)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")

    def _events(self) -> None:
        """The parts that changed, whenever some did, until the reader leaves."""
        self._head(HTTPStatus.OK, "text/event-stream", "default-src 'none'")
        self.end_headers()
        board = self.server.board
        number = 0
        sent: Parts = {}
        with board.watching():
            while not board.closed:
                before = number
                number, parts = board.after(before, _KEEP)
                if number == before:
                    self.wfile.write(b":\n\n")  # a reader who has left is found by writing
                    continue
                changed = {name: html for name, html in parts.items() if html != sent.get(name)}
                sent = parts
                self.wfile.write(f"event: parts\ndata: {json.dumps(changed)}\n\n".encode())


def policy(page: str) -> str:
    """What a page of ours may do: run its own scripts, found by their hashes, and ask this server."""
    allowed = ["'none'"]
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    if scripts:
        allowed = [f"'sha256-{_digest(script)}'" for script in scripts]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def served(folder: Path) -> Path:
    """The directory of a run. Raises ``RunError`` where it is none."""
    if not folder.exists():
        raise RunError(f"There is no {folder}; give the directory of a run.")
    if not (folder / "job.toml").is_file():
        raise RunError(f"{folder} is no run (it has no job.toml); give the directory of a run.")
    return folder
