"""The server's front door: TLS on the public address, and behind it only what sites need of the
SuperLink.

Flower 1.41 serves three interfaces on one port. The Fleet interface asks every SuperNode for its
key; the Control interface (start a run, which is code; register a key) and the Runtime interface
ask for nothing. So the SuperLink listens on this machine alone, and this gate passes ``/v1/fleet/``
and nothing else.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fedgrove.deploy.certificates import DeployError
from fedgrove.ground.plain import Plain

FLEET = "/v1/fleet/"
ABOUT = "/v1/fedgrove/about"  # for `fedgrove deploy check`
_HOP = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"te",
    b"trailer",
    b"upgrade",
    b"host",
    b"content-length",
}

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]  # of the web server's protocol, ASGI
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]


def about() -> Plain:
    """What the gate tells anyone who asks: versions, and what time it is here."""
    from importlib.metadata import version

    import fedgrove

    return {"fedgrove": fedgrove.__version__, "flwr": version("flwr"), "time": time.time()}


class Gate:
    """An ASGI app that passes the Fleet interface on to ``upstream`` (https://127.0.0.1:port)."""

    def __init__(
        self,
        upstream: str,
        trust: ssl.SSLContext,
        limit: int,
        sites: Mapping[str, str] | None = None,
    ):
        """``limit``: the largest body of one request, in bytes; Flower sends larger messages in
        pieces of 5 MB. ``sites``: the admitted sites' names, by the fingerprints of their keys.
        """
        import httpx

        self.limit, self.sites = limit, dict(sites or {})
        self._client = httpx.AsyncClient(
            base_url=upstream, verify=trust, timeout=httpx.Timeout(120.0)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http":
            return
        elif scope["path"] == ABOUT and scope["method"] == "GET":
            told = {**about(), **self._site_of(scope)}
            await _answer(send, 200, json.dumps(told).encode(), b"application/json")
        elif not self._passes(scope):
            await _answer(send, 404, b"Not found.")
        else:
            await self._pass(scope, receive, send)

    def _site_of(self, scope: Scope) -> dict[str, str | None]:
        """Whose key it is that ``?key=FINGERPRINT`` asks about; nothing where none is asked for."""
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        if "key" in asked:
            return {"site": self.sites.get(asked["key"][0])}
        return {}

    def _passes(self, scope: Scope) -> bool:
        """One name below the Fleet interface, spelt plainly: no encoded or relative path gets
        anywhere else.
        """
        raw = scope.get("raw_path", scope["path"].encode()).split(b"?")[0].decode("latin-1")
        name = raw.removeprefix(FLEET)
        return (
            scope["method"] == "POST"
            and raw.startswith(FLEET)
            and name.replace("-", "").isalpha()
            and name.isascii()
        )

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        import httpx

        body, more = bytearray(), True
        while more:
            part = await receive()
            if part["type"] == "http.disconnect":
                return
            body += part.get("body", b"")
            if len(body) > self.limit:
                await _answer(send, 413, b"Too large.")
                return
            more = part.get("more_body", False)
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP]
        try:
            reply = await self._client.post(scope["path"], content=bytes(body), headers=headers)
        except httpx.HTTPError:
            await _answer(send, 503, b"The SuperLink is not there.")
            return
        kept = [
            (name, value)
            for name, value in reply.headers.raw
            if name.lower() not in (*_HOP, b"content-encoding", b"server", b"date")
        ]
        await _answer(send, reply.status_code, reply.content, None, kept)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._client.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return


class OpenGate:
    """The gate at work in a thread of this process; ``close`` ends it."""

    def __init__(self, app: Gate, host: str, port: int, certificate: Path, key: Path):
        import uvicorn

        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.05)
        if not self._server.started:
            raise DeployError(
                f"{host}:{port} cannot be listened on; is a server running there already?"
            )

    def _run(self) -> None:
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that the address is taken
            return

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=5)


async def _answer(
    send: Send,
    status: int,
    body: bytes,
    kind: bytes | None = b"text/plain",
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    given = list(headers or [])
    if kind:
        given.append((b"content-type", kind))
    length = str(len(body)).encode()
    given.append((b"content-length", length))
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": body})
