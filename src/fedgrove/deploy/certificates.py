"""Keys and certificates of a deployment: an authority, the server's certificate, and one key for
each site.

All of them are elliptic-curve keys on P-384. A site's key never has to leave its site:
``new_node_key`` is what
``fedgrove deploy key`` runs there, and only the public half is sent to the server.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.ground.errors import FedgroveError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

PORT = 9443  # where a deployment's server listens unless it is told otherwise
AUTHORITY_DAYS = 3650
SERVER_DAYS = 397  # the longest that common TLS clients still accept from a new certificate
_BACKDATE = timedelta(
    hours=1
)  # a site whose clock is a little behind can use a new certificate at once


class DeployError(FedgroveError):
    """A deployment's folder, key, certificate or address cannot be used as it is."""


@dataclass(frozen=True, eq=False)
class Issued:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def address(text: str) -> tuple[str, int]:
    """(host, port) of ``host:port``; an IPv6 host stands in brackets. Raises ``DeployError``."""
    host, colon, port = text.rpartition(":")
    host = host.strip("[]")
    named = bool(colon) and bool(host) and "/" not in host
    if not named or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DeployError(
            f"{text!r} is no address; write host:port, such as fl.example.org:{PORT}."
        )
    return host, int(port)


def new_authority(name: str, *, now: datetime | None = None, days: int = AUTHORITY_DAYS) -> Issued:
    """A self-signed certificate authority that can sign end certificates and nothing else."""
    from cryptography import x509

    key = _new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        _begin(subject, subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Issued(_sign(builder, key), key)


def new_server(
    authority: Issued, hosts: Sequence[str], *, now: datetime | None = None, days: int = SERVER_DAYS
) -> Issued:
    """A server certificate for the hosts (names or IP addresses), always for localhost and
    127.0.0.1 too.
    """
    from cryptography import x509

    key = _new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0][:64])])
    names = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1"]))
    issuer = authority.certificate
    own_identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _begin(subject, issuer.subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_identifier),
            critical=False,
        )
    )
    return Issued(_sign(builder, authority.key), key)


def new_node_key(comment: str) -> tuple[bytes, bytes]:
    """(private, public) of a site, in OpenSSH's format, which Flower's SuperNode and SuperLink
    read.
    """
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    key = _new_key()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + b" " + comment.encode("ascii", "replace") + b"\n"


def public_of(private: bytes, where: Path) -> bytes:
    """The public half (OpenSSH, without a comment) of a private node key. Raises
    ``DeployError``.
    """
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = _node_key(private, where)
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def private_key(path: Path) -> EllipticCurvePrivateKey:
    """A site's node key, to sign with. Raises ``DeployError``."""
    try:
        return _node_key(path.read_bytes(), path)
    except OSError as error:
        raise DeployError(f"{path} cannot be read: {error.strerror or error}.") from None


def _node_key(private: bytes, where: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        key = load_ssh_private_key(private, None)
    except Exception as error:  # cryptography raises several kinds for a file that is no key
        raise DeployError(
            f"{where} is no OpenSSH private key; make one with `fedgrove deploy key`."
        ) from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise DeployError(f"{where} is no elliptic-curve key; make one with `fedgrove deploy key`.")
    return key


def public_keys(folder: Path) -> dict[str, EllipticCurvePublicKey]:
    """The public node keys of ``folder/keys``, by site. Raises ``DeployError``."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    found = {}
    for path in sorted((folder / "keys").glob("*.pub")):
        key = load_ssh_public_key(check_public(path.read_bytes(), path))
        assert isinstance(key, EllipticCurvePublicKey)
        found[path.stem] = key
    return found


def check_public(public: bytes, where: Path) -> bytes:
    """A public node key without its comment. Raises ``DeployError``: above all where it is a
    *private* key.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    if b"PRIVATE KEY" in public:
        raise DeployError(
            f"{where} holds a private key, which must not leave its site; delete it here, let the "
            f"site make a new key "
            "with `fedgrove deploy key --force` and send node.pub."
        )
    try:
        key = load_ssh_public_key(public)
    except Exception as error:
        raise DeployError(f"{where} is no OpenSSH public key; a site's node.pub is one.") from error
    if not isinstance(key, EllipticCurvePublicKey):
        raise DeployError(f"{where} is no elliptic-curve key; a site's node.pub is one.")
    return b" ".join(public.split()[:2])


def fingerprint(public: bytes) -> str:
    """SHA-256 of a public node key (OpenSSH, with or without a comment)."""
    return hashlib.sha256(b" ".join(public.split()[:2])).hexdigest()


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises ``DeployError``."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except FileNotFoundError:
        raise DeployError(
            f"{path} is missing; it comes from the server's side of `fedgrove deploy init`."
        ) from None
    except (OSError, ValueError) as error:
        raise DeployError(f"{path} is no certificate in PEM format ({error}).") from error


def load_issued(certificate: Path, key: Path) -> Issued:
    """A certificate with its private key, from two PEM files. Raises ``DeployError``."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    found = load_certificates(certificate)[0]
    try:
        private = load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise DeployError(
            f"{key} is no private key in PEM format without a password ({error})."
        ) from error
    if not isinstance(private, EllipticCurvePrivateKey):
        raise DeployError(f"{key} is no elliptic-curve key.")
    return Issued(found, private)


def host_names(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a server certificate is for."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        str(name)
        for kind in (x509.DNSName, x509.IPAddress)
        for name in names.get_values_for_type(kind)
    ]


def write_private(path: Path, data: bytes, *, force: bool = False) -> None:
    """A file that only its owner can read, from its first byte on. Refuses to overwrite without
    ``force``.
    """
    if force:
        path.unlink(missing_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise DeployError(f"{path} exists already; --force replaces it.") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def open_to_others(path: Path) -> bool:
    """Whether anyone but the owner may read or write the file."""
    return os.name == "posix" and bool(path.stat().st_mode & 0o077)


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: EllipticCurvePrivateKey,
    now: datetime | None,
    days: int,
) -> x509.CertificateBuilder:
    from cryptography import x509

    start = (now or datetime.now(UTC)) - _BACKDATE
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _BACKDATE + timedelta(days=days))
    )


def _sign(builder: x509.CertificateBuilder, key: EllipticCurvePrivateKey) -> x509.Certificate:
    from cryptography.hazmat.primitives.hashes import SHA384

    return builder.sign(key, SHA384())


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
