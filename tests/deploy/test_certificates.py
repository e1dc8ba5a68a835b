"""Keys and certificates: what TLS itself makes of them, and who may read them."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from fedgrove.deploy.certificates import (
    DeployError,
    Issued,
    address,
    check_public,
    host_names,
    load_issued,
    new_authority,
    new_node_key,
    new_server,
    open_to_others,
    public_of,
    write_private,
)


def save(folder: Path, name: str, issued: Issued) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    certificate.write_bytes(issued.certificate_pem())
    write_private(key, issued.key_pem())
    return certificate, key


def handshake(tmp: Path, server: Issued, trusted: Issued, host: str) -> None:
    """A TLS connection over a pair of sockets, as a strict client makes it."""
    certificate, key = save(tmp, "server", server)
    anchor, _ = save(tmp, "ca", trusted)
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(certificate, key)
    there = ssl.create_default_context(cafile=str(anchor))
    there.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 asks by default
    left, right = socket.socketpair()

    def serve() -> None:
        try:
            here.wrap_socket(left, server_side=True).close()
        except OSError:
            left.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        there.wrap_socket(right, server_hostname=host).close()
    finally:
        right.close()
        thread.join()


def test_tls_accepts_the_server_by_every_name_that_it_has(tmp_path: Path) -> None:
    authority = new_authority("one")
    server = new_server(authority, ["fl.example.org", "10.0.0.7"])
    assert host_names(server.certificate) == [
        "fl.example.org",
        "localhost",
        "10.0.0.7",
        "127.0.0.1",
    ]
    for number, host in enumerate(("fl.example.org", "localhost", "10.0.0.7", "127.0.0.1")):
        (folder := tmp_path / str(number)).mkdir()
        handshake(folder, server, authority, host)


def test_tls_refuses_another_name_another_authority_and_an_expired_certificate(
    tmp_path: Path,
) -> None:
    authority = new_authority("one")
    server = new_server(authority, ["fl.example.org"])
    old = new_server(authority, ["localhost"], now=datetime.now(UTC) - timedelta(days=30), days=10)
    cases = [(server, authority, "other.example.org"), (server, new_authority("one"), "localhost")]
    for number, (certificate, trusted, host) in enumerate([*cases, (old, authority, "localhost")]):
        (folder := tmp_path / str(number)).mkdir()
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(folder, certificate, trusted, host)


def test_an_authority_is_read_back_and_can_sign_again(tmp_path: Path) -> None:
    authority = new_authority("one")
    again = load_issued(*save(tmp_path, "authority", authority))
    handshake(tmp_path, new_server(again, ["localhost"]), authority, "localhost")


def test_a_node_key_is_what_flower_reads_and_its_public_half_follows_from_it() -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    private, public = new_node_key("clinic-a")
    assert isinstance(load_ssh_private_key(private, None), EllipticCurvePrivateKey)
    assert public.endswith(b" clinic-a\n")
    assert public_of(private, Path("node.key")) == check_public(public, Path("node.pub"))


def test_a_private_key_among_the_public_ones_is_noticed() -> None:
    private, _ = new_node_key("clinic-a")
    with pytest.raises(DeployError, match="must not leave its site"):
        check_public(private, Path("keys/clinic-a.pub"))
    with pytest.raises(DeployError, match="no OpenSSH public key"):
        check_public(b"ssh-rsa nonsense", Path("keys/clinic-a.pub"))


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_private_file_is_its_owners_alone_and_never_replaced_silently(tmp_path: Path) -> None:
    before = os.umask(0)  # the most careless setting
    try:
        write_private(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert not open_to_others(tmp_path / "key")
    with pytest.raises(DeployError, match="--force"):
        write_private(tmp_path / "key", b"other")
    assert (tmp_path / "key").read_bytes() == b"secret"
    write_private(tmp_path / "key", b"other", force=True)
    assert (tmp_path / "key").read_bytes() == b"other"
    (tmp_path / "key").chmod(0o640)
    assert open_to_others(tmp_path / "key")


@pytest.mark.parametrize(
    ("text", "found"), [("a.b:1", ("a.b", 1)), ("[::1]:65535", ("::1", 65535))]
)
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert address(text) == found


@pytest.mark.parametrize("text", ["a.b", ":1", "a:0", "a:65536", "a:http", ""])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(DeployError, match="host:port"):
        address(text)
