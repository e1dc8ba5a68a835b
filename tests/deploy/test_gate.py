"""The front door: sites get the Fleet interface over TLS, and nobody gets anything else."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("flwr")

from fedgrove.deploy.certificates import DeployError, new_authority, new_server, write_private
from fedgrove.deploy.gate import ABOUT, Gate, OpenGate
from fedgrove.deploy.launch import free_port


class Upstream(http.server.BaseHTTPRequestHandler):
    """A SuperLink that answers everything, and remembers what it was asked."""

    seen: ClassVar[list[tuple[str, bytes, str]]] = []
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, body, self.headers.get("X-Key", "")))
        self.send_response(401 if body == b"refuse" else 200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("X-Answer", "yes")
        self.send_header("Content-Length", str(len(body) + 1))
        self.end_headers()
        self.wfile.write(body + b"!")

    do_GET = do_POST

    def log_message(self, *ignored: Any) -> None:
        pass


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    folder = tmp_path_factory.mktemp("gate")
    authority = new_authority("one")
    certificate = new_server(authority, ["localhost"])
    (folder / "ca.crt").write_bytes(authority.certificate_pem())
    (folder / "server.crt").write_bytes(certificate.certificate_pem())
    write_private(folder / "server.key", certificate.key_pem())
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    upstream.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    upstream.socket = context.wrap_socket(upstream.socket, server_side=True)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    trust = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    port = free_port()
    app = Gate(
        f"https://127.0.0.1:{upstream.server_port}", trust, limit=1000, sites={"ab12": "north"}
    )
    opened = OpenGate(app, "127.0.0.1", port, folder / "server.crt", folder / "server.key")
    yield port, folder
    opened.close()
    upstream.shutdown()
    upstream.server_close()


def ask(
    gate: tuple[int, Path], path: str, body: bytes = b"", method: str = "POST"
) -> tuple[int, bytes, Any]:
    port, folder = gate
    connection = http.client.HTTPSConnection(
        "localhost",
        port,
        context=ssl.create_default_context(cafile=str(folder / "ca.crt")),
        timeout=10,
    )
    connection.request(method, path, body, {"X-Key": "abc"})
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_fleet_calls_pass_with_their_headers_both_ways(gate: tuple[int, Path]) -> None:
    status, body, headers = ask(gate, "/v1/fleet/pull-messages", b"hello")
    assert (status, body, headers["X-Answer"]) == (200, b"hello!", "yes")
    assert Upstream.seen[-1] == ("/v1/fleet/pull-messages", b"hello", "abc")
    assert ask(gate, "/v1/fleet/activate-node", b"refuse")[0] == 401


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/control/start-run", "POST"),
        ("/v1/control/register-node", "POST"),
        ("/v1/runtime/acquire-task", "POST"),
        ("/v1/fleet/../control/start-run", "POST"),
        ("/v1/fleet/%2e%2e/control/start-run", "POST"),
        ("/v1/fleet//v1/control/start-run", "POST"),
        ("/v1/fleet/..;/control/start-run", "POST"),
        ("/v1/fleet/", "POST"),
        ("/V1/FLEET/pull-messages", "POST"),
        ("/v1/fleet/pull-messages", "GET"),
        ("/docs", "GET"),
        ("/openapi.json", "GET"),
        ("/health", "GET"),
    ],
)
def test_nothing_else_passes(path: str, method: str, gate: tuple[int, Path]) -> None:
    before = len(Upstream.seen)
    assert ask(gate, path, method=method)[0] == 404
    assert len(Upstream.seen) == before


def test_a_request_above_the_limit_is_cut(gate: tuple[int, Path]) -> None:
    before = len(Upstream.seen)
    assert ask(gate, "/v1/fleet/push-object", bytes(1000))[0] == 200
    assert ask(gate, "/v1/fleet/push-object", bytes(1001))[0] == 413
    assert len(Upstream.seen) == before + 1


def test_it_tells_its_versions_and_its_clock(gate: tuple[int, Path]) -> None:
    import time

    import fedgrove

    told = json.loads(ask(gate, ABOUT, method="GET")[1])
    assert told["fedgrove"] == fedgrove.__version__
    assert abs(told["time"] - time.time()) < 5


def test_it_tells_whose_a_key_is(gate: tuple[int, Path]) -> None:
    assert "site" not in json.loads(ask(gate, ABOUT, method="GET")[1])
    assert json.loads(ask(gate, f"{ABOUT}?key=ab12", method="GET")[1])["site"] == "north"
    assert json.loads(ask(gate, f"{ABOUT}?key=ab13", method="GET")[1])["site"] is None


def test_plain_http_gets_nothing(gate: tuple[int, Path]) -> None:
    with socket.create_connection(("localhost", gate[0]), 5) as raw:
        raw.sendall(
            b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        )
        raw.settimeout(5)
        with contextlib.suppress(OSError):
            assert b"200" not in raw.recv(100)


def test_without_a_superlink_it_says_so(tmp_path: Path, gate: tuple[int, Path]) -> None:
    _, folder = gate
    port = free_port()
    app = Gate(f"https://127.0.0.1:{free_port()}", ssl.create_default_context(), limit=10)
    opened = OpenGate(app, "127.0.0.1", port, folder / "server.crt", folder / "server.key")
    try:
        assert ask((port, folder), "/v1/fleet/pull-messages")[0] == 503
    finally:
        opened.close()


def test_an_address_that_is_taken(gate: tuple[int, Path]) -> None:
    port, folder = gate
    app = Gate("https://127.0.0.1:1", ssl.create_default_context(), limit=10)
    with pytest.raises(DeployError, match="cannot be listened on"):
        OpenGate(app, "127.0.0.1", port, folder / "server.crt", folder / "server.key")
