"""``fedgrove deploy site``: the site's SuperNode, watched and started again where needed, and its
agent.
"""

from __future__ import annotations

import logging
import secrets
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.deploy import launch
from fedgrove.deploy.certificates import DeployError, public_of, write_private
from fedgrove.deploy.site import SitePlace, open_place

if TYPE_CHECKING:
    from fedgrove.deploy.agent import App

_GIVES_UP = (
    "Giving up reconnection"  # after a broken TLS handshake; its process may stay, and do nothing
)
_PAUSES = (
    2.0,
    4.0,
    8.0,
    15.0,
)  # seconds before the SuperNode is started again; then always the last
Say = Callable[[str], None]

#: What the SuperNode's log says, and what it means. The first that occurs in its last lines counts.
_MEANS = (
    ("Invalid SuperNode authentication", "The server does not accept this site's signature; if "
    "that goes on, see "
     "whether this machine's clock is ahead of the server's (`fedgrove deploy check`)."),
    ("Failed to activate SuperNode", "The server does not know this site's key: send node.pub to "
    "its operator, who "
     "takes it with `fedgrove deploy admit` and starts the server again."),
    ("CERTIFICATE_VERIFY_FAILED", "The server's certificate cannot be verified with ca.crt; "
    "`fedgrove deploy check` "
     "says why."),
    ("Connection refused", "Nobody listens at {server}; waiting for the server."),
    ("Name or service not known", "The name of the server, {server}, cannot be resolved; waiting."),
)  # fmt: skip


class Watch:
    """Keeps one SuperNode running: where it ends, it says why in plain words and starts it
    again.
    """

    def __init__(
        self, start: Callable[[], subprocess.Popen[bytes]], log: Path, server: str, say: Say
    ):
        self._start, self._log, self._server, self._say = start, log, server, say
        self._child: subprocess.Popen[bytes] | None = None
        self._again_at, self._failures, self._last = 0.0, 0, ""
        if log.exists():
            self._read = log.stat().st_size
        else:
            self._read = 0
        self._up = self._doomed = False

    def alive(self) -> bool:
        """Look after the child; called a few times a second. Always True: only Ctrl-C ends a
        site.
        """
        now = time.monotonic()
        if self._child is None:
            if now >= self._again_at:
                self._child = self._start()
            return True
        self._listen()
        if self._doomed:
            launch.stop(self._child)
        if self._child.poll() is not None:
            self._listen()
            self._child, self._up, self._doomed = None, False, False
            self._again_at = now + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
            self._failures += 1
        return True

    def close(self) -> None:
        launch.stop(self._child)

    def _listen(self) -> None:
        """What the SuperNode wrote since the last look, in our words."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            new = file.read().decode("utf-8", "replace")
            self._read = file.tell()
        if "SuperNode ID" in new and not self._up:
            self._up, self._failures = True, 0
            self._once(f"Connected to {self._server}.")
        self._doomed = self._doomed or _GIVES_UP in new
        for words, meaning in _MEANS:
            if words in new:
                self._once(meaning.format(server=self._server))
                break

    def _once(self, sentence: str) -> None:
        if sentence != self._last:
            self._say(sentence)
        self._last = sentence


def attend(folder: Path, *, say: Say = print, app: App | None = None) -> None:
    """Take part until Ctrl-C. Raises ``FedgroveError`` for what is wrong before anything is
    started. ``app``: what answers messages; default the installed client.
    """
    launch.need_flower()
    place = open_place(str(folder.resolve()))
    key = place.folder / "node.key"
    if not key.exists():
        raise DeployError(
            f"{key} is missing; make one with `fedgrove deploy key {folder}` and send node.pub."
        )
    public_of(key.read_bytes(), key)
    if not place.data_path().exists():
        raise DeployError(
            f"{place.data_path()} does not exist; data.path in {place.folder / 'site.toml'} names "
            f"it."
        )
    from fedgrove.deploy.agent import Agent
    from fedgrove.deploy.app import client

    if app is None:
        app = client
    _messages_to(say)
    home = place.folder / "flwr"
    home.mkdir(exist_ok=True, mode=0o700)
    secret = home / "agent.secret"
    write_private(secret, secrets.token_bytes(32), force=True)
    port = launch.free_port()
    log = place.folder / "supernode.log"
    with log.open("ab") as output:
        command = _supernode(place, port, secret)
        watch = Watch(
            lambda: launch.start(command, home=home, log=output, cwd=place.folder),
            log,
            place.file.site.server,
            say,
        )
        say(
            f"{place.name} takes part with {place.data_path().name} at {place.file.site.server}; "
            f"Ctrl-C ends it."
        )
        try:
            Agent(f"127.0.0.1:{port}", secret.read_bytes(), app).serve(watch.alive)
        finally:
            watch.close()
            with suppress(OSError):
                secret.unlink()


def _supernode(place: SitePlace, port: int, secret: Path) -> list[str]:
    from fedgrove.job.toml import value_text

    return [
        "flower-supernode", "--superlink", place.file.site.server, "--root-certificates", str(place.folder / "ca.crt"),
        "--auth-supernode-private-key", str(place.folder / "node.key"), "--host", "127.0.0.1", "--port", str(port),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret),
        "--node-config", f"site={value_text(str(place.folder))}",
    ]  # fmt: skip


def _messages_to(say: Say) -> None:
    """One line for each message, from the site's own log."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logger = logging.getLogger("fedgrove")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [Handler()]
