"""A server whose gate writes down all that passes, both ways: ``python recording.py FOLDER
CAPTURE``.

What it writes is what TLS protects outside: each request's and each answer's path and body.
``CAPTURE`` is a folder with one file for each direction, and ``sizes.txt``: direction, path and
bytes of every body.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fedgrove.deploy import gate
from fedgrove.deploy.host import serve

capture = Path(sys.argv[2])
capture.mkdir(parents=True, exist_ok=True)
passed = gate.Gate._pass


def note(way: str, path: str, body: bytes) -> None:
    with (capture / way).open("ab") as file:
        file.write(body)
    with (capture / "sizes.txt").open("a") as file:
        file.write(f"{way} {path} {len(body)}\n")


async def recorded(
    self: gate.Gate, scope: gate.Scope, receive: gate.Receive, send: gate.Send
) -> None:
    body = bytearray()

    async def hear() -> Any:
        part = await receive()
        body.extend(part.get("body", b""))
        return part

    async def say(message: Any) -> None:
        if message["type"] == "http.response.body":
            note("down", scope["path"], message["body"])
        await send(message)

    await passed(self, scope, hear, say)
    note("up", scope["path"], bytes(body))


gate.Gate._pass = recorded  # type: ignore[method-assign]
print(serve(Path(sys.argv[1]), say=lambda sentence: print(sentence, flush=True)), flush=True)
