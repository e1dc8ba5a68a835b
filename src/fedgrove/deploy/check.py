"""``fedgrove deploy check``: what stands in the way of a deployment, in plain words, one line each
with its remedy.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fedgrove.deploy.certificates import (
    DeployError,
    address,
    fingerprint,
    host_names,
    load_certificates,
    open_to_others,
    public_keys,
    public_of,
)
from fedgrove.deploy.gate import ABOUT
from fedgrove.deploy.host import checked_job, known_keys
from fedgrove.deploy.layout import SERVER_FILE, ServerFile
from fedgrove.deploy.site import FILE as SITE_FILE
from fedgrove.deploy.site import SitePlace, open_place
from fedgrove.ground.errors import FedgroveError
from fedgrove.ground.plain import Plain

if TYPE_CHECKING:
    from cryptography import x509

    from fedgrove.job import Job

AHEAD, BEHIND = (
    5.0,
    300.0,
)  # seconds that a site's clock may be ahead of the server's, and behind it (Flower 1.41)
SOON = timedelta(days=30)
_TIMEOUT = 10.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``remedy`` is empty where it is in order."""

    what: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        return not self.remedy

    def __str__(self) -> str:
        if self.ok:
            return f"ok       {self.what}"
        return f"problem  {self.what}: {self.remedy}"


def check(folder: Path, side: str | None = None, job: Path | None = None) -> list[Finding]:
    """Everything about one side's folder; ``side`` "server" or "site" where the folder does not
    tell.

    ``job``: a job to hold a site's file and data against.
    """
    folder = folder.resolve()
    found = side or (
        "server"
        if (folder / SERVER_FILE).exists()
        else "site"
        if (folder / SITE_FILE).exists()
        else ""
    )
    if found == "server":
        return list(_guarded(lambda: check_server(folder)))
    if found == "site":
        return list(_guarded(lambda: check_site(folder, job)))
    raise DeployError(
        f"{folder} has neither {SERVER_FILE} nor {SITE_FILE}; name the folder of one side."
    )


# ------------------------------------------------------------------------ the server's side
def check_server(folder: Path) -> Iterator[Finding]:
    yield _flower()
    file = ServerFile.load(folder)
    yield Finding(f"{SERVER_FILE} is complete")
    job = _job(folder / Path(file.server.job).expanduser())
    yield from job.findings
    if job.job is not None:
        yield _model(job.job.model.name, job.job.model.revision)
    yield from _private(folder / "server.key", "fedgrove deploy init --force")
    if (folder / "ca.key").exists():
        yield from _private(folder / "ca.key", "fedgrove deploy init --force")
    yield from _certificate(folder, file.server.host)
    yield from _keys(folder, job.job)
    yield _port(file.server.listen, file.server.port)


def _keys(folder: Path, job: Job | None) -> Iterator[Finding]:
    try:
        names = [path.stem for path in known_keys(folder)]
    except FedgroveError as error:
        yield _problem("the sites' keys", error)
        return
    yield Finding(f"keys of {len(names)} sites: {', '.join(names)}")
    if job is not None and job.federation.min_clients > len(names):
        yield Finding(
            f"the job waits for {job.federation.min_clients} sites, and {len(names)} can come",
            "admit more sites, or lower federation.min_clients",
        )


def _certificate(folder: Path, host: str) -> Iterator[Finding]:
    chain = load_certificates(folder / "server.crt")
    anchors = load_certificates(folder / "ca.crt")
    yield _dates(chain[0], "server.crt")
    yield _dates(anchors[0], "ca.crt")
    names = host_names(chain[0])
    if host in names:
        yield Finding(f"server.crt is for {host}")
    else:
        yield Finding(
            f"server.crt is not for {host}",
            f"it is for {', '.join(names)}; renew it, or change server.host",
        )
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
        yield Finding("server.key belongs to server.crt")
    except (ssl.SSLError, OSError) as error:
        yield Finding(
            "server.key does not go with server.crt", f"put the right pair there ({error})"
        )
    if trouble := _signed(chain, anchors):
        yield Finding(
            "server.crt is not signed by ca.crt",
            f"sites will refuse it; give them the right one ({trouble})",
        )
    else:
        yield Finding("server.crt is signed by ca.crt")


def _signed(chain: list[x509.Certificate], anchors: list[x509.Certificate]) -> str:
    """What is wrong with the signatures from the server's certificate up to an anchor; "" where
    nothing is.
    """
    current, pool = chain[0], chain[1:]
    for _ in range(len(chain) + 1):
        for issuer in (*anchors, *pool):
            if issuer.subject != current.issuer:
                continue
            try:
                current.verify_directly_issued_by(issuer)
            except (
                Exception
            ) as error:  # InvalidSignature, TypeError or ValueError: all mean the same here
                return f"the signature does not verify, {type(error).__name__}"
            if issuer in anchors:
                return ""
            current = issuer
            break
        else:
            return f"its issuer is {current.issuer.rfc4514_string()}"
    return "the chain does not end"


def _port(host: str, port: int) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            running = _ask_about("127.0.0.1" if host in ("0.0.0.0", "::") else host, port, None)
            if running is not None:
                return Finding(f"a Fedgrove server is running at {host}:{port}")
            return Finding(
                f"{host}:{port} cannot be listened on",
                f"{error.strerror}; choose another server.port",
            )
    return Finding(f"{host}:{port} is free to listen on")


# ------------------------------------------------------------------------ a site's side
def check_site(folder: Path, job: Path | None) -> Iterator[Finding]:
    yield _flower()
    place = open_place(str(folder))
    yield Finding(f"{SITE_FILE} is complete: {place.name}")
    yield from _private(folder / "node.key", f"fedgrove deploy key {folder}")
    public = None
    if (folder / "node.key").exists():
        public = public_of((folder / "node.key").read_bytes(), folder / "node.key")
        yield from _public_half(folder, public)
    for named, model in place.file.allow.models.items():
        yield _model(model, named.partition("@")[2] or None)
    if job:
        asked = _job(job)
    else:
        asked = None
    if asked is not None:
        yield from asked.findings
        if asked.job is not None and asked.job.privacy.secure_aggregation:
            yield _peers(folder, place.name)
    yield from _data(place, asked.job if asked else None)
    yield from _server(folder, place, public)


def _peers(folder: Path, name: str) -> Finding:
    others = sorted(set(public_keys(folder)) - {name})
    if others:
        return Finding(f"it knows the keys of {', '.join(others)}, with whom it masks")
    return Finding(
        "the job masks updates, and keys/ has no other site's public key",
        f"get each node.pub from its site, and `fedgrove deploy admit {folder} NAME node.pub`",
    )


def _public_half(folder: Path, public: bytes) -> Iterator[Finding]:
    kept = folder / "node.pub"
    if not kept.exists() or fingerprint(kept.read_bytes()) != fingerprint(public):
        yield Finding(
            "node.pub is not the public half of node.key",
            f"run `fedgrove deploy key {folder} --force`",
        )


def _data(place: SitePlace, job: Job | None) -> Iterator[Finding]:
    from fedgrove.federation.tables import files_of, rows_at

    path = place.data_path()
    if not files_of(path):
        yield Finding(f"{path} does not exist", f"data.path in {SITE_FILE} names the site's table")
        return
    try:
        if job:
            encoding = getattr(job.data, "encoding", None)
        else:
            encoding = None
        rows = sum(1 for _ in rows_at(path, list(place.file.data.columns.values()), encoding))
    except FedgroveError as error:
        yield _problem("the data", error)
        return
    yield Finding(f"{path.name} has {rows} rows")
    if job is None:
        return
    try:
        admitted = place.admit(job)
    except FedgroveError as error:
        yield _problem("the job", error)
        return
    yield Finding(f"the job is allowed here: {job.method.name} on {job.model.name}")
    try:
        client = place.client(admitted)
    except FedgroveError as error:  # names the column, the label, the row
        yield _problem("the data", error)
        return
    yield Finding(
        f"{len(client.train)} examples to train on and {len(client.test)} to test "
        f"with{_labels(client.train)}"
    )


def _labels(rows: list[Plain]) -> str:
    from collections import Counter

    counts = Counter(str(row["label"]) for row in rows if "label" in row)
    if counts:
        return f" ({', '.join(f'{label} {count}' for label, count in counts.most_common(8))})"
    return ""


def _server(folder: Path, place: SitePlace, public: bytes | None) -> Iterator[Finding]:
    """From the network outwards in: name, port, certificate, then what the server says of itself
    and of this site's key.
    """
    anchors, server = folder / "ca.crt", place.file.site.server
    yield _dates(load_certificates(anchors)[0], "ca.crt")
    host, port = address(server)
    try:
        socket.create_connection((host, port), _TIMEOUT).close()
    except socket.gaierror:
        yield Finding(
            f"the name {host} cannot be resolved",
            f"correct site.server in {SITE_FILE}, or ask your network",
        )
        return
    except OSError as error:
        why = error.strerror or "no answer"
        yield Finding(
            f"{server} cannot be reached",
            f"{why}; is the server running, and does the firewall let it pass?",
        )
        return
    yield Finding(f"{server} can be reached")
    if trouble := _tls(host, port, anchors):
        yield trouble
        return
    yield Finding(f"the server's certificate is for {host}, valid, and signed by ca.crt")
    told = _ask_about(host, port, anchors, public)
    if told is None:
        yield Finding(f"{server} is no Fedgrove server", f"correct site.server in {SITE_FILE}")
        return
    yield _clock(float(told["time"]))
    yield from _versions(told)
    if public is not None:
        yield _admitted(told, place.name)


def _admitted(told: Plain, name: str) -> Finding:
    """Whether the running server lets this site in, under its name."""
    if "site" not in told:
        return Finding(
            "the server does not say whether it admits this site's key",
            "its operator installs the same Fedgrove as here and starts it again",
        )
    if told["site"] is None:
        return Finding(
            "the server does not admit this site's key",
            "send node.pub to its operator, who takes it with `fedgrove deploy admit` and starts "
            "the server again",
        )
    if told["site"] != name:
        return Finding(
            f"the server admits this site's key as that of {told['site']!r}, not of {name!r}",
            f"correct site.name in {SITE_FILE}, or have the key admitted under this name",
        )
    return Finding(f"the server admits this site's key, as {name}")


def _tls(host: str, port: int, anchors: Path) -> Finding | None:
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT) as raw,
            ssl.create_default_context(cafile=str(anchors)).wrap_socket(raw, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return _explained(error, host)
    except (ssl.SSLError, OSError) as error:
        return Finding(f"{host}:{port} does not speak TLS", f"is that the right port? ({error})")


def _explained(error: ssl.SSLCertVerificationError, host: str) -> Finding:
    """OpenSSL's numbers of what is wrong with a certificate, as a finding."""
    code = error.verify_code
    if code == 10:
        return Finding(
            "the server's certificate has expired",
            "its operator renews it with `fedgrove deploy renew`",
        )
    if code == 9:
        return Finding(
            "the server's certificate is not valid yet", "look at the clocks, here and there"
        )
    if code in (62, 64):
        return Finding(
            f"the server's certificate is not for {host}",
            f"use one of its names in site.server, or have it renewed ({error.verify_message})",
        )
    if code in (18, 19, 20, 21):
        return Finding(
            "the server's certificate is not signed by ca.crt",
            "you have another authority's ca.crt, or talk to another server than you think; ask "
            "its operator, by "
            "another way, for ca.crt",
        )
    return Finding("the server's certificate is refused", error.verify_message)


def _clock(theirs: float) -> Finding:
    skew = time.time() - theirs
    if skew > AHEAD:
        return Finding(
            f"this machine's clock is {skew:.0f} s ahead of the server's",
            "set it (NTP); above 5 s Flower refuses the key",
        )
    if -skew > BEHIND:
        return Finding(
            f"this machine's clock is {-skew:.0f} s behind the server's",
            "set it (NTP); above 300 s the key is refused",
        )
    return Finding(f"the clocks agree to {max(1.0, abs(skew)):.0f} s")


def _versions(told: Plain) -> Iterator[Finding]:
    from fedgrove.deploy.gate import about

    mine = about()
    for package, same in (
        ("fedgrove", lambda text: text),
        ("flwr", lambda text: text.split(".")[:2]),
    ):
        ours, theirs = str(mine[package]), str(told.get(package, "unknown"))
        if same(ours) == same(theirs):
            yield Finding(f"{package} {ours} here, {theirs} at the server")
        else:
            yield Finding(
                f"{package} is {ours} here and {theirs} at the server",
                f"install the same: {package}=={theirs}",
            )


# ------------------------------------------------------------------------ both sides
@dataclass(frozen=True)
class _Asked:
    job: Job | None
    findings: tuple[Finding, ...]


def _job(path: Path) -> _Asked:
    try:
        job = checked_job(path)
    except FedgroveError as error:
        return _Asked(None, (_problem("the job", error),))
    return _Asked(job, (Finding(f"{path.name}: {job.method.name}, {job.run.rounds} rounds"),))


def _model(name: str, revision: str | None) -> Finding:
    """Whether the base model is on this machine; nothing is fetched."""
    from fedgrove.federation.assets import ASSETS, cache

    if name in ASSETS:
        there = any(cache().glob(f"{name}-*/config.json"))
        if there:
            when = "is here"
        else:
            when = f"is fetched at first use ({ASSETS[name].size / 1e6:.0f} MB)"
        return Finding(f"the base model {name} {when}")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from transformers import AutoConfig

            AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
        except Exception:  # transformers raises many kinds for a model that is not there
            return Finding(
                f"the base model {name} is not on this machine",
                "give its folder in allow.models, or fetch it from its hub beforehand",
            )
    return Finding(f"the base model {name} is here")


def _private(path: Path, maker: str) -> Iterator[Finding]:
    if not path.exists():
        yield Finding(f"{path.name} is missing", f"`{maker}` makes one")
    elif open_to_others(path):
        yield Finding(
            f"others can read {path.name}",
            f"chmod 600 {path}, and replace it if anyone may have had it",
        )
    else:
        yield Finding(f"only you can read {path.name}")


def _dates(certificate: x509.Certificate, name: str) -> Finding:
    now = datetime.now(UTC)
    ends = certificate.not_valid_after_utc
    if now > ends:
        return Finding(
            f"{name} expired on {ends:%Y-%m-%d}", "renew it: `fedgrove deploy renew` at the server"
        )
    if now < certificate.not_valid_before_utc:
        return Finding(
            f"{name} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "set the clock",
        )
    if now > ends - SOON:
        return Finding(
            f"{name} expires on {ends:%Y-%m-%d}",
            "renew it soon: `fedgrove deploy renew` at the server",
        )
    return Finding(f"{name} is valid until {ends:%Y-%m-%d}")


def _flower() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return Finding(f"Flower {version('flwr')}")
    except PackageNotFoundError:
        return Finding("Flower is not installed", "pip install 'fedgrove[flower]'")


def _ask_about(
    host: str, port: int, anchors: Path | None, public: bytes | None = None
) -> Plain | None:
    """What a Fedgrove gate says of itself, and of whose the key ``public`` is; None from any other
    server. Without ``anchors`` its certificate is not looked at.
    """
    from http.client import HTTPException, HTTPSConnection

    context = ssl.create_default_context(cafile=None if anchors is None else str(anchors))
    if anchors is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if public is None:
        question = ABOUT
    else:
        question = f"{ABOUT}?key={fingerprint(public)}"
    try:
        connection = HTTPSConnection(host, port, timeout=_TIMEOUT, context=context)
        connection.request("GET", question)
        answer = connection.getresponse().read(10_000)
        connection.close()
        told = json.loads(answer)
    except (OSError, HTTPException, ValueError):
        return None
    if isinstance(told, dict) and isinstance(told.get("time"), int | float):
        return told
    return None


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What cannot be looked at is itself a finding, and the last one."""
    try:
        yield from look()
    except FedgroveError as error:
        yield _problem("cannot go on", error)


def _problem(what: str, error: FedgroveError) -> Finding:
    return Finding(what, str(error))
